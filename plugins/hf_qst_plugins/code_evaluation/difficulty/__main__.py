"""Table and plot of which tokens of Python files a model finds hard to predict.

python -m hf_qst_plugins.code_evaluation.difficulty --model examples/base_model --files some/package --output difficulty
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_qst.extras import require

from . import measure_difficulty


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="causal language model: a folder or a hub name")
    parser.add_argument("--files", type=Path, nargs="+", required=True, help="Python files, or folders of them")
    parser.add_argument("--limit", type=int, help="only the first so many files")
    parser.add_argument("--context", type=int, help="the most tokens that a prediction sees")
    parser.add_argument("--output", type=Path, required=True, help="folder for the table and the plot")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    require("matplotlib", "--output")  # before the model runs
    paths = [path for root in args.files for path in (sorted(root.rglob("*.py")) if root.is_dir() else [root])]
    files = [(str(path), path.read_text(encoding="utf-8", errors="replace")) for path in paths[: args.limit]]
    dtype = torch.float32 if args.device == "cpu" else "auto"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype).to(args.device).eval()
    table = measure_difficulty(model, AutoTokenizer.from_pretrained(args.model), files, args.context)
    print(table.markdown())
    for path in table.save(args.output):
        print(f"Wrote {path}")


if __name__ == "__main__":
    main()
