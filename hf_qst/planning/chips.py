"""Memory and ceilings of the devices that a run is planned for.

Ceilings of the H100 and the H200 were measured (`python -m benchmarks.kernels`, see `benchmarks/results`): the best of a
large product and of a large copy. Those of other chips are four fifths of their data sheets, about what the measured ones
reach. They bound what a step can take; they do not say what it will take.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass, replace

import torch

GIB = 2**30
CARDS = (16, 24, 48, 80)
"""Sizes of cards in GiB, for which a plan says whether the run fits."""
USABLE = 0.92
"""Part of a card's memory that a run gets: the driver's context and torch's unused parts of blocks take the rest."""
_SHEET = 0.8
_LAUNCH = 8e-6  # seconds in which a host of today starts one operation of torch
_MISSING = "expected 'cpu', 'cuda', 'cuda:N', a size in GB such as '24GB', or one of {}; got {!r}"


@dataclass(frozen=True)
class Chip:
    """One kind of device.

    Attributes:
        kernels (`str`): `"cpu"` or `"cuda"`.
        memory (`int`, *optional*): bytes.
        products (`float`, *optional*): operations a second of matrix products in 16 bits.
        wide_products (`float`, *optional*): in float32.
        moved (`float`, *optional*): bytes a second, read and written.
        launch (`float`): seconds that an operation takes at least.
        source (`str`): where the ceilings are from.
    """

    name: str
    kernels: str = "cuda"
    memory: int | None = None
    products: float | None = None
    wide_products: float | None = None
    moved: float | None = None
    launch: float = _LAUNCH
    source: str = ""

    @property
    def usable(self) -> int | None:
        """Bytes that a run can take."""
        return None if self.memory is None else int(USABLE * self.memory)

    def with_ceilings(self) -> Chip:
        """This chip; a processor's ceilings are measured when they are first asked for, in a tenth of a second."""
        if self.kernels == "cuda":
            return self
        products, moved = _measured()
        return replace(self, products=products, wide_products=products, moved=moved, source="measured here")

    def seconds(self, operations) -> float | None:
        """Time of a run's operations, each as fast as the ceilings allow: `TracedRun.operations`."""
        if self.products is None:
            return None
        total = 0.0
        for (products, moved, wide), count in operations.items():
            rate = self.wide_products if wide else self.products
            total += count * max(products / rate, moved / self.moved, self.launch)
        return total


def _sheet(name: str, gigabytes: int, tera16: float, tera32: float, giga: float) -> Chip:
    return Chip(
        name,
        memory=gigabytes * GIB,
        products=_SHEET * tera16 * 1e12,
        wide_products=_SHEET * tera32 * 1e12,
        moved=_SHEET * giga * 1e9,
        source="four fifths of the data sheet",
    )


# Data sheets: GiB, TFLOP/s of dense 16-bit and of float32 products, GB/s.
_CHIPS = {
    chip.name: chip
    for chip in (
        _sheet("t4", 16, 65, 8.1, 320),
        _sheet("rtx-3090", 24, 71, 35.6, 936),
        _sheet("rtx-4090", 24, 165, 82.6, 1008),
        _sheet("a10", 24, 125, 31.2, 600),
        _sheet("l4", 24, 121, 30.3, 300),
        _sheet("a6000", 48, 155, 38.7, 768),
        _sheet("l40s", 48, 362, 91.6, 864),
        _sheet("a100", 80, 312, 19.5, 2039),
        Chip("h100", "cuda", 80 * GIB, 797e12, 0.8 * 67e12, 3010e9, source="measured"),
        Chip("h200", "cuda", 141 * 10**9, 797e12, 0.8 * 67e12, 4264e9, source="measured"),
    )
}


def cards_for(size: float) -> dict[str, bool]:
    """Whether a run of this many bytes fits cards of 16, 24, 48 and 80 GB."""
    return {f"{card} GB": size <= USABLE * card * GIB for card in CARDS}


def chip_names() -> list[str]:
    """Chips whose ceilings are known."""
    return list(_CHIPS)


def chip_of(device: str | torch.device | None) -> Chip:
    """The chip that `device` names: a device of torch, a chip by its name, or a size of memory (`"24GB"`).

    Raises:
        ValueError: none of these.
    """
    text = str(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu").lower()
    if text in _CHIPS:
        return _CHIPS[text]
    if text.startswith("cuda"):
        return _present(torch.device(text)) if torch.cuda.is_available() else Chip("cuda")
    if text == "cpu":
        return _processor()
    number = text.removesuffix("gb")
    if number != text and number.isdigit() and int(number) > 0:
        return Chip(text.upper(), memory=int(number) * GIB)
    raise ValueError("device: " + _MISSING.format(", ".join(_CHIPS), device))


def _present(device: torch.device) -> Chip:
    found = torch.cuda.get_device_properties(device)
    name = found.name.lower().replace(" ", "-")
    known = next((chip for key, chip in _CHIPS.items() if key in name), Chip("cuda"))
    return Chip(**{**vars(known), "name": found.name, "memory": found.total_memory})


def _processor() -> Chip:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return Chip("CPU", "cpu", memory, launch=2e-6)


@functools.cache
def _measured() -> tuple[float, float]:
    """Operations a second of a product and bytes a second of a copy on this machine's processor."""
    one = torch.ones(768, 768)
    source, target = torch.empty(2**25, dtype=torch.uint8), torch.empty(2**25, dtype=torch.uint8)
    multiplied, copied = _best(lambda: torch.mm(one, one)), _best(lambda: target.copy_(source))
    return 2 * 768**3 / multiplied, 2 * source.numel() / copied


def _best(call, repeats: int = 4) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
