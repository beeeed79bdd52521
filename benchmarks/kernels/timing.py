"""Times of single calls on a device, the ceilings they are held against, and the state of a run that may be cut short."""

from __future__ import annotations

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.profiler import profile

from benchmarks.common.measure import environment, message, synchronize, write_json

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
# A measurement that ended its process this often is not tried again.
TRIES = 2
# Packages that a run can do without, and what it then lacks.
OPTIONAL = {
    "bitsandbytes": "a 4-bit head is dequantised by plain torch; no side-tuning step end to end",
    "liger_kernel": "no rows of Liger's fused cross entropy",
    "matplotlib": "no plots",
    "triton": "no rows of the Triton kernels",
}


class DeviceLostError(RuntimeError):
    """The CUDA context of this process no longer works, as after an illegal memory access: start another process."""


def check_device(device: torch.device, error: BaseException) -> None:
    """After an error: go on if the device still computes.

    Raises:
        DeviceLostError: if it does not.
    """
    if isinstance(error, DeviceLostError):
        raise error
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
    """The current measurement, in a file of its own: if its process ends, the next one knows why.

    Args:
        output: the results' file; this one is `<name>.begun` in the same folder.
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


def about(device: torch.device) -> dict:
    """As `environment`, with the packages that are not installed and what the rows lack without them."""
    missing = {name: without for name, without in OPTIONAL.items() if find_spec(name) is None}
    return {**environment(device), "missing": missing}


def register_4bit() -> None:
    """Import bitsandbytes where it is installed: it registers the operator that dequantises a 4-bit head."""
    if find_spec("bitsandbytes"):
        import bitsandbytes  # noqa: F401


def comparable(before: dict, now: dict, names: tuple[str, ...] = ("sources", "dtype")) -> bool:
    """Whether a file's rows may stand in one table with those made now: these fields and the kind of GPU are the same.

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


class Rows:
    """The rows of a report and their file.

    Args:
        report: the content of the file, with its `rows`.
        until: when to begin no more, in seconds since the epoch.
    """

    def __init__(self, report: dict, output: Path, until: float = float("inf")):
        self.report, self.output, self.until, self._begun = report, output, until, Begun(output)
        self._written = float("-inf")

    @classmethod
    def resumed(cls, report: dict, output: Path, until: float = float("inf")) -> Rows:
        """With the rows that the file holds of the same sources."""
        if output.exists() and comparable(before := json.loads(output.read_text()), report):
            report["rows"] = before["rows"]
        return cls(report, output, until)

    @property
    def late(self) -> bool:
        return time.time() >= self.until

    def find(self, key: dict) -> dict | None:
        """The row with these values."""
        return next((row for row in self.report["rows"] if key.items() <= row.items()), None)

    def begin(self, key: dict) -> str | None:
        """Before a row is measured: why it must not be, if it ended its process before."""
        return self._begun.start(key)

    def measure(self, key: dict, facts: dict, call: Callable[[], dict], device: torch.device) -> None:
        """Add the row of `key` and `facts` with what `call` measures, or with the reason why it failed.

        Raises:
            DeviceLostError: this process cannot go on; the row says so and is written.
        """
        row = {**key, **facts}
        if (reason := self.begin(key)) is not None:
            return self.add({**row, "failed": reason})
        try:
            self.add({**row, **call()})
        except Exception as error:
            self.add({**row, "failed": message(error), **getattr(error, "facts", {})})
            self.write()
            check_device(device, error)

    def add(self, row: dict) -> None:
        self._begun.end()
        self.report["rows"].append(row)

    def write(self, after: float = 0.0) -> None:
        """Write the file, unless that was done less than `after` seconds ago."""
        if time.monotonic() - self._written >= after:
            write_json(self.output, self.report)
            self._written = time.monotonic()


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
    """The best of this device: bytes a second of a large copy (read and written), FLOP a second of a large GEMM."""
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
