"""How much of a mixture of experts mixed rank and DISP reach, and what its weights take in 4 bits.

The models are built at their real shapes on the meta device, from the sizes that their authors published. The bytes in
4 bits are counted by `four_bit_bytes`, which is compared with the bytes of a tiny model that was really quantised.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from benchmarks.common.command_line import parser_of
from benchmarks.common.measure import RESULTS, environment, write_json
from hf_qst import MixedRankConfig, quantize_experts
from hf_qst.base_model import expert_shapes, find_blocks, find_decoder_stack, fused_experts, stored_bytes
from hf_qst.mixed_rank import find_targets
from hf_qst.pruning import PruningLayout

RESULT = RESULTS / "compression_mixtures.json"
SHAPES = {
    "Mixtral 8x7B": lambda: MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8,
    ),
    "Qwen3-30B-A3B": lambda: Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    ),
    "gpt-oss-20b": lambda: GptOssConfig(
        vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, num_local_experts=32,
    ),
    "DeepSeek-V3": lambda: DeepseekV3Config(
        vocab_size=129280, hidden_size=7168, intermediate_size=18432, moe_intermediate_size=2048, num_hidden_layers=61,
        num_attention_heads=128, num_key_value_heads=128, n_routed_experts=256, n_shared_experts=1,
        first_k_dense_replace=3,
    ),
    "Qwen3-Next 80B-A3B": lambda: Qwen3NextConfig(
        vocab_size=151936, hidden_size=2048, moe_intermediate_size=512, shared_expert_intermediate_size=512,
        num_hidden_layers=48, num_attention_heads=16, num_key_value_heads=2, head_dim=256, num_experts=512,
        num_experts_per_tok=10, linear_num_value_heads=32, linear_num_key_heads=16,
    ),
}  # fmt: skip
_TINY = MixtralConfig(
    vocab_size=96, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4,
)  # fmt: skip
# Of one quantised matrix besides its values and scales: two tables of codes, the mean scale and a description.
_TABLES = 16 * 4 + 256 * 4 + 4
_BF16 = 2


def four_bit_bytes(weights: int, matrices: int) -> float:
    """Bytes of matrices with so many weights in NF4: 4 bits each, 8 for each 64 (its scale), 32 for 256 scales."""
    return weights * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + matrices * _TABLES


def reach(model: PreTrainedModel) -> dict[str, float]:
    """Parameters of a model, of the matrices in its blocks, and of those that mixed rank compresses by default."""
    names, experts = set(find_targets(model, MixedRankConfig())), 0
    for path, fused in fused_experts(model).items():
        experts += sum(
            d_in * d_out for name, (d_in, d_out) in expert_shapes(fused).items() if f"{path}.{name}" in names
        )
    targets = {name: module.weight.numel() for name, module in model.named_modules() if name in names}
    blocks = tuple(f"{path}." for path in find_blocks(model))
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and n.startswith(blocks))
    total, reached = sum(p.numel() for p in model.parameters()), sum(targets.values()) + experts
    return {
        "parameters": total,
        "in_experts": experts,
        "reached": reached,
        "part_of_model": reached / total,
        "part_of_blocks": reached / matrices,
        "part_of_model_without_experts": (reached - experts) / total,
    }


def prunable(model: PreTrainedModel) -> float:
    """The part of the parameters of its blocks that go with a channel that DISP can leave out."""
    layout = PruningLayout.of(find_decoder_stack(model))
    return 1 - sum(block.fixed for block in layout.blocks) / layout.total


def sizes(model: PreTrainedModel) -> dict[str, float]:
    """Bytes of a model in bfloat16, as transformers loads it in 4 bits, and with its experts in 4 bits as well."""
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings()
    plain = [m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    shapes = [shape for one in fused_experts(model).values() for shape in expert_shapes(one).values()]
    experts = sum(d_in * d_out for d_in, d_out in shapes)
    linear = four_bit_bytes(sum(plain), len(plain))
    loaded = _BF16 * (total - sum(plain)) + linear
    ours = loaded - _BF16 * experts + four_bit_bytes(experts, len(shapes))
    return {"bfloat16": _BF16 * total, "load_in_4bit": loaded, "quantize_experts": ours}


def check() -> dict[str, float]:
    """What the experts of a tiny model take, predicted and measured."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(_TINY, dtype=torch.bfloat16)
    shapes = [shape for one in fused_experts(model).values() for shape in expert_shapes(one).values()]
    weights, before = sum(d_in * d_out for d_in, d_out in shapes), stored_bytes(model)
    predicted = before - _BF16 * weights + four_bit_bytes(weights, len(shapes))
    return {"before": before, "predicted": predicted, "measured": stored_bytes(quantize_experts(model))}


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def table(found: dict) -> str:
    rows = [
        "| model | parameters | mixed rank reaches | of the blocks' matrices | without experts | DISP reaches of the blocks | "
        "bf16 | `load_in_4bit` | `quantize_experts` |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, one in found["models"].items():
        gigabytes = " | ".join(f"{one['bytes'][key] / 1e9:.1f} GB" for key in one["bytes"])
        known = one["reach"]
        rows.append(
            f"| {name} | {known['parameters'] / 1e9:.1f}B | {known['part_of_model']:.1%} | {known['part_of_blocks']:.2%} | "
            f"{known['part_of_model_without_experts']:.1%} | {one['pruned_part_of_blocks']:.2%} | {gigabytes} |"
        )
    tiny = found["tiny"]
    rows.append(
        f"\nA tiny Mixtral, really quantised: {tiny['measured']} bytes, predicted {tiny['predicted']:.0f}, "
        f"{tiny['before']} before."
    )
    return "\n".join(rows)


def main(arguments: list[str] | None = None) -> None:
    parser: argparse.ArgumentParser = parser_of("benchmarks.compression.mixtures", __doc__)
    parser.add_argument("--output", type=Path, default=RESULT, help="JSON file of the results")
    options = parser.parse_args(arguments)
    models = {}
    for name, config in SHAPES.items():
        model = on_meta(config())
        models[name] = {"reach": reach(model), "pruned_part_of_blocks": prunable(model), "bytes": sizes(model)}
    found = {"environment": environment(torch.device("cpu")), "models": models, "tiny": check()}
    write_json(options.output, found)
    print(table(found))


if __name__ == "__main__":
    main()
