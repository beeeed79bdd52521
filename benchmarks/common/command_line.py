"""Options that the benchmarks share, and what they refuse in the same words."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.common.measure import RESULTS, ROOT


def parser_of(name: str, description: str) -> argparse.ArgumentParser:
    """The parser of `python -m <name>`; the description keeps its lines."""
    return argparse.ArgumentParser(
        prog=f"python -m {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_part_options(parser: argparse.ArgumentParser, parts: Sequence[str]) -> None:
    """Options of a benchmark whose parts go to one file, see `benchmarks.common.parts`."""
    add = parser.add_argument
    add("--parts", nargs="+", choices=parts, default=list(parts), help="what to measure (default: everything)")
    add("--repeats", type=int, default=7, help="timed rounds")
    add("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--quick", action="store_true", help="tiny sizes: shows that it runs, not what it is worth")
    add("--fresh", action="store_true", help="forget what is in the file")
    add("--output", type=Path, default=RESULTS, help="folder of the results")


def require_positive(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse numbers that are not above 0; a number that is not given passes."""
    for name in names:
        if (value := getattr(args, name)) is not None and value <= 0:
            parser.error(f"{_option(name)} {value}: give a number above 0")


def require_parts(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse lists with numbers that are not between 0 and 1."""
    for name in names:
        if not all(0 < part < 1 for part in getattr(args, name)):
            parser.error(f"{_option(name)} {getattr(args, name)}: give numbers between 0 and 1")


def require_device(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a CUDA device that is not there."""
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no CUDA device here")


def as_json(arguments: Mapping[str, object]) -> dict[str, object]:
    """The arguments of a run as a result file holds them: of paths what they are on every machine."""
    return {name: _shown(value) for name, value in arguments.items()}


def _shown(value: object) -> object:
    """A path of this project from its root, and the last part of any other."""
    if not isinstance(value, (str, Path)):
        return value
    path = Path(value)
    if not path.is_absolute():
        return str(value)
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
