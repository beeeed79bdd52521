"""Times of single calls on a device, and the ceilings they are held against."""

import gc
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.profiler import profile

from benchmarks.common import measure
from benchmarks.common.measure import synchronize, write_json

REPEATS = 30
# More than any current GPU's L2 cache.
FLUSHED_BYTES = 256 * 2**20
# Microseconds in which the host issues the launches that are to be timed: at least, and at most for one that waits itself.
HEAD_START_US = 500.0
LONGEST_HEAD_START_US = 5000.0
# Of `torch.cuda._sleep`, at the highest clock of current GPUs.
CYCLES_PER_US = 2000
# Seconds of timed calls after which a slow call gets no more of them, and how many it gets all the same.
ENOUGH_SECONDS, LEAST_REPEATS = 0.25, 5
# What twice took its process with it is not tried again.
TRIES = 2
# Packages that a run can do without, and what it then lacks.
OPTIONAL = {
    "bitsandbytes": "a 4-bit head is dequantised by plain torch; no side-tuning step end to end",
    "liger_kernel": "no rows of Liger's fused cross entropy",
    "matplotlib": "no plots",
    "peft": "no side-tuning step end to end",
    "transformers": "no models end to end",
    "triton": "no rows of the Triton kernels",
}


class DeviceLostError(RuntimeError):
    """The CUDA context of this process no longer works, as after an illegal memory access: start another process."""


def message(error: BaseException) -> str:
    """A failed row's reason: the error's class and its first line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}".rstrip(": ")


def check_device(device: torch.device, error: BaseException) -> None:
    """After an error: go on if the device still computes.

    Raises:
        DeviceLostError: if it does not.
    """
    if device.type != "cuda":
        return
    # frees what the failed call held, which its traceback keeps alive
    error.__traceback__ = None
    gc.collect()
    try:
        torch.ones(1, device=device).add_(1).item()
        torch.cuda.empty_cache()
    except RuntimeError as lost:
        raise DeviceLostError(f"{message(error)}; then {message(lost)}") from error


class Begun:
    """What is being measured, in a file of its own, so that what ends its process is known for it.

    Args:
        output: the results' file; this one lies beside it, `<name>.begun`.
    """

    def __init__(self, output: Path):
        self._path = output.with_suffix(".begun")

    def start(self, key: dict) -> str | None:
        """Note that `key` is being measured; why it must not be, if it ended its process `TRIES` times."""
        before = json.loads(self._path.read_text()) if self._path.exists() else {}
        tries = before.pop("tries", 0)
        if before != key:
            tries = 0
        if tries >= TRIES:
            return f"the process ended or was stopped {tries} times while this was measured"
        write_json(self._path, {**key, "tries": tries + 1})
        return None

    def end(self) -> None:
        self._path.unlink(missing_ok=True)


def version_of(package: str) -> str:
    """Of an importable package; `"unknown"` where it was installed under another name."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def missing() -> dict[str, str]:
    """Packages that are not installed here, and what the rows lack without them."""
    return {name: without for name, without in OPTIONAL.items() if find_spec(name) is None}


def about(device: torch.device) -> dict:
    """Versions, commit, machine, driver and what was missing, as they go into every file of results.

    The environment variable `HF_QST_COMMIT` names the commit where the working tree is a copy without its repository.
    """
    packages = ("torch", "triton", "transformers", "peft", "bitsandbytes", "accelerate", "liger_kernel")
    versions = {name: version_of(name) for name in packages if find_spec(name)}
    machine = {"cpu": measure._cpu_name(), "cores": os.cpu_count()}
    machine["threads"] = torch.get_num_threads()
    commit = measure.commit()
    found = {
        "versions": {"python": platform.python_version(), **versions},
        "commit": os.environ.get("HF_QST_COMMIT", commit) if commit == "unknown" else commit,
        "machine": machine,
        "missing": missing(),
    }
    if device.type != "cuda":
        return found
    machine["gpu"] = torch.cuda.get_device_name(device)
    machine["gpu_memory"] = torch.cuda.get_device_properties(device).total_memory
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {**found, "driver": driver, "cuda": torch.version.cuda}


