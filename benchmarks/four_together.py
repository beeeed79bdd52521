"""The four methods on one pretrained model: pruned, put in 4 bits, tuned through a side network, sampled adaptively.

    python -m benchmarks.four_together                         # hours on a CPU core; goes on where it stopped
    python -m benchmarks.four_together --stages-only           # the stages, no samples
    python -m benchmarks.four_together --device cuda --rows 1024
    python -m benchmarks.four_together --report-only           # executes what was sampled; the tables

After each stage: bytes, held-out loss on both kinds of text, tokens a second. DISP prunes the blocks and QST tunes the
result in NF4, both on the same Python and prose; the dense model in NF4, without and with the same tuning, is the
comparison. Then the dense and the last model sample HumanEval at one temperature and adaptively. Everything is float32
where it is not in 4 bits. Figures go to `benchmarks/results/four_together.json` as they come; models and samples stay in
`--models` and `--work`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils import logging as transformers_logging

from benchmarks.common.command_line import as_json, parser_of, require_device, require_positive
from benchmarks.common.measure import RESULTS, environment, write_json
from benchmarks.common.tables import markdown
from benchmarks.common.timing import in_turns, processor_clock
from benchmarks.decoding.halves import COLUMNS, rates, setting_row, solved
from benchmarks.decoding.humaneval import humaneval_file
from benchmarks.pruning.methods import LEARNING_RATE, Schedule, train
from benchmarks.pruning.text import python_and_prose_other
from examples.corpus import cache_folder, held_out_loss
from examples.real_model import HELP, model_argument
from hf_qst import AdaptiveTemperatureLogitsProcessor, DISPCallback, DISPConfig, QSTConfig
from hf_qst.base_model import forbid_packing
from hf_qst_plugins.code_evaluation import (
    Problem,
    evaluate_together,
    judge_samples,
    read_problems,
    read_report,
    read_samples,
)
from hf_qst_plugins.inputs import nf4

DENSE, PRUNED, PRUNED_NF4, ALL = "dense", "pruned", "pruned, NF4", "pruned, NF4, QST"
NF4, NF4_QST = "NF4", "NF4, QST"
SAMPLED = {DENSE: "dense", ALL: "all"}
"""The models that sample, and the folders of their samples."""


def stored_bytes(model: nn.Module) -> int:
    """Bytes of the state dict, of a tied weight once; 4-bit weights count with their scales."""
    tensors = {tensor.data_ptr(): tensor for tensor in model.state_dict().values() if tensor.numel()}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def clock_of(args: argparse.Namespace) -> Callable[[], float]:
    """The clock of all times. On one CPU thread it is the processor's, so other processes on the core lengthen them less."""
    return processor_clock if args.device == "cpu" else time.perf_counter


