"""Measure pass@k of a model on a file of problems.

    python -m hf_qst_plugins.code_evaluation --model examples/base_model --prefix '<|endoftext|>' \\
        --out samples.jsonl --allow-execution
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_qst  # noqa: F401  (registers its methods with PEFT, for --adapter)
from hf_qst.saved.whole_files import write_text

from . import GENERATE_DEFAULTS, SHIPPED, Limits, evaluate, read_problems


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hf_qst_plugins.code_evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults, limits = GENERATE_DEFAULTS, Limits()
    parser.add_argument("--model", required=True, help="causal language model: a folder or a hub name")
    parser.add_argument("--adapter", help="folder of a PEFT adapter on it")
    parser.add_argument(
        "--problems", type=Path, default=SHIPPED, help="JSONL or .gz in HumanEval's or MBPP's format (default: shipped)"
    )
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--samples", type=int, default=15, help="completions per problem")
    parser.add_argument("--batch-size", type=int, help="completions drawn at once (default: all of a problem)")
    parser.add_argument("--temperature", type=float, default=defaults["temperature"])
    parser.add_argument("--top-p", type=float, default=defaults["top_p"])
    parser.add_argument("--top-k", type=int, default=defaults["top_k"])
    parser.add_argument("--max-new-tokens", type=int, default=defaults["max_new_tokens"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", help="text that ends a completion; may be given more than once")
    parser.add_argument("--keep-prompt-end", action="store_true", help="keep the whitespace at a prompt's end")
    parser.add_argument("--prefix", default="", help="text before each prompt, such as a begin-of-text token")
    parser.add_argument("--out", type=Path, help="JSONL of the samples; an interrupted run continues there")
    parser.add_argument("--overwrite", action="store_true", help="discard the samples in --out")
    parser.add_argument("--report", type=Path, help="write the figures as JSON")
    parser.add_argument("--workers", type=int, help="programs that run at a time (default: one per processor)")
    parser.add_argument("--wall-seconds", type=int, default=limits.wall_seconds, help="time limit of one program")
    parser.add_argument("--isolation", default="auto", help="auto, namespaces or guard")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--allow-execution", action="store_true", help="execute the completions in a sandbox")
    args = parser.parse_args(argv)

    problems = read_problems(args.problems)[: args.limit]
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    dtype = torch.float32 if args.device == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device)
    if args.adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, args.adapter)
    report = evaluate(
        model,
        tokenizer,
        problems,
        samples=args.samples,
        generate_kwargs={name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "max_new_tokens")},
        out=args.out,
        batch_size=args.batch_size,
        seed=args.seed,
        stop_strings=args.stop,
        strip_prompt=not args.keep_prompt_end,
        prefix=args.prefix,
        limits=Limits(wall_seconds=args.wall_seconds),
        isolation=args.isolation,
        workers=args.workers,
        overwrite=args.overwrite,
        label=args.adapter or "",
        allow_execution=args.allow_execution,
    )
    print(report.summary())
    if args.report:
        args.report.parent.mkdir(parents=True, exist_ok=True)
        write_text(str(args.report), json.dumps(report.as_dict(), indent=1) + "\n")


if __name__ == "__main__":
    main()
