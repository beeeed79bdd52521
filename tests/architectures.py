"""Tiny random models of ten architectures, which the tests of each method use; `tests.tiny_decoders` has all."""

import hashlib

import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from hf_qst import QSTConfig

VOCAB = 96
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _common(*without, **changes):
    return {k: v for k, v in {**_COMMON, **changes}.items() if k not in without}


CONFIGS = {
    "llama": lambda: LlamaConfig(**_common()),
    # An 8-token window, so that generation runs past it.
    "mistral": lambda: MistralConfig(**_common(sliding_window=8)),
    "qwen2": lambda: Qwen2Config(**_common()),
    "qwen3": lambda: Qwen3Config(**_common(head_dim=32)),
    "gemma2": lambda: Gemma2Config(**_common(head_dim=16, sliding_window=8, query_pre_attn_scalar=16)),
    "gemma3_text": lambda: Gemma3TextConfig(**_common(head_dim=16, sliding_window=8, query_pre_attn_scalar=16)),
    "opt": lambda: OPTConfig(
        **_common("intermediate_size", "num_key_value_heads"), ffn_dim=128, word_embed_proj_dim=64, dropout=0.1
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCAB,
        n_embd=64,
        n_layer=3,
        n_head=4,
        n_positions=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
    "phi": lambda: PhiConfig(**_common("num_key_value_heads")),
    "gpt_neox": lambda: GPTNeoXConfig(**_common("num_key_value_heads"), rotary_pct=0.5),
}


def tiny(name: str, seed: int = 0, dtype=torch.float32, classifier: bool = False, **changes):
    """A random model of this type in eval mode; `changes` go to its config."""
    config = CONFIGS[name]()
    config.dtype = dtype
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    # Drawn in float32 by every version of transformers, so that a model in another dtype has the rounded weights.
    model = auto.from_config(config, dtype=torch.float32)
    # The usual 0.02 makes the logits of a tiny model nearly flat, and tests of greedy decoding would compare ties.
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def token_batch(rows: int = 2, length: int = 12, seed: int = 0, low: int = 3) -> torch.Tensor:
    """Random token ids [rows, length], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, VOCAB, (rows, length), generator=generator)


def side_config(**settings) -> QSTConfig:
    """Of a side network a quarter as wide, with a side block for each block of the base."""
    small = {"r": 4, "downsample_rank": 4, "side_every": 1, "readout_rank": 2, "readout_every": 2}
    return QSTConfig(**{"task_type": "CAUSAL_LM", **small, **settings})


def side_tuned(name: str = "llama", *, task_type: str = "CAUSAL_LM", model=None, awake: bool = False, **settings):
    """A PEFT model with a side network a quarter as wide on a tiny base (or on `model`), a side block for each block."""
    if model is None:
        model = tiny(name, classifier=task_type == "SEQ_CLS")
    tuned = get_peft_model(model, side_config(task_type=task_type, **settings))
    return wake(tuned) if awake else tuned


def wake(model, seed: int = 1, scale: float = 0.3):
    """Give every side network of `model` a large say in the output, as after training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in side_layers(model):
            for network in layer.qst_net.values():
                weight = network.upsample.weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
                network.mix.alpha.value.sub_(0.4)
                if network.readout is not None:
                    weight = network.readout.up.weight
                    weight.copy_(torch.randn(weight.shape, generator=generator) * scale)
                for gate in network.gates:
                    gate.value.add_(torch.randn(gate.value.shape, generator=generator) * 0.5)
    return model


def side_layers(model) -> list:
    """The `QSTLayer` of `model`, in a list that is empty when there is none."""
    return [module for module in model.modules() if hasattr(module, "qst_net") and "qst_net" in module._modules]


def side_network(model, name: str = "default"):
    """The side network called `name`."""
    return side_layers(model)[0].qst_net[name]


def digest(module, skip: str = "qst_net") -> str:
    """SHA-256 over the bytes of every parameter and buffer whose name does not contain `skip`.

    4-bit weights count with their scales. bitsandbytes repacks them at the first forward on some processors, so a base
    in 4 bits is compared after one.
    """
    total = hashlib.sha256()
    for name, tensor in [*sorted(module.named_parameters()), *sorted(module.named_buffers())]:
        if skip in name:
            continue
        state = getattr(tensor, "quant_state", None)
        for part in (tensor, *([] if state is None else [state.absmax])):
            total.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


NF4 = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": torch.float32,
}


def in_nf4(directory, name: str = "llama", classifier: bool = False):
    """A tiny model saved to `directory` and loaded from there in double-quantised NF4."""
    tiny(name, classifier=classifier, num_labels=2).save_pretrained(directory)
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    return auto.from_pretrained(directory, quantization_config=BitsAndBytesConfig(**NF4), device_map={"": "cpu"})