class Stages:
    """The models of the stages, each made once and kept in the folder `--models`."""

    def __init__(self, args: argparse.Namespace, rows: torch.Tensor):
        self.args, self.rows = args, rows

    def of(self, name: str) -> tuple[nn.Module, dict]:
        """The model, and what making it took."""
        args = self.args
        if name == DENSE:
            return self._loaded(args.model, None), {}
        if name == PRUNED:
            return self._pruned()
        base = args.model if name in (NF4, NF4_QST) else str(args.models / "pruned")
        model = self._loaded(base, nf4(torch.float32))
        forbid_packing(model)
        return self._tuned(model, name) if name in (NF4_QST, ALL) else (model, {})

    def _loaded(self, folder: str, quantization) -> nn.Module:
        # bitsandbytes quantises where the weights are, so they are loaded onto the device.
        where = {"device_map": {"": self.args.device}, "quantization_config": quantization} if quantization else {}
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
        return (model if quantization else model.to(self.args.device)).eval()

    def _pruned(self) -> tuple[nn.Module, dict]:
        args, folder = self.args, self.args.models / "pruned"
        if (folder / "config.json").exists():
            return self._loaded(str(folder), None), {}
        set_seed(args.seed)
        multiple = args.width_multiple
        config = DISPConfig(task_type="CAUSAL_LM", keep_ratio=args.keep, width_multiple=multiple, seed=args.seed)
        model = get_peft_model(self._loaded(args.model, None), config)
        recipe = {"weight_decay": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0}
        schedule = Schedule(self.rows, args.disp_steps, args.batch)
        seconds = self._trained(model, schedule, [DISPCallback(progress=False)], LEARNING_RATE, recipe)
        small = model.merge_and_unload().eval()
        small.save_pretrained(folder)
        AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)
        return small, {"steps": args.disp_steps, "seconds": seconds}

    def _tuned(self, base: nn.Module, name: str) -> tuple[nn.Module, dict]:
        args, folder = self.args, self.args.models / ("side_of_pruned" if name == ALL else "side_of_dense")
        if (folder / "adapter_config.json").exists():
            return PeftModel.from_pretrained(base, folder).eval(), {}
        set_seed(args.seed)
        model = get_peft_model(base, QSTConfig(task_type="CAUSAL_LM"))
        recipe = {"lr_scheduler_type": "linear", "warmup_steps": max(1, args.tune_steps // 20)}
        seconds = self._trained(model, Schedule(self.rows, args.tune_steps, args.batch), [], args.rate, recipe)
        model.save_pretrained(folder)
        return model.eval(), {"steps": args.tune_steps, "seconds": seconds}

    def _trained(self, model: nn.Module, schedule: Schedule, callbacks: list, rate: float, recipe: dict) -> float:
        clock = clock_of(self.args)
        start = clock()
        train(model, schedule, self.args.seed, callbacks, learning_rate=rate, **recipe)
        return clock() - start


@torch.no_grad()
def speed(model: nn.Module, args: argparse.Namespace, processors: list) -> dict:
    """Tokens a second of all rows together: reading a prompt, and sampling after a short one."""
    device = torch.device(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(model.config.vocab_size, (args.speed_rows, args.length), generator=generator).to(device)
    start = {"input_ids": ids[:, :8], "attention_mask": torch.ones_like(ids[:, :8]), "pad_token_id": 0}
    length = {"min_new_tokens": args.speed_tokens, "max_new_tokens": args.speed_tokens}
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, **length}
    times = in_turns(
        {
            "prefill": lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1),
            "decode": lambda: model.generate(**start, **plain),
            "decode_adaptive": lambda: model.generate(**start, **plain, logits_processor=processors),
        },
        args.repeats,
        device,
        clock=clock_of(args),
    )
    new = args.speed_rows * args.speed_tokens
    counts = {"prefill": ids.numel(), "decode": new, "decode_adaptive": new}
    return {name: counts[name] / median(found) for name, found in times.items()}


def sample(model: nn.Module, tokenizer, name: str, args: argparse.Namespace, problems: list[Problem]) -> None:
    """Draw completions of the problems at one temperature and adaptively; they are executed later."""
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.95, "max_new_tokens": args.new_tokens}
    adaptive = AdaptiveTemperatureLogitsProcessor(tokenizer, preset="humaneval")
    settings = {
        "fixed": {**plain, "temperature": args.temperature},
        "adaptive": {**plain, "logits_processor": [adaptive]},
    }
    folder = args.work / "samples" / SAMPLED[name]
    evaluate_together(
        model, tokenizer, problems, settings, folder, args.samples, args.rows, seed=args.seed, judge=False
    )


def pass_rates(args: argparse.Namespace, problems: list[Problem]) -> Iterator[dict]:
    """Figures of the complete samples, which are executed first."""
    for name, folder in SAMPLED.items():
        for setting in ("fixed", "adaptive"):
            path = args.work / "samples" / folder / f"{setting}.jsonl"
            if not path.exists() or len(read_samples(path)[1]) < args.samples * len(problems):
                continue
            judge_samples([path], problems, workers=args.workers, allow_execution=True)
            yield setting_row(name, setting, read_report(path))