def comparable(before: dict, now: dict, names: tuple[str, ...] = ("sources", "dtype")) -> bool:
    """Whether a file's rows stand beside those made now: these fields are the same, and it is such a GPU.

    A GPU's rows go on in another machine with one of its name; those of a CPU in the same machine alone.
    """

    def kind(report: dict):
        machine = report.get("machine", {})
        return machine.get("gpu", machine), *(report.get(name) for name in names)

    return kind(before) == kind(now)


def spread(times: list[float]) -> tuple[float, list[float]]:
    """Median, and the 20th and 80th percentile."""
    if len(times) < 2:
        return times[0], [times[0], times[0]]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), [fifths[0], fifths[3]]


def in_turns(
    calls: Mapping[str, Callable], rounds: int, device: torch.device, before: Callable = lambda: None
) -> dict[str, list[float]]:
    """
    Seconds of each call in each round, waited for, one of each in turn, so that a busy moment hits them alike.

    Args:
        before: what is done before every call and not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(-1, rounds):
        for name, call in calls.items():
            before()
            synchronize(device)
            started = time.perf_counter()
            call()
            synchronize(device)
            if turn >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def run_once(call: Callable) -> None:
    result = call()
    if result.requires_grad:
        result.backward()


def peak_bytes(call: Callable) -> int:
    """Most bytes a call holds at a time above what was there before it, on the CPU."""
    with profile(profile_memory=True) as recorded:
        run_once(call)
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    live = peak = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def device_peak(call: Callable, device: torch.device) -> dict[str, int | None]:
    """Most bytes on a GPU during a call, with all that lies there, and above that; the call is made on a CPU, too."""
    if device.type != "cuda":
        call()
        return {"peak_bytes": None, "above_bytes": None}
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    return {"peak_bytes": peak, "above_bytes": peak - before}


class Timer:
    """Device times of calls, each with a cold cache and its launches queued ahead; wall times on a CPU.

    Args:
        device (`torch.device`)
        repeats (`int`): calls that are timed, after three that are not. Of a slow call they are fewer: so many as take
            `ENOUGH_SECONDS`, but at least `LEAST_REPEATS`.
    """

    def __init__(self, device: torch.device, repeats: int = REPEATS):
        self.device, self.repeats = device, repeats
        self._flush = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def __call__(self, call: Callable) -> dict:
        """`us`: median; `us_p20_p80`: spread; `host_us`: what the host takes to issue one call; `repeats`."""
        for _ in range(2):
            call()
        synchronize(self.device)
        started = time.perf_counter()
        call()
        synchronize(self.device)
        enough = int(ENOUGH_SECONDS / (time.perf_counter() - started))
        repeats = min(self.repeats, max(LEAST_REPEATS, enough))
        started = time.perf_counter()
        for _ in range(LEAST_REPEATS):
            call()
        host = 1e6 * (time.perf_counter() - started) / LEAST_REPEATS
        synchronize(self.device)
        head_start = min(max(HEAD_START_US, 2 * host), LONGEST_HEAD_START_US)
        times = [self._once(call, head_start) for _ in range(repeats)]
        median, fifths = spread(times)
        return {"us": median, "us_p20_p80": fifths, "host_us": host, "repeats": repeats}

    def _once(self, call: Callable, head_start: float) -> float:
        if self._flush is None:
            started = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(CYCLES_PER_US * head_start))
        self._flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return 1e3 * start.elapsed_time(end)


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """What this device does at best: bytes a second of a large copy (read and written), FLOP a second of a large GEMM."""
    timer, big = Timer(device, 10), device.type == "cuda"
    source = torch.empty(2**30 if big else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = min(timer(lambda: target.copy_(source))["us_p20_p80"])
    size = 8192 if big else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    multiplied = min(timer(lambda: torch.mm(a, b))["us_p20_p80"])
    return {"bytes_per_s": 2e6 * source.numel() / copied, "flops_per_s": 2e6 * size**3 / multiplied}


def floor_us(moved: int, flops: int, limits: dict[str, float]) -> float:
    """Microseconds that a call takes at least: its bytes or its products, whichever takes longer."""
    return 1e6 * max(moved / limits["bytes_per_s"], flops / limits["flops_per_s"])
