"""The selections of a decoder and the parameters they leave."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_qst.base_model.decoder_stack import DecoderStack

SELECTIONS = ("attention_in", "attention_out", "mlp_in", "mlp_middle", "mlp_out")
"""The five selections of a block, S1 to S5 of the paper, in their order everywhere."""
ON_RESIDUAL = tuple(name for name in SELECTIONS if name != "mlp_middle")
"""Those over the channels of the residual."""


@dataclass(frozen=True)
class PruningLayout:
    """Sizes of a decoder as far as pruning needs them; `query_size` and `key_size` are those of all heads together."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    query_size: int
    key_size: int
    mlp_inputs: int  # matrices that read the MLP's input: 2 in a gated one, else 1

    @classmethod
    def of(cls, stack: DecoderStack) -> PruningLayout:
        spec = stack.spec
        return cls(
            num_layers=len(stack.blocks),
            hidden_size=spec.hidden_size,
            intermediate_size=spec.intermediate_size,
            query_size=spec.num_heads * spec.head_dim,
            key_size=spec.num_kv_heads * spec.head_dim,
            mlp_inputs=2 if spec.gated_mlp else 1,
        )

    def size(self, selection: str) -> int:
        """How many channels a selection chooses from."""
        return self.intermediate_size if selection == "mlp_middle" else self.hidden_size

    def weights_of_channel(self, selection: str) -> int:
        """How many weights of the unpruned model's block go with one channel of a selection."""
        return {
            "attention_in": self.query_size + 2 * self.key_size,
            "attention_out": self.query_size,
            "mlp_in": self.mlp_inputs * self.intermediate_size,
            "mlp_middle": (self.mlp_inputs + 1) * self.hidden_size,
            "mlp_out": self.intermediate_size,
        }[selection]

    @property
    def full_widths(self) -> list[list[int]]:
        """Widths [layers, 5] of the unpruned model."""
        return [[self.size(name) for name in SELECTIONS]] * self.num_layers

    def parameters(self, widths: torch.Tensor) -> torch.Tensor:
        """Weights of all blocks' linear layers at these widths [layers, 5], without biases.

        T = sum over layers of w1 (q + 2k) + q w2 + w4 (g w3 + w5), in the dtype of `widths`: a float one carries
        gradients, an integer one is exact.
        """
        w1, w2, w3, w4, w5 = widths.unbind(-1)
        attention = w1 * (self.query_size + 2 * self.key_size) + w2 * self.query_size
        return (attention + w4 * (self.mlp_inputs * w3 + w5)).sum()

    def count(self, widths: list[list[int]]) -> int:
        """`parameters` of integer widths."""
        return int(self.parameters(torch.tensor(widths, dtype=torch.int64)))

    @property
    def total(self) -> int:
        """Weights of all blocks' linear layers of the unpruned model."""
        return self.count(self.full_widths)