def tables(result: dict) -> str:
    """Markdown: the stages, then the samples."""
    lines = []
    for name, row in result["stages"].items():
        perplexities = [f"{math.exp(loss):.2f}" for loss in row["loss"].values()]
        speeds = [f"{value:,.0f}" for value in row["speed"].values()]
        made = [str(row.get("steps", "")), f"{row['seconds']:.0f}" if "seconds" in row else ""]
        lines.append([name, f"{row['bytes'] / 1e6:.1f}", *perplexities, *speeds, *made])
    kinds = [f"perplexity, {kind}" for kind in next(iter(result["stages"].values()))["loss"]]
    head = ["", "MB", *kinds, "prefill, tokens/s", "decode", "decode, adaptive", "steps", "seconds of them"]
    parts = [markdown(head, lines)]
    if result["samples"]:
        rows = [[row["family"], row["setting"], *rates(row), solved(row)] for row in result["samples"]]
        parts.append(markdown(["model", "temperature", *COLUMNS, "problems"], rows, text=2))
    return "\n\n".join(parts)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("benchmarks.four_together", __doc__)
    add = parser.add_argument
    add("--model", type=model_argument, default="smollm2", help=HELP)
    add("--problems", type=humaneval_file, default="humaneval", help="'humaneval', or a JSONL file in its format")
    add("--limit", type=int, help="only the first so many problems")
    add("--keep", type=float, default=0.8, help="part of the weights in the blocks that is kept")
    add(
        "--width-multiple",
        type=int,
        default=64,
        help="of the pruned widths; bitsandbytes is slow with odd ones on a CPU",
    )
    add("--disp-steps", type=int, default=120, help="steps of learning what to prune")
    add("--tune-steps", type=int, default=120, help="steps of each side tuning")
    add("--rate", type=float, default=2e-3, help="learning rate of the side tuning")
    add("--batch", type=int, default=4, help="rows a step")
    add("--length", type=int, default=256, help="tokens a row")
    add("--training-rows", type=int, default=2048, help="rows to train on, half of them Python")
    add("--held", type=int, default=32, help="held-out rows of each kind of text")
    add("--samples", type=int, default=5, help="completions of a problem")
    add("--temperature", type=float, default=0.6, help="the fixed temperature")
    add("--new-tokens", type=int, default=128, help="tokens of a completion at most")
    add("--rows", type=int, default=90, help="rows of a batch of completions")
    add("--speed-rows", type=int, default=16, help="rows of the timed calls")
    add("--speed-tokens", type=int, default=32, help="tokens written in a timed call")
    add("--repeats", type=int, default=3, help="timed rounds")
    add("--workers", type=int, default=1, help="programs executed at a time")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--seed", type=int, default=0)
    add("--stages-only", action="store_true", help="sample nothing")
    add("--sample-only", action="store_true", help="execute no completion")
    add("--report-only", action="store_true", help="make no model, execute and report what is there")
    add("--work", type=Path, default=cache_folder() / "four_together", help="folder of the samples")
    add("--models", type=Path, help="folder of the pruned model and the adapters (default: --work)")
    add("--output", type=Path, default=RESULTS / "four_together.json", help="file of the results")
    args = parser.parse_args(argv)
    counts = ("limit", "width_multiple", "disp_steps", "tune_steps", "rate", "batch", "length", "training_rows", "held")
    counts += ("samples", "temperature", "new_tokens", "rows", "speed_rows", "speed_tokens", "repeats", "workers")
    counts += ("threads",)
    require_positive(parser, args, counts)
    require_device(parser, args)
    args.models = args.models or args.work
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    args.work.mkdir(parents=True, exist_ok=True)
    problems = read_problems(args.problems)[: args.limit]
    result = {"stages": {}, "samples": []}
    with contextlib.suppress(FileNotFoundError):
        result = json.loads(args.output.read_text())
    if not args.report_only:
        result |= {**environment(torch.device(args.device)), "arguments": as_json(vars(args))}
        text, rows = python_and_prose_other(args.model, args.length, args.training_rows, args.batch, args.held)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        stages = Stages(args, rows)
        for name in (DENSE, PRUNED, PRUNED_NF4, ALL, NF4, NF4_QST):
            if name in result["stages"]:
                continue
            model, made = stages.of(name)
            losses = {kind: held_out_loss(model, held, args.batch) for kind, held in text.held.items()}
            speeds = speed(model, args, [AdaptiveTemperatureLogitsProcessor(tokenizer)])
            result["stages"][name] = {"bytes": stored_bytes(model), "loss": losses, "speed": speeds, **made}
            write_json(args.output, result)
            print(f"{name}: {result['stages'][name]}", flush=True)
        for name in () if args.stages_only else SAMPLED:
            sample(stages.of(name)[0], tokenizer, name, args, problems)
    if not args.sample_only:
        result["samples"] = list(pass_rates(args, problems))
        write_json(args.output, result)
    print(f"\n{tables(result)}\n\nwritten: {args.output}")


if __name__ == "__main__":
    main()
