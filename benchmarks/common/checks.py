"""What the benchmarks' command lines refuse, in one wording."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def require_positive(parser: argparse.ArgumentParser, args: argparse.Namespace, names: Sequence[str]) -> None:
    """Refuse numbers that are not above 0; one that is not given is fine."""
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
