"""Arithmetic and memory of a compression, from the shapes of its layers; and models with the shapes that it leaves.

Operations are counted for the defaults: second moments, closed forms, compensation by least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.base_model.linear_layers import dense_shape
from hf_qst.calibration import CHUNK_COLUMNS
from hf_qst.mixed_rank.calibration_set import ROWS_PER_DIMENSION
from hf_qst.mixed_rank.layer import KIND, LowRankLinear
from hf_qst.mixed_rank.targets import find_targets

_DOUBLE = 8


@dataclass(frozen=True)
class InputGroup:
    """Layers [d_in, d_out] with one input, which have one statistic; `widths` are their d_out."""

    d_in: int
    widths: tuple[int, ...]

    @property
    def weights(self) -> int:
        return self.d_in * sum(self.widths)

    @property
    def largest_layer(self) -> int:
        """Bytes of the float64 matrices of its widest layer: the moments and their factors, and the weights."""
        return _DOUBLE * (3 * self.d_in**2 + 4 * self.d_in * max(self.widths))


def double_products(d_in: int, d_out: int) -> float:
    """Operations of a layer's float64 products: the solve, K W, and twice (energies, factors) what makes the problem."""
    return 2 / 3 * d_in**3 + 6 * d_in * d_in * d_out


def workload(
    blocks: Sequence[Sequence[InputGroup]],
    hidden: int,
    tokens: int,
    keep: float,
    memory_limit: int | None,
    width: int = 2,
) -> dict:
    """Operations and bytes of each stage of a compression.

    Args:
        blocks: for each block its layers.
        hidden (`int`): width of the residual.
        tokens (`int`): of all calibration data.
        keep (`float`): part of the weights to keep.
        memory_limit (`int`, *optional*): see [`MixedRankConfig`].
        width (`int`): bytes of a weight and of a state.
    """
    groups = [group for block in blocks for group in block]
    weights = sum(group.weights for group in groups)
    # Of each block the second moments, in float64; those of one are there at a time, or as much as fits the limit.
    moments = [_DOUBLE * sum(group.d_in**2 for group in block) for block in blocks]
    limit = max(moments) if memory_limit is None else memory_limit
    # Of a symmetric product only the blocks on and above the diagonal are computed.
    upper = sum(group.d_in * (group.d_in + CHUNK_COLUMNS) // 2 for group in groups)
    # The first stage runs each block on a part of the rows, once for the moments that fit the limit at a time. The
    # compensation runs it once in the dense model and once in the compressed one; attention is not counted.
    part = min(1.0, ROWS_PER_DIMENSION * max(group.d_in for group in groups) / tokens)
    runs = [
        -(-size // limit) * sum(group.weights for group in block) for size, block in zip(moments, blocks, strict=True)
    ]
    passes = part * sum(runs) / weights + 1 + keep
    kept = [sum(group.d_in for group in block) for block in blocks]
    inner = max(group.d_in for group in groups)
    return {
        "target_weights": weights,
        "forward_passes": passes,
        "forward_operations": passes * 2 * weights * tokens,
        # Stage 1 takes C of the dense inputs, stage 3 C and K of the compressed model's.
        "moment_operations": 2 * ((1 + part) * upper + sum(moments) // _DOUBLE) * tokens,
        "double_operations": sum(double_products(group.d_in, out) for group in groups for out in group.widths),
        "eigenproblems": sum(len(group.widths) for group in groups),
        "factors_bytes": int(width * keep * weights),
        "hidden_states_bytes": 2 * width * tokens * hidden,
        "kept_in_a_block_bytes": sum(
            size if memory_limit is None else min(size, memory_limit)
            for size in (width * tokens * max(kept), width * tokens * (max(kept) + hidden + inner))
        ),
        "moments_bytes": min(max(moments), limit),
        "all_moments_bytes": sum(moments),
        "largest_layer_bytes": max(group.largest_layer for group in groups),
    }


def blocks_of(model: nn.Module, config) -> list[list[InputGroup]]:
    """The targets of a configuration by block of a decoder, those of one input together where the table knows it."""
    names, stack = find_targets(model, config), find_decoder_stack(model)
    blocks = []
    for i, block in enumerate(stack.blocks):
        prefix = f"{stack.path}.{stack.architecture.blocks}.{i}."
        own = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        known = [[path for path in group if path in own] for group in stack.projections(block).of_one_input]
        alone = [[path] for path in own if not any(path in group for group in known)]
        shapes = [[dense_shape(block.get_submodule(path)) for path in group] for group in (*known, *alone) if group]
        blocks.append([InputGroup(of[0][0], tuple(out for _, out in of)) for of in shapes])
    return [block for block in blocks if block]


def with_uniform_ranks(model: nn.Module, config) -> nn.Module:
    """The model with empty factors of the size that the budget leaves, alike in all targets, in the place of its layers."""
    for name in find_targets(model, config):
        layer = model.get_submodule(name)
        d_in, d_out = dense_shape(layer)
        rank = config.rank_pattern.get(name, int(config.keep_ratio * d_in * d_out / (d_in + d_out)))
        if rank:
            description = {"kind": KIND, "rank": rank, "bias": layer.bias is not None}
            model.set_submodule(name, LowRankLinear.from_description(layer, description))
    return model
