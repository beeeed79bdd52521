"""Times of single calls on a device, and the ceilings they are held against."""

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.measure import synchronize

REPEATS = 30
# More than any current GPU's L2 cache.
FLUSHED_BYTES = 256 * 2**20
# About half a millisecond, in which the host issues the launches that are to be timed.
HEAD_START_CYCLES = 1_000_000


class Timer:
    """Device times of calls, each with a cold cache and its launches queued ahead; wall times on a CPU.

    Args:
        device (`torch.device`)
        repeats (`int`): calls that are timed, after three that are not.
    """

    def __init__(self, device: torch.device, repeats: int = REPEATS):
        self.device, self.repeats = device, repeats
        self._flush = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def __call__(self, call: Callable) -> dict:
        """`us`: median; `us_p20_p80`: spread; `host_us`: what the host takes to issue one call."""
        for _ in range(3):
            call()
        synchronize(self.device)
        times = [self._once(call) for _ in range(self.repeats)]
        started = time.perf_counter()
        for _ in range(self.repeats):
            call()
        host = 1e6 * (time.perf_counter() - started) / self.repeats
        synchronize(self.device)
        fifths = statistics.quantiles(times, n=5)
        return {"us": statistics.median(times), "us_p20_p80": [fifths[0], fifths[3]], "host_us": host}

    def _once(self, call: Callable) -> float:
        if self._flush is None:
            started = time.perf_counter()
            call()
            return 1e6 * (time.perf_counter() - started)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(HEAD_START_CYCLES)
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
