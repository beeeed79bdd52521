"""Ranks for the layers of a model, as a configuration asks for them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_qst.base_model.linear_layers import dense_shape, weight_count
from hf_qst.mixed_rank.allocation import DENSE, BudgetError, LayerSpectrum, allocate_ranks
from hf_qst.mixed_rank.targets import parameter_budget


def fixed_ranks(model: nn.Module, names: Sequence[str], config) -> dict[str, int]:
    # A layer without a residual is one that is not a target.
    least = 1 if config.mode == "residual" else DENSE
    fixed = {}
    for key, rank in config.rank_pattern.items():
        matching = [name for name in names if name == key or name.endswith(f".{key}")]
        if not matching:
            raise ValueError(f"MixedRankConfig.rank_pattern names {key!r}, which is none of the {len(names)} targets")
        for name in matching:
            most = min(dense_shape(model.get_submodule(name)))
            if not least <= rank <= most:
                raise ValueError(
                    f"MixedRankConfig.rank_pattern[{key!r}] must be from {least} to {most} for {name!r}, got {rank}"
                )
            # A longer name says more.
            if name not in fixed or len(key) > fixed[name][0]:
                fixed[name] = len(key), rank
    return {name: rank for name, (_, rank) in fixed.items()}


def _rank_multiple(layers: Sequence[LayerSpectrum], config) -> int:
    if config.rank_multiple != "auto":
        return config.rank_multiple
    narrowest = min(min(layer.in_features, layer.out_features) for layer in layers)
    if narrowest < 256:
        return 1
    # bitsandbytes' fast 4-bit kernels want inputs in whole blocks of 64; that step is too coarse for narrow layers.
    return 64 if config.quantize_factors == "nf4" and narrowest >= 1024 else 8


def allocate(model: nn.Module, layers: list[LayerSpectrum], fixed: dict[str, int], config) -> dict[str, int]:
    multiple = _rank_multiple(layers, config)
    if all(layer.name in fixed for layer in layers):
        # Every rank is given: there is nothing to allocate.
        return fixed
    if config.mode == "residual":
        return _allocate_residual(layers, fixed, multiple, config)
    names = [layer.name for layer in layers]
    budget = parameter_budget(model, names, config.keep_ratio, config.budget_scope)
    try:
        return allocate_ranks(
            layers, budget, config.allocator, multiple, config.min_rank_ratio, config.allow_dense, fixed
        )
    except BudgetError as error:
        targets = sum(layer.dense_cost for layer in layers)
        total = targets if config.budget_scope == "targets" else weight_count(model)
        # What the scope holds beside the targets is kept whatever is chosen.
        smallest = (error.smallest + total - targets) / total
        raise BudgetError(
            f"MixedRankConfig.keep_ratio={config.keep_ratio} of the {config.budget_scope}'s {total} parameters cannot "
            f"be reached with ranks in multiples of {multiple}: the smallest feasible keep_ratio is "
            f"{_round_up(smallest)}",
            error.smallest,
        ) from None


def _allocate_residual(layers: list[LayerSpectrum], fixed: dict[str, int], multiple: int, config) -> dict[str, int]:
    """Ranks for what is added to layers that stay: the budget is that of one rank in all of them."""
    same = {layer.name: min(config.residual_rank, layer.in_features, layer.out_features) for layer in layers} | fixed
    if config.allocator == "uniform":
        return same
    budget = sum(layer.cost(same[layer.name]) for layer in layers)
    return allocate_ranks(layers, budget, config.allocator, multiple, config.min_rank_ratio, False, fixed)


def _round_up(ratio: float) -> str:
    return f"{-(-ratio * 10_000 // 1) / 10_000:.4f}"
