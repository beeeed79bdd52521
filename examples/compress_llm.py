"""Compress a language model by mixed-rank factors, save the smaller model, load it again in float and in 4 bits.

    python -m examples.compress_llm                      # the project's own base model, a minute or two on one CPU core
    python -m examples.compress_llm --model NAME         # any supported causal language model, by path or hub name

Calibrates on the Python standard library and reports the perplexity on files of it that were held out. For a model and
text of your own, give batches of your own as `calibration_data`: a few hundred blocks like what the model will see.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.corpus import blocks, held_out_loss, split, stdlib_files, tokens
from examples.demo import BASE, complete
from examples.real_model import HELP, model_argument
from hf_qst import MixedRankConfig, rank_report
from hf_qst_plugins.inputs import nf4

PROMPT = "def read_lines(path):"


def report(what: str, model, held: torch.Tensor) -> None:
    """One line: bytes of the tensors and perplexity on the held-out blocks."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    print(f"{what:<12} {size / 1e6:>9.1f} MB, perplexity {math.exp(held_out_loss(model, held)):.2f}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=model_argument, default=str(BASE), help=HELP)
    parser.add_argument("--keep", type=float, default=0.6, help="part of the weights in the blocks to keep")
    parser.add_argument("--calibration-blocks", type=int, default=64, help="blocks to calibrate on")
    parser.add_argument("--held-blocks", type=int, default=64, help="blocks to measure the perplexity on")
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--output", type=Path, default=Path("demo_output/compress_llm"), help="folder of the small model"
    )
    args = parser.parse_args(argv)
    dtype = torch.float32 if args.device == "cpu" else torch.bfloat16

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    training, held_out = split(stdlib_files())
    calibration = blocks(tokens(training, tokenizer), args.length, args.calibration_blocks)
    held = blocks(tokens(held_out, tokenizer), args.length, args.held_blocks)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    report("dense", model, held)

    # Compress: ranks and factors come from one look at the calibration blocks; nothing is trained.
    started = time.perf_counter()
    config = MixedRankConfig(
        keep_ratio=args.keep, calibration_data=[{"input_ids": part} for part in calibration.split(8)]
    )
    small = get_peft_model(model, config).merge_and_unload()
    print(f"Compressed in {time.perf_counter() - started:.0f} s. Ranks of the first layers:")
    for row in rank_report(small)[:7]:
        rank = "dense" if row["rank"] is None else f"rank {row['rank']}"
        print(f"  {row['name']:<40} {row['shape'][0]:>5} x {row['shape'][1]:<5} {rank}")
    report("compressed", small, held)

    # An ordinary model folder; loads with the Auto class after `import hf_qst`.
    small.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    again = AutoModelForCausalLM.from_pretrained(args.output, dtype=dtype).to(args.device).eval()
    report("reloaded", again, held)
    quantized = AutoModelForCausalLM.from_pretrained(
        args.output, quantization_config=nf4(dtype), dtype=dtype, device_map={"": args.device}
    ).eval()
    report("in 4 bits", quantized, held)
    print(f"Wrote {args.output}\n---\n{PROMPT}{complete(again, tokenizer, PROMPT, 32)}\n---")
    with torch.no_grad():
        logits = [one(input_ids=held[:2].to(args.device)).logits for one in (small.eval(), again)]
    if not torch.equal(*logits):
        raise SystemExit("the reloaded model does not give the same outputs")


if __name__ == "__main__":
    main()
