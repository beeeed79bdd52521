"""The selections of a decoder and the parameters they leave."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import nn

from hf_qst.base_model.architecture import Projections
from hf_qst.base_model.decoder_stack import DecoderStack
from hf_qst.base_model.experts import ExpertSizes
from hf_qst.base_model.linear_layers import dense_shape, weight_count

SELECTIONS = ("attention_in", "attention_out", "mlp_in", "mlp_middle", "mlp_out")
"""The five selections of a block, S1 to S5 of the paper, in their order everywhere."""
ON_RESIDUAL = tuple(name for name in SELECTIONS if name != "mlp_middle")
"""Those over the channels of the residual."""


@dataclass(frozen=True)
class BlockLayout:
    """Sizes of one block as far as pruning needs them.

    Parameters that a channel of a selection takes along: `read_width` of one that the attention reads, `written_width` of
    one that it writes, both without the other half; an MLP has `mlp_inputs` matrices that read its input, `mlp_outputs`
    that write, and `middle_biases` biases of a middle channel; `mlp_out_biases` are those of a channel that it writes. Of
    a mixture these count all experts, whose middle channels are chosen together; its shared expert, whose middle stays,
    takes `shared_read` with a channel that the MLP reads and `shared_written` with one that it writes. `fixed` counts what
    stays whatever is chosen: norms, biases of queries, keys and values, a recurrence, a router. A half that is not pruned
    counts as `fixed`, and its selections keep everything.
    """

    intermediate_size: int
    read_width: int
    written_width: int
    mlp_inputs: int
    mlp_outputs: int = 1
    middle_biases: int = 0
    mlp_out_biases: int = 0
    shared_read: int = 0
    shared_written: int = 0
    fixed: int = 0

    @classmethod
    def of(cls, block: nn.Module, names: Projections, hidden_size: int) -> BlockLayout:
        known = dict(block.named_modules())
        shapes = {path: dense_shape(known[path]) for path in names.paths}
        biased = {path: int(known[path].bias is not None) for path in names.paths}
        sizes = {"intermediate_size": 0, "read_width": 0, "written_width": 0, "mlp_inputs": 0}
        if names.attention_out:
            sizes["read_width"] = sum(shapes[path][1] for path in names.attention_in)
            sizes["written_width"] = shapes[names.attention_out][0] + biased[names.attention_out]
        if names.experts:
            experts = ExpertSizes.of(known[names.experts])
            biases = experts.count * experts.biased
            sizes["intermediate_size"] = experts.middle
            sizes["mlp_inputs"], sizes["mlp_outputs"] = experts.count * experts.readers, experts.count
            sizes["middle_biases"], sizes["mlp_out_biases"] = experts.readers * biases, biases
            if names.mlp_out:
                sizes["shared_read"] = sum(shapes[path][1] for path in names.mlp_in)
                sizes["shared_written"] = shapes[names.mlp_out][0]
                sizes["mlp_out_biases"] += biased[names.mlp_out]
        elif names.mlp_out:
            sizes["intermediate_size"] = shapes[names.mlp_out][0]
            sizes["mlp_inputs"] = len(names.mlp_in) * names.mlp_stacked
            sizes["middle_biases"] = sum(biased[path] for path in names.mlp_in) * names.mlp_stacked
            sizes["mlp_out_biases"] = biased[names.mlp_out]
        full = torch.tensor([[hidden_size] * 3 + [sizes["intermediate_size"], hidden_size]], device="cpu")
        pruned = int(cls(**sizes).parameters(full[0].unbind()))
        return cls(**sizes, fixed=weight_count(block) - pruned)

    @property
    def prunable(self) -> tuple[str, ...]:
        """The selections of this block that choose from something."""
        attention = SELECTIONS[:2] if self.written_width else ()
        return (*attention, *(SELECTIONS[2:] if self.mlp_inputs else ()))

    def parameters(self, widths) -> torch.Tensor:
        """Parameters left at these five widths: w1 r + w2 s + w4 (g w3 + b + e w5) + d w3 + c w5 + fixed.

        `d` and `c` are of a shared expert and of biases; without an MLP `e` is 0.

        Fields and widths may be tensors with an entry for each block.
        """
        w1, w2, w3, w4, w5 = widths
        written = (self.mlp_inputs > 0) * self.mlp_outputs * w5
        mlp = w4 * (self.mlp_inputs * w3 + self.middle_biases + written) + self.mlp_out_biases * w5
        shared = self.shared_read * w3 + self.shared_written * w5
        return w1 * self.read_width + w2 * self.written_width + mlp + shared + self.fixed


@dataclass(frozen=True)
class PruningLayout:
    """Sizes of a decoder as far as pruning needs them: of its residual, and of each block."""

    hidden_size: int
    blocks: tuple[BlockLayout, ...]

    @classmethod
    def of(cls, stack: DecoderStack) -> PruningLayout:
        hidden = stack.spec.hidden_size
        return cls(hidden, tuple(BlockLayout.of(block, stack.projections(block), hidden) for block in stack.blocks))

    @classmethod
    def uniform(
        cls, num_layers: int, hidden_size: int, intermediate_size: int, query_size: int, key_size: int, mlp_inputs: int
    ) -> PruningLayout:
        """Of equal blocks without biases and norms; `query_size` and `key_size` are those of all heads together."""
        block = BlockLayout(intermediate_size, query_size + 2 * key_size, query_size, mlp_inputs)
        return cls(hidden_size, (block,) * num_layers)

    @property
    def num_layers(self) -> int:
        return len(self.blocks)

    def size(self, selection: str, layer: int = 0) -> int:
        """How many channels a selection of this layer chooses from; 1 for the middle of an MLP that is not pruned."""
        return max(1, self.blocks[layer].intermediate_size) if selection == "mlp_middle" else self.hidden_size

    def weights_of_channel(self, selection: str, layer: int = 0) -> int:
        """How many weights of the unpruned model's block go with one channel of a selection."""
        block = self.blocks[layer]
        return {
            "attention_in": block.read_width,
            "attention_out": block.written_width,
            "mlp_in": block.mlp_inputs * block.intermediate_size + block.shared_read,
            "mlp_middle": (block.mlp_inputs + block.mlp_outputs) * self.hidden_size,
            "mlp_out": block.mlp_outputs * block.intermediate_size + block.shared_written,
        }[selection]

    @property
    def full_widths(self) -> list[list[int]]:
        """Widths [layers, 5] of the unpruned model."""
        return [[self.size(name, layer) for name in SELECTIONS] for layer in range(self.num_layers)]

    def parameters(self, widths: torch.Tensor) -> torch.Tensor:
        """Parameters of all blocks at these widths [layers, 5].

        In the dtype of `widths`: a float one carries gradients, an integer one is exact.
        """
        columns = zip(*(astuple(block) for block in self.blocks), strict=True)
        like = {"dtype": widths.dtype, "device": widths.device}
        return BlockLayout(*(torch.tensor(column, **like) for column in columns)).parameters(widths.unbind(-1)).sum()

    def count(self, widths: list[list[int]]) -> int:
        """`parameters` of integer widths."""
        return sum(int(block.parameters(row)) for block, row in zip(self.blocks, widths, strict=True))

    @property
    def total(self) -> int:
        """Parameters of all blocks of the unpruned model."""
        return self.count(self.full_widths)
