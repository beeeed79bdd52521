"""What runs of large models will take, by `hf_qst.plan`: a table of memory, and plans beside what was measured.

    python -m benchmarks.planning                                  # both tables; no weights, no GPU
    python -m benchmarks.planning --parts memory --models 8B 70B
    python -m benchmarks.planning --model FOLDER --method qst --batch 4 --seq 2048 --device 24GB

The measured steps are those of `python -m benchmarks.side_tuning --device cuda` in `benchmarks/results`. With `--model` one
plan is printed and nothing is written.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig
from tqdm.auto import tqdm
from transformers import BitsAndBytesConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig
from transformers.utils import logging as transformers_logging

from benchmarks.common.command_line import as_json, parser_of, require_positive
from benchmarks.common.measure import RESULTS, environment, write_json
from benchmarks.common.tables import markdown
from benchmarks.side_tuning.bases import SHAPES
from benchmarks.side_tuning.methods import LORA_RANK
from hf_qst import DISPConfig, MixedRankConfig, QSTConfig, plan
from hf_qst.planning import cards_for, chip_names

GB = 10**9
OUT = RESULTS / "plan.json"
# The published shapes of Llama 3.2 1B, Llama 3.1 8B and 70B, Qwen3 32B and Qwen3 30B-A3B.
MODELS = {
    "1B": (LlamaConfig, {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    }),
    "8B": (LlamaConfig, {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8,
    }),
    "32B": (Qwen3Config, {
        "vocab_size": 151936, "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    }),
    "70B": (LlamaConfig, {
        "vocab_size": 128256, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    }),
    "30B-A3B": (Qwen3MoeConfig, {
        "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "tie_word_embeddings": False,
    }),
}  # fmt: skip
# LoRA's blocks are alike, so a deep model follows from two shallow ones; a side network's are not.
SHALLOW = (4, 6)
# Attention alone in a mixture, whose experts are no linear layers for PEFT.
_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def lora(model: str = "") -> LoraConfig:
    targets = _ATTENTION if model == "30B-A3B" else "all-linear"
    return LoraConfig(task_type="CAUSAL_LM", r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=targets)


def side(model: str = "") -> QSTConfig:
    return QSTConfig(task_type="CAUSAL_LM")


# Label, configuration, whether the base is checkpointed.
METHODS = {
    "QST": (side, False),
    "QLoRA": (lora, False),
    "QLoRA, checkpointed": (lora, True),
}
# Rows of the side-tuning benchmark.
MEASURED = {
    "qst": (side, False),
    "qst-principal": (lambda: QSTConfig(task_type="CAUSAL_LM", downsample="principal"), False),
    "qst-paper": (lambda: QSTConfig.paper(task_type="CAUSAL_LM"), False),
    "qlora": (lora, False),
    "qlora-ckpt": (lora, True),
}
SINGLE = {
    "qst": side,
    "qlora": lora,
    "lora": lora,
    "full": lambda: "full",
    "disp": lambda: DISPConfig(task_type="CAUSAL_LM"),
    "mixed-rank": MixedRankConfig,
}


def nf4() -> BitsAndBytesConfig:
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def planned(config, method, batch: int, seq: int, checkpointing: bool):
    return plan(
        config, method, batch, seq, "h100", gradient_checkpointing=checkpointing, quantization_config=nf4(),
        quantize_experts="moe" in config.model_type, dtype=torch.bfloat16, search=False,
    )  # fmt: skip


def config_of(model: str, **changes):
    kind, sizes = MODELS[model]
    return kind(**{**sizes, **changes})


def sizes_of(model: str, name: str, tokens: int) -> dict[str, float]:
    """Bytes of a step on one sequence, by what they are for."""
    make, checkpointing = METHODS[name]

    def of(**changes) -> dict:
        return planned(config_of(model, **changes), make(model), 1, tokens, checkpointing).bytes

    if make is side:
        return of()
    few, more = (of(num_hidden_layers=depth) for depth in SHALLOW)
    blocks = (config_of(model).num_hidden_layers - SHALLOW[0]) / (SHALLOW[1] - SHALLOW[0])
    return {kind: few.get(kind, 0) + blocks * (more.get(kind, 0) - few.get(kind, 0)) for kind in {*few, *more}}


def memory(models: list[str], lengths: list[int], rows: list[dict]) -> list[dict]:
    """One sequence a step: bytes of each model, length and method; those in `rows` are not planned again."""
    have = {(row["model"], row["tokens"], row["method"]): row for row in rows}
    wanted = [(model, tokens, name) for model in models for tokens in lengths for name in METHODS]
    for model, tokens, name in tqdm(wanted, desc="plans", unit="run"):
        if (model, tokens, name) not in have:
            sizes = sizes_of(model, name, tokens)
            row = {"model": model, "tokens": tokens, "method": name, "total": sum(sizes.values()), "bytes": sizes}
            have[model, tokens, name] = row | {"fits": cards_for(row["total"])}
    return list(have.values())


def memory_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        cards = [card for card, fits in row["fits"].items() if fits]
        smallest = cards[0] if cards else "none"
        lines.append([row["model"], f"{row['tokens']:,}", row["method"], f"{row['total'] / GB:.1f}", smallest])
    return markdown(["model", "tokens", "method", "GB", "smallest card"], lines, text=1)


def beside(shape: str) -> list[dict]:
    """Plans and measurements of the steps of one shape on an H100."""
    done = json.loads((RESULTS / f"side_tuning_{shape}_nvidia_h100.json").read_text())
    batch, seq = done["arguments"]["batch"], done["arguments"]["seq"]
    rows = []
    for name, (make, checkpointing) in tqdm(MEASURED.items(), desc=shape, unit="run"):
        if name not in done["rows"]:
            continue
        measured = done["rows"][name]
        found = planned(LlamaConfig(**SHAPES[shape].config), make(), batch, seq, checkpointing)
        base = sum(found.bytes.get(k, 0) for k in ("weights", "4-bit weights", "4-bit scales", "buffers"))
        rows.append(
            {
                "shape": shape, "method": measured["label"], "batch": batch, "tokens": seq,
                "kept": [found.kept, measured["saved_with_head"]["forward"]],
                "above_base": [found.total - base, measured["device_bytes"]],
                "file": [found.adapter_file, measured["file_bytes"]],
                "seconds": [found.seconds, measured["fastest_seconds"]],
            }
        )  # fmt: skip
    return rows


def beside_table(rows: list[dict]) -> str:
    lines = []
    for row in rows:
        cells = []
        for key, unit in (("kept", GB), ("above_base", GB), ("file", 10**6), ("seconds", 1e-3)):
            ours, theirs = row[key]
            cells.append(f"{ours / unit:.3g} / {theirs / unit:.3g}")
        lines.append([row["shape"], f"{row['batch']} x {row['tokens']}", row["method"], *cells])
    columns = ["shape", "batch", "method", "kept, GB", "above the base, GB", "file, MB", "ms a step"]
    return markdown(columns, lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("benchmarks.planning", __doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=["memory", "measured"], default=["memory", "measured"], help="tables to print")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="rows of the table of memory")
    add("--lengths", nargs="+", type=int, default=[2048, 8192, 32768], help="tokens of its sequences")
    add("--fresh", action="store_true", help="forget what is in the file")
    add("--output", type=Path, default=OUT, help="file of the results")
    add("--model", help="print the plan of one model: a folder or hub name with a config.json")
    add("--method", choices=SINGLE, default="qst", help="of --model")
    add("--batch", type=int, default=1, help="of --model")
    add("--seq", type=int, default=2048, help="of --model")
    add("--device", default="h100", help=f"of --model: cpu, cuda, a size such as 24GB, {', '.join(chip_names())}")
    add("--inference", action="store_true", help="of --model: a prompt instead of a step")
    add("--checkpointing", action="store_true", help="of --model: gradient checkpointing of the base")
    args = parser.parse_args(argv)
    require_positive(parser, args, ("batch", "seq"))
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    transformers_logging.set_verbosity_error()
    if args.model:
        quantization = nf4() if args.method in ("qst", "qlora") else None
        options = {"inference": args.inference, "gradient_checkpointing": args.checkpointing}
        method = SINGLE[args.method]()
        print(plan(args.model, method, args.batch, args.seq, args.device, quantization_config=quantization, **options))
        return
    known = {} if args.fresh or not args.output.exists() else json.loads(args.output.read_text())
    result = {**known, **environment(torch.device("cpu")), "arguments": as_json(vars(args))}
    if "memory" in args.parts:
        for model in args.models:
            result["memory"] = memory([model], args.lengths, result.get("memory", []))
            write_json(args.output, result)
        print("\n" + memory_table(result["memory"]))
    if "measured" in args.parts:
        result["measured"] = [row for shape in ("llama-2-7b", "llama-3-8b") for row in beside(shape)]
        write_json(args.output, result)
        print("\n" + beside_table(result["measured"]))
    print(f"\nWrote {args.output}")


if __name__ == "__main__":
    main()
