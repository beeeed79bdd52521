"""SliceGPT for the pruning benchmark: rotate the residual stream onto its principal components, cut off the last ones.

Written from the equations of Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns",
ICLR 2024, for Llama. Each norm has a rotation Q of its own, the eigenvectors of the second moment of what the norm gives
without its scale (section 3.3); the residual stream is cut to `width` channels, and where it passes from one basis to
the next the matrix Q'Q of the two goes into the skip connection (figure 4). These matrices are parameters and are counted.

One thing is done otherwise: the token embeddings, which the head shares here, stay as they are between two projections
[hidden, width], one behind the embeddings and one before the last norm. The paper rotates and slices them, which gives
the same function but needs the embeddings twice, far more parameters on a model this small.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from transformers import LlamaForCausalLM

from benchmarks.compression.methods import parameters
from hf_qst.calibration import CalibrationRun, SecondMoment, calibration_mode, hooks


class SlicedNorm(nn.Module):
    """x / rms(x) [..., width], the mean square taken over the channels before slicing; the scale is in what follows."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.hidden_size, self.eps = hidden_size, eps

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * torch.rsqrt(hidden.square().sum(-1, keepdim=True) / self.hidden_size + self.eps)


class SlicedBlock(nn.Module):
    """A Llama block between sliced bases: what it reads and writes has `width` channels, and so have its skips."""

    def __init__(self, block: nn.Module, hidden_size: int, eps: float, skips: Sequence[torch.Tensor]):
        super().__init__()
        self.norm = SlicedNorm(hidden_size, eps)
        self.self_attn, self.mlp = block.self_attn, block.mlp
        self.attention_skip, self.mlp_skip = (_linear(weight) for weight in skips)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=self.norm(hidden_states), **kwargs)
        hidden_states = self.attention_skip(hidden_states) + attended
        return self.mlp_skip(hidden_states) + self.mlp(self.norm(hidden_states))


def _linear(weight: torch.Tensor, bias: torch.Tensor | None = None) -> nn.Linear:
    """y = x W + b for a weight W [d_in, d_out]."""
    layer = nn.Linear(*weight.shape, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight.T)
        if bias is not None:
            layer.bias.copy_(bias)
    return layer


def rotations(model: LlamaForCausalLM, batches: Sequence[Mapping]) -> list[torch.Tensor]:
    """Q [hidden, hidden] of each norm in the order in which they run, the last norm included; largest component first."""
    names = [f"model.layers.{i}.{norm}" for i in range(len(model.model.layers))
             for norm in ("input_layernorm", "post_attention_layernorm")] + ["model.norm"]  # fmt: skip
    size, run = model.config.hidden_size, CalibrationRun(model, names)
    run.prepare(batches)
    moments = {name: SecondMoment(size, run.device) for name in names}
    plain = SlicedNorm(size, model.config.rms_norm_eps)

    def collect(name):
        return lambda module, args: moments[name].add(plain(run.rows(name, args[0])[0]))

    handles = [model.get_submodule(name).register_forward_pre_hook(collect(name)) for name in names]
    with hooks(handles), calibration_mode(model):
        for batch in batches:
            run(batch)
    return [torch.linalg.eigh(moments[name].second_moment()).eigenvectors.flip(-1) for name in names]


def sliced_parameters(model: LlamaForCausalLM, width: int) -> int:
    """Parameters of `sliced(model, ..., width)`: what the blocks keep, two skips in each, and the two projections."""
    config, blocks = model.config, model.model.layers
    in_blocks = sum(p.numel() for p in blocks.parameters())
    norms = 2 * config.hidden_size * len(blocks)
    kept = (in_blocks - norms) // config.hidden_size * width
    return parameters(model) - in_blocks + kept + 2 * len(blocks) * width**2 + 2 * config.hidden_size * width


def width_on_budget(model: LlamaForCausalLM, allowed: int) -> int:
    """The largest width at which the whole model has at most `allowed` parameters.

    Raises:
        ValueError: not even one channel fits.
    """
    fitting = [w for w in range(1, model.config.hidden_size + 1) if sliced_parameters(model, w) <= allowed]
    if not fitting:
        raise ValueError(f"allowed must be at least {sliced_parameters(model, 1)} parameters, got {allowed}")
    return fitting[-1]


@torch.no_grad()
def sliced(model: LlamaForCausalLM, bases: Sequence[torch.Tensor], width: int) -> LlamaForCausalLM:
    """A copy of the model whose residual stream has `width` channels.

    Args:
        model: a Llama without biases on what writes to the residual.
        bases: of `rotations`.
        width (`int`): channels that stay; all of them give the model's own function.
    """
    small, hidden, eps = copy.deepcopy(model), model.config.hidden_size, model.config.rms_norm_eps
    cut = [basis[:, :width] for basis in bases]
    for i, block in enumerate(small.model.layers):
        before, between, after = cut[2 * i : 2 * i + 3]
        scale, mlp_scale = (n.weight.double() for n in (block.input_layernorm, block.post_attention_layernorm))
        for module, names, basis, gamma in (
            (block.self_attn, ("q_proj", "k_proj", "v_proj"), before, scale),
            (block.mlp, ("gate_proj", "up_proj"), between, mlp_scale),
        ):
            for name in names:
                layer = getattr(module, name)
                rotated = basis.T @ (gamma[:, None] * layer.weight.T.double())
                setattr(module, name, _linear(rotated.to(layer.weight.dtype), layer.bias))
        for module, name, basis in ((block.self_attn, "o_proj", between), (block.mlp, "down_proj", after)):
            weight = getattr(module, name).weight
            setattr(module, name, _linear((weight.T.double() @ basis).to(weight.dtype)))
        skips = [(left.T @ right).to(weight.dtype) for left, right in ((before, between), (between, after))]
        small.model.layers[i] = SlicedBlock(block, hidden, eps, skips)
    dtype = model.lm_head.weight.dtype
    small.model.embed_tokens = nn.Sequential(small.model.embed_tokens, _linear(cut[0].to(dtype)))
    small.model.norm = nn.Sequential(_linear(cut[-1].T.to(dtype)), small.model.norm)
    return small
