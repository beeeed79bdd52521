"""What a row of the table of architectures can say: names of a model's parts, and the shape of its blocks.

The rows are in `hf_qst.base_model.decoder_table`, the search for the parts in `hf_qst.base_model.decoder_stack`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hf_qst.base_model.experts import are_experts
from hf_qst.base_model.linear_layers import is_linear


@dataclass(frozen=True)
class BlockSpec:
    """What one decoder block of the base looks like, as far as a block of another width must follow it.

    Widths are the base's own; `rotary_dim` is the number of channels of a head that are rotated (0: none).
    `rotary` is how the tables of cosines and sines that a block is given hold the frequencies:

    - `"halved"`: [..., rotary_dim], all frequencies and then all of them again (Llama).
    - `"interleaved"`: [..., rotary_dim], each frequency twice (Cohere).
    - `"half"`: [..., rotary_dim / 2], each frequency once (gpt-oss).
    - `"complex"`: one complex tensor [..., rotary_dim / 2] (Llama 4).
    """

    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm: str  # "rms" or "layer"
    norm_eps: float
    activation: str
    gated_mlp: bool
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    rotary_dim: int = 0
    qk_norm: bool = False  # a norm of the same kind over each query and key head
    post_norms: bool = False  # Gemma 2/3: a second norm on each branch's output
    parallel: str | None = None  # None, "one_norm" (Phi) or "two_norms" (GPT-NeoX)
    pre_norm: bool = True  # a branch adds to the plain residual; False: a norm follows the addition
    attention_dropout: float = 0.0
    rotary: str = "halved"


@dataclass(frozen=True)
class Projections:
    """Paths inside a block of the linear layers that read from the residual and of those that add to it.

    Of the attention or what stands in its place, and of the MLP. A half that is not known has no layers: its readers
    are empty and its writer is None. Each of `mlp_in` holds `mlp_stacked` matrices, one behind the other (Phi-3: 2).

    Of a mixture, `experts` is the path of the module that holds its experts; `mlp_in` and `mlp_out` are then those of the
    expert that every token sees beside them, where there is one.
    """

    attention_in: tuple[str, ...] = ()
    attention_out: str | None = None
    mlp_in: tuple[str, ...] = ()
    mlp_out: str | None = None
    mlp_stacked: int = 1
    experts: str = ""

    @property
    def attention_paths(self) -> tuple[str, ...]:
        return (*self.attention_in, self.attention_out) if self.attention_out else ()

    @property
    def mlp_paths(self) -> tuple[str, ...]:
        return (*self.mlp_in, self.mlp_out) if self.mlp_out else ()

    @property
    def paths(self) -> tuple[str, ...]:
        """All of them: the matrices of a block that methods may change."""
        return *self.attention_paths, *self.mlp_paths

    @property
    def are_any(self) -> bool:
        """Whether any layer is known."""
        return bool(self.paths or self.experts)

    @property
    def of_one_input(self) -> list[tuple[str, ...]]:
        """Its layers, those together that read the same: at most four groups."""
        groups = [self.attention_in, self.attention_paths[-1:], self.mlp_in, self.mlp_paths[-1:]]
        return [group for group in groups if group]

    @property
    def mlp_hosts(self) -> tuple[str, ...]:
        """Paths of the modules that the MLP's layers lie in, the one that reads first."""
        return tuple(dict.fromkeys(host_of(path) for path in self.mlp_paths))

    @property
    def hosts(self) -> tuple[str, ...]:
        """Paths of the modules that these layers lie in, the attention's first; a layer of the block itself is its own."""
        return tuple(dict.fromkeys(host_of(path) for path in (*self.attention_paths, *self.mlp_paths)))


def host_of(path: str) -> str:
    """Path of the module that the layer `path` lies in; a layer of the block itself is its own host."""
    return path.rpartition(".")[0] or path


def mixture(host: str) -> tuple[Projections, ...]:
    """Experts in the module at this path, and the expert that every token sees beside them, under all its names."""
    # Those with a gate first: without it, their other two matrices are the parts of an MLP that has none.
    shared = (
        ("shared_experts", "gate_proj up_proj"),
        ("shared_expert", "gate_proj up_proj"),
        ("shared_mlp", "gate_proj up_proj"),
        ("shared_experts", "gate_up_proj"),
        ("shared_experts", "up_proj"),
    )
    beside = tuple(
        Projections(
            mlp_in=tuple(f"{host}.{name}.{reader}" for reader in readers.split()),
            mlp_out=f"{host}.{name}.down_proj",
            experts=f"{host}.experts",
        )
        for name, readers in shared
    )
    return *beside, Projections(experts=f"{host}.experts")


@dataclass(frozen=True)
class SequentialBlock:
    """A block that is `h = h + attention(norm_1(h))`, then `h = h + mlp(norm_2(h))`, with RMSNorm and nothing in between.

    Kernels may compute the norms and additions of such blocks. Not one is a block with a norm on a branch's output
    (Gemma), one addition for both branches (Phi, GPT-NeoX), dropout before it (GPT-2, OPT) or `Conv1D` (GPT-2).
    """

    block: str  # its class in `transformers.models.<model type>.modeling_<model type>`
    norms: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")


