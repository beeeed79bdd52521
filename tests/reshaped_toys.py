"""Toy kinds of changed modules, and tiny models that hold them."""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    DeiTConfig,
    SwinConfig,
    ViTConfig,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.reshaped_models import register_kind, reshape_model
from tests.architectures import CONFIGS, tiny, token_batch

IDS = token_batch()
PIXELS = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
_IMAGE = {"image_size": 16, "num_labels": 5}
_VIT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 4}
VISION = {
    "vit": lambda: ViTConfig(**_IMAGE, **_VIT),
    "deit": lambda: DeiTConfig(**_IMAGE, **_VIT, architectures=["DeiTForImageClassification"]),
    "swin": lambda: SwinConfig(**_IMAGE, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=2, patch_size=2),
}
NAMES = [*CONFIGS, *VISION]


def shape_of(dense):
    return (dense.nx, dense.nf) if isinstance(dense, Conv1D) else (dense.in_features, dense.out_features)


def dense_like(conv1d, weight, bias):
    """A `Linear` or `Conv1D` with the weight [out, in]."""
    module = Conv1D(*weight.shape) if conv1d else nn.Linear(*weight.T.shape, bias=bias is not None)
    module.weight = nn.Parameter(weight.T.contiguous() if conv1d else weight.clone())
    if bias is not None:
        module.bias = nn.Parameter(bias.clone())
    return module


class Factorised(nn.Module):
    """`up(down(x))`, as mixed rank leaves it."""

    def __init__(self, dense, rank):
        super().__init__()
        inputs, outputs = shape_of(dense)
        self.rank, self.conv1d = rank, isinstance(dense, Conv1D)
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=dense.bias is not None)

    def forward(self, x):
        return self.up(self.down(x))

    def describe(self):
        return {"kind": "toy_factors", "rank": self.rank}

    def to_dense(self):
        return dense_like(self.conv1d, (self.up.weight @ self.down.weight).detach(), self.up.bias)


class Sliced(nn.Module):
    """Reads some of the channels and adds to some of them, as structural pruning leaves it."""

    def __init__(self, dense, inputs, outputs):
        super().__init__()
        self.full, self.conv1d = shape_of(dense), isinstance(dense, Conv1D)
        self.linear = nn.Linear(inputs, outputs, bias=dense.bias is not None)
        self.register_buffer("input_index", torch.randperm(self.full[0])[:inputs].sort().values.int())
        self.register_buffer("output_index", torch.randperm(self.full[1])[:outputs].sort().values.int())

    def forward(self, x):
        y = self.linear(x.index_select(-1, self.input_index))
        return y.new_zeros(*y.shape[:-1], self.full[1]).index_add(-1, self.output_index, y)

    def describe(self):
        return {"kind": "toy_slice", "inputs": len(self.input_index), "outputs": len(self.output_index)}

    def to_dense(self):
        weight = torch.zeros(self.full[::-1])
        weight[self.output_index[:, None].long(), self.input_index.long()] = self.linear.weight.detach()
        bias = self.linear.bias
        if bias is not None:
            bias = torch.zeros(self.full[1]).index_add(0, self.output_index, bias.detach())
        return dense_like(self.conv1d, weight, bias)


class SelectedNorm(nn.Module):
    """RMS norm whose statistics are over all channels and whose output is some of them, the others zero."""

    def __init__(self, dense, kept):
        super().__init__()
        self.eps, self.width = dense.variance_epsilon, dense.weight.numel()
        self.weight = nn.Parameter(torch.ones(kept))
        self.register_buffer("index", torch.arange(kept) * self.width // kept)

    def forward(self, x):
        y = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)).index_select(-1, self.index) * self.weight
        return torch.zeros_like(x).index_add(-1, self.index, y)

    def describe(self):
        return {"kind": "toy_norm", "kept": len(self.weight)}

    def to_dense(self):
        dense = LlamaRMSNorm(self.width, self.eps)
        dense.weight = nn.Parameter(torch.zeros(self.width).index_add(0, self.index, self.weight.detach()))
        return dense


register_kind("toy_factors", lambda dense, description: Factorised(dense, description["rank"]))
register_kind("toy_slice", lambda dense, d: Sliced(dense, d["inputs"], d["outputs"]))
register_kind("toy_norm", lambda dense, description: SelectedNorm(dense, description["kept"]))


def change(blocks):
    """Factorise the linear modules of the first block, slice those of the second, leave the others."""
    torch.manual_seed(3)
    for block, kind in zip(blocks, ("factors", "slice"), strict=False):
        linear = [(name, m) for name, m in block.named_modules() if isinstance(m, (nn.Linear, Conv1D))]
        for i, (name, dense) in enumerate(linear):
            inputs, outputs = shape_of(dense)
            new = Factorised(dense, 5 + i) if kind == "factors" else Sliced(dense, inputs - 9 - i, outputs - 7)
            for parameter in new.parameters():
                nn.init.normal_(parameter, std=0.2)
            block.set_submodule(name, new)


def reshaped(name="llama", **settings):
    model = tiny(name, **settings)
    change(find_decoder_stack(model).blocks)
    return reshape_model(model)


def reshaped_image_classifier(name="vit"):
    model = AutoModelForImageClassification.from_config(VISION[name]()).eval()
    change(next(m for m in model.base_model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1))
    return reshape_model(model)


@torch.no_grad()
def outputs(model):
    """Logits [batch, ...], and for a language model the tokens it generates [batch, seq]."""
    model.eval()
    if model.config.model_type in VISION:
        return {"logits": model(pixel_values=PIXELS).logits}
    logits = model(input_ids=IDS, use_cache=False).logits
    return {"logits": logits, "tokens": model.generate(IDS, max_new_tokens=12, do_sample=False)}


def same(model, other):
    found, expected = outputs(model), outputs(other)
    return all(torch.equal(found[key], expected[key]) for key in expected)


def auto_class(name):
    return AutoModelForImageClassification if name in VISION else AutoModelForCausalLM


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings)
