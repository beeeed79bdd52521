"""The frozen 4-bit bases the side-tuning benchmark runs on, and the batches it feeds them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks.common.llama import llama
from examples.corpus import blocks, split, tokens, transformers_files
from examples.demo import BASE, nf4
from hf_qst.base_model import forbid_packing


@dataclass(frozen=True)
class Shape:
    """A base and the batch it is measured with. `config` is None for a trained model with real text.

    `memory_only` shapes are for bytes: they get a few timed rounds of the main methods alone.
    """

    config: dict | None
    batch: int
    seq: int
    device: str = "cpu"
    memory_only: bool = False


SHAPES = {
    "demo": Shape(None, batch=4, seq=256),
    "100m": Shape(llama(8192, 768, 12, 12, 2048), batch=2, seq=256),
    "100m-128k": Shape(llama(131072, 768, 12, 12, 2048), batch=2, seq=256, memory_only=True),
    "tiny": Shape(llama(512, 64, 2, 4, 192), batch=2, seq=32),
    "llama-2-7b": Shape(llama(32000, 4096, 32, 32, 11008), batch=4, seq=512, device="cuda"),
    "llama-3-8b": Shape(llama(128256, 4096, 32, 32, 14336, 8, 500000.0), batch=4, seq=512, device="cuda"),
}


def base_dtype(device: torch.device) -> torch.dtype:
    """Of everything that is not in 4 bits, and of the matrix products."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_base(config: dict, device: torch.device, seed: int = 0) -> LlamaForCausalLM:
    """A random Llama whose decoder's linear layers are NF4, made on `device` one weight at a time.

    Nothing passes through host memory, and no more than one weight exists in 16 or 32 bits.
    """
    dtype = base_dtype(device)
    llama_config = LlamaConfig(**config)
    with torch.device("meta"):
        model = LlamaForCausalLM(llama_config)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)

    settings = nf4(dtype)
    linear = [(name, part) for name, part in model.model.named_modules() if type(part) is nn.Linear]
    for name, part in tqdm(linear, desc="random NF4 base", unit="weight", leave=False, delay=2):
        made = bnb.nn.Linear4bit(
            part.in_features, part.out_features, False, dtype, compress_statistics=True, quant_type="nf4", device="meta"
        )
        weight = normal(part.out_features, part.in_features)
        # Quantised by the move, on the device the weight is already on.
        made.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, quant_type="nf4", compress_statistics=True, module=made
        ).to(device)
        parent, _, child = name.rpartition(".")
        setattr(model.model.get_submodule(parent), child, made)
    for part in (model.model.embed_tokens, model.lm_head):
        part.weight = nn.Parameter(normal(*part.weight.shape), requires_grad=False)
    for part in model.modules():
        if type(part).__name__ == "LlamaRMSNorm":
            part.weight = nn.Parameter(torch.ones_like(part.weight, dtype=dtype, device=device), requires_grad=False)
    model.model.rotary_emb = LlamaRotaryEmbedding(llama_config).to(device)
    # What transformers sets on a model it quantised, and PEFT reads.
    model.config.quantization_config = settings
    model.is_loaded_in_4bit = model.is_quantized = True
    model.quantization_method = settings.quant_method
    return model.eval()


def load_base(shape: str, model: str | None, device: torch.device, packed: bool, seed: int = 0) -> nn.Module:
    """The base of `shape`, or `model` (a folder or a hub name) in its place, in NF4 on `device`.

    `packed` allows bitsandbytes its AVX512-BF16 kernel, see `forbid_packing`.

    Raises:
        FileNotFoundError: the project's own base is not in this working tree.
    """
    config = SHAPES[shape].config
    if config is not None and model is None:
        base = random_base(config, device, seed)
    else:
        path = model or str(BASE)
        if model is None and not (BASE / "config.json").exists():
            raise FileNotFoundError(f"{BASE} holds no model; give --model PATH_OR_NAME")
        base = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=base_dtype(device),
            quantization_config=nf4(base_dtype(device)),
            device_map={"": device} if device.type == "cuda" else None,
        )
    base.requires_grad_(False)
    if not packed:
        forbid_packing(base)
    return base


def copy_of(base: nn.Module, own_quantized: bool = False) -> nn.Module:
    """A model with modules of its own and the weights of `base`, so that many methods cost the memory of one base.

    `own_quantized` copies the 4-bit weights too: the packed kernel rewrites them.
    """
    shared = [*base.parameters(), *base.buffers()]
    if own_quantized:
        shared = [tensor for tensor in shared if not isinstance(tensor, bnb.nn.Params4bit)]
    else:
        shared += [part.quant_state for part in base.modules() if getattr(part, "quant_state", None) is not None]
    return copy.deepcopy(base, {id(part): part for part in shared})


@dataclass
class Text:
    """Blocks of a trained base's new kind of text: `train` [n, seq] in the order they are used, `held_out` [m, seq]."""

    train: torch.Tensor
    held_out: torch.Tensor


def demo_text(model: str | None, seq: int, held_out_blocks: int, seed: int = 0) -> Text:
    """The source of the installed transformers package, split by file, as blocks of `seq` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model or str(BASE))
    train, held_out = split(transformers_files())
    rows = blocks(tokens(train, tokenizer), seq)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return Text(rows[order], blocks(tokens(held_out, tokenizer), seq, limit=held_out_blocks))


def random_tokens(vocab: int, batch: int, seq: int, seed: int = 0) -> torch.Tensor:
    """[batch, seq] int64."""
    return torch.randint(0, vocab, (batch, seq), generator=torch.Generator().manual_seed(seed))