def one_stream(hidden: torch.Tensor) -> torch.Tensor:
    """The state of a block with one residual stream."""
    return hidden


def first_stream(hidden: torch.Tensor) -> torch.Tensor:
    """[streams, batch, seq, hidden] -> [batch, seq, hidden] (Gemma 3n)."""
    return hidden[0]


@dataclass(frozen=True)
class Architecture:
    """One row of the table: the names a model class gives to its parts, and what is peculiar to it.

    `stack` is the path of the decoder stack inside a model with a head, the other names are relative to it (`blocks`,
    `final_norm`, `embeddings`) or to a block (`attention`, those of `projections`).

    Args:
        spec: of the text configuration, the shape of a block.
        alternatives (`tuple[Projections, ...]`):
            Other layers that a block may have in the place of `projections`: another mixer of positions than attention
            (Qwen3.5's gated delta net), another MLP. Each half is looked for by itself.
        logit_multiplier: of the text configuration, what the head's logits are multiplied by before their cap.
        state: of what a block is given and returns, the state [batch, seq, hidden] that it stands for.
        softcap (`str`): name of the field of the text configuration that caps the logits.
        decoder_flag (`bool`): whether the type is an encoder unless `config.is_decoder` is set (BERT).
        unpruned (`str`): what of a block pruning leaves as it is, and counts, where that is more than norms.
        pruning_refused (`str`): why its blocks cannot be pruned.
        unreached (`str`): pattern in the names of linear layers of its blocks that a language model alone never calls.
    """

    stack: str
    blocks: str
    final_norm: str
    embeddings: str
    attention: str
    projections: Projections
    spec: Callable[[object], BlockSpec]
    sequential: SequentialBlock | None = None
    alternatives: tuple[Projections, ...] = ()
    logit_multiplier: Callable[[object], float] = lambda config: 1.0
    state: Callable[[torch.Tensor], torch.Tensor] = one_stream
    softcap: str = "final_logit_softcapping"
    decoder_flag: bool = False
    unpruned: str = ""
    pruning_refused: str = ""
    unreached: str = ""

    @property
    def mlp(self) -> tuple[str, ...]:
        """Paths of the modules that the MLP's layers lie in, the one that reads first."""
        return self.projections.mlp_hosts

    def projections_of(self, block: nn.Module) -> Projections:
        """The layers that this block has, of `projections` or of an alternative; without those of an unknown half."""
        known, found = dict(block.named_modules()), {}
        for candidate in (self.projections, *self.alternatives):
            halves = {
                ("attention_in", "attention_out"): (candidate.attention_paths, ""),
                ("mlp_in", "mlp_out", "mlp_stacked", "experts"): (candidate.mlp_paths, candidate.experts),
            }
            for names, (paths, experts) in halves.items():
                is_there = (not experts or are_experts(known.get(experts))) and all(
                    is_linear(known.get(path)) for path in paths
                )
                if (paths or experts) and names[0] not in found and is_there:
                    found |= {name: getattr(candidate, name) for name in names}
        return Projections(**found)


def first_of(config, names: tuple[str, ...], default=None):
    """The first of a configuration's fields that is there and set; of a list with one entry a block, the largest."""
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            value = max((entry for entry in value if isinstance(entry, int)), default=None)
        if value is not None:
            return value
    return default


def rotary_dim(config, head_dim: int) -> int:
    """How many channels of a head are rotated."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # Gemma 3 and others keep one set of rotary parameters for each layer type.
    nested = next((p for p in parameters.values() if isinstance(p, Mapping)), parameters)
    share = first_of(config, ("partial_rotary_factor", "rotary_pct"), 1.0)
    return int(head_dim * nested.get("partial_rotary_factor", share)) // 2 * 2


def block_spec(config, **changes) -> BlockSpec:
    """The shape of a block as most configurations tell it; `changes` are what the type has otherwise."""
    hidden = config.hidden_size
    heads = first_of(config, ("num_attention_heads", "decoder_attention_heads"), max(1, hidden // 64))
    head_dim = changes.pop("head_dim", None) or first_of(config, ("head_dim", "attention_head_dim"), hidden // heads)
    bias = bool(first_of(config, ("attention_bias", "use_bias", "bias"), False))
    values = {
        "hidden_size": hidden,
        "intermediate_size": first_of(
            config,
            ("intermediate_size", "n_inner", "decoder_ffn_dim", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size"),
            4 * hidden,
        ),
        "num_heads": heads,
        "num_kv_heads": min(heads, first_of(config, ("num_key_value_heads",), heads)),
        "head_dim": head_dim,
        "norm": "rms",
        "norm_eps": first_of(
            config, ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"), 1e-5
        ),
        "activation": first_of(config, ("hidden_act", "hidden_activation", "activation_function"), "silu"),
        "gated_mlp": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "mlp_bias": bool(getattr(config, "mlp_bias", False)),
        "rotary_dim": rotary_dim(config, head_dim),
        "attention_dropout": first_of(config, ("attention_dropout", "attention_probs_dropout_prob"), 0.0),
    }
    return BlockSpec(**{**values, **changes})
