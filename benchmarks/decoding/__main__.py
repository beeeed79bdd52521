"""Is one temperature enough? Ways of sampling code, on the project's own problems and base model.

    python -m examples.code_problems --temperatures            # first: an adapter that knows what a problem looks like
    python -m benchmarks.decoding                              # tunes on half of the problems, reports on the other

Every family of decoders is tuned on one half of the problems, once for pass@1 and once for pass@10, and reported on the
other with the setting that won, in several independent draws. Samples are written as they come; a run that was cut short
goes on where it stopped. Prints tables, writes `benchmarks/results/decoding.json` and a plot.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from pathlib import Path

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.common.command_line import as_json, parser_of, require_positive
from benchmarks.common.measure import RESULTS, ROOT, environment, write_json
from benchmarks.common.plots import pyplot, save_figure
from benchmarks.common.tables import MOST_VALUES, interval, markdown
from benchmarks.decoding.decoders import Decoder, families
from benchmarks.decoding.outcomes import ERRORS, KS, OBJECTIVES, OTHER, failures
from examples.corpus import split, stdlib_files, tokens
from examples.demo import BASE
from hf_qst_plugins.adaptive_temperature import DifficultyProbe, VocabularyTable, fit_difficulty_probe, observe
from hf_qst_plugins.code_evaluation import (
    Report,
    evaluate,
    paired_bootstrap,
    pass_at_k,
    read_problems,
    read_samples,
    training_pairs,
)

PAPER = {
    "CodeGeeX-13B, HumanEval": (36.0, 40.9),
    "InCoder-6B, HumanEval": (32.9, 35.3),
    "CodeGen-2B, MBPP": (47.0, 48.2),
}
"""pass@15 in percent of the best fixed temperature and of the adaptive one, as the paper (arXiv 2309.02772) reports."""


def fitted_probe(model, table: VocabularyTable, tokenizer, path: Path, count: int, seed: int) -> DifficultyProbe:
    """The difficulty probe, fitted on problems of the training grammar the adapter did not see and on held-out code."""
    if path.exists():
        return DifficultyProbe.load(path)
    pairs = training_pairs(count, seed)
    texts = [tokenizer.eos_token + prompt.rstrip() + prompt[len(prompt.rstrip()) :] + code for prompt, code in pairs]
    ids = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    length = model.config.max_position_embeddings
    files = random.Random(seed).sample(split(stdlib_files())[1], 12)
    stream = tokens(files, tokenizer)
    ids += [torch.as_tensor(stream[i * length : (i + 1) * length]) for i in range(min(16, len(stream) // length))]
    random.Random(seed).shuffle(ids)
    probe = fit_difficulty_probe(
        observe(model, table, tqdm(ids, desc="observing tokens", unit="text")), table.tokenizer_hash
    )
    probe.save(path)
    return probe


class Bench:
    """A fine-tuned model, the problems' two halves, and the folder the samples go to."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.model)
        base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(args.device)
        self.model = PeftModel.from_pretrained(base, args.adapter).eval() if args.adapter else base.eval()
        self.table = VocabularyTable.from_tokenizer(self.tokenizer)
        problems = read_problems(args.problems) if args.problems else read_problems()
        # Shuffled: files of problems are often sorted by family or by difficulty.
        random.Random(args.seed).shuffle(problems)
        self.halves = {"tune": problems[0::2][: args.tune_limit], "report": problems[1::2][: args.limit]}

    def run(self, half: str, family: str, decoder: Decoder, samples: int, draws: int = 1) -> list[Report]:
        """One report for each of `draws` independent sets of `samples`; all are drawn in one batch, which is faster."""
        name = "_".join(f"{family} {decoder.label} {half}".replace("=", "").replace(",", "").split())
        path = self.args.work / f"{name}.jsonl"
        if family == "greedy":
            samples = draws = 1
        evaluate(
            self.model,
            self.tokenizer,
            self.halves[half],
            samples=samples * draws,
            generate_kwargs=decoder.kwargs(self.table, self.args.new_tokens),
            out=path,
            label=f"{family} {decoder.label}",
            seed=self.args.seed + (half == "tune"),
            prefix=self.tokenizer.eos_token,
            workers=self.args.workers,
            allow_execution=True,
            progress=False,
        )
        _, drawn = read_samples(path)
        return [Report.of([s for s in drawn if s["sample"] // samples == draw]) for draw in range(draws)]


def tune(bench: Bench, decoders: dict[str, list[Decoder]]) -> dict:
    """pass@k of every setting on the tuning half, and each family's best setting by objective."""
    found = {}
    total = sum(len(settings) for settings in decoders.values())
    with tqdm(total=total, desc="tuning", unit="setting") as bar:
        for family, settings in decoders.items():
            rates = {}
            for decoder in settings:
                (report,) = bench.run("tune", family, decoder, bench.args.tune_samples)
                rates[decoder.label] = dict(report.pass_at_k)
                bar.set_postfix_str(f"{family} {decoder.label}: pass@1 {report.pass_at_k[1]:.3f}")
                bar.update()
            best = {k: max(rates, key=lambda label, k=k: rates[label].get(k, rates[label][1])) for k in OBJECTIVES}
            found[family] = {"rates": rates, "best": best}
    return found


def figures(reports: list[Report]) -> dict:
    """Means over independent draws, each with the half-width of Student's 95 % interval over them."""

    def over_draws(values: list[float]) -> dict:
        return dict(zip(("mean", "plus_minus"), interval(values), strict=True))

    result = {
        f"pass@{k}": over_draws([r.pass_at_k[k] for r in reports]) for k in KS if all(k in r.pass_at_k for r in reports)
    }
    result["parses"] = over_draws([r.parse_rate for r in reports])
    result["distinct"] = over_draws([r.distinct for r in reports])
    shares = [failures(r) for r in reports]
    result |= {name: over_draws([share[name] for share in shares]) for name in shares[0]}
    # All draws' samples of a task together, for the comparison over tasks.
    result["passed"] = {task: sum(r.passed[task] for r in reports) for task in reports[0].passed}
    result["drawn"] = sum(reports[0].drawn.values()) // len(reports[0].drawn) * len(reports)
    return result


def report(bench: Bench, decoders: dict[str, list[Decoder]], tuned: dict) -> list[dict]:
    """One row for each family and each setting of it that won an objective."""
    wanted = [
        (family, next(d for d in decoders[family] if d.label == label))
        for family, found in tuned.items()
        for label in dict.fromkeys(found["best"].values())
    ]
    rows = []
    for family, decoder in tqdm(wanted, desc="reporting", unit="setting"):
        reports = bench.run("report", family, decoder, bench.args.samples, bench.args.draws)
        objectives = [k for k, label in tuned[family]["best"].items() if label == decoder.label]
        rows.append({"family": family, "setting": decoder.label, "tuned_for": objectives, **figures(reports)})
    return rows


def differences(rows: list[dict]) -> list[dict]:
    """Each family against the best fixed temperature, both tuned for the same k, paired over the tasks."""
    compared = []
    for k in OBJECTIVES:
        fixed = next(row for row in rows if row["family"] == "fixed temperature" and k in row["tuned_for"])
        for row in rows:
            if k not in row["tuned_for"] or row is fixed or row["drawn"] != fixed["drawn"] or k > row["drawn"]:
                continue
            tasks = list(fixed["passed"])
            a, b = ([r["passed"][task] for task in tasks] for r in (row, fixed))
            gain = paired_bootstrap(row["drawn"], a, b, k)
            compared.append(
                {"family": row["family"], "setting": row["setting"], "k": k, **gain._asdict()}
                | {"pooled": pass_at_k(row["drawn"], a, k), "fixed": pass_at_k(row["drawn"], b, k)}
            )
    return compared


def _cell(value: dict | None) -> str:
    if value is None:
        return ""
    text = f"{100 * value['mean']:.1f}"
    return text if value["plus_minus"] is None else f"{text} ± {100 * value['plus_minus']:.1f}"


def _points(gain: dict, *names: str) -> str:
    return " to ".join(f"{100 * gain[name]:+.1f}" for name in names)


def tables(result: dict) -> str:
    """Markdown: the rows, the differences, and the paper's figures for reference."""
    columns = [f"pass@{k}" for k in KS] + ["parses", "distinct", *ERRORS, OTHER]
    rows = [
        [row["family"], row["setting"], ", ".join(f"pass@{k}" for k in row["tuned_for"])]
        + [_cell(row.get(column)) for column in columns]
        for row in result["rows"]
    ]
    gains = [
        [
            one["family"],
            one["setting"],
            str(one["k"]),
            *(_points(one, *names) for names in (("mean",), ("low", "high"))),
        ]
        for one in result["differences"]
    ]
    compared = ["k", "pass@k minus the best fixed temperature's, points", "95 % over tasks"]
    lines = [markdown(["decoder", "setting", "tuned for", *columns], rows, text=3), ""]
    lines.append(markdown(["decoder", "setting", *compared], gains, text=2))
    lines += ["", "The paper's own figures, pass@15 in percent, best fixed temperature -> adaptive:"]
    lines += [f"- {name}: {fixed} -> {adaptive}" for name, (fixed, adaptive) in PAPER.items()]
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    """pass@k over k of every reported row."""
    figure, axes = pyplot().subplots(figsize=(8, 5))
    for row in result["rows"]:
        ks = [k for k in KS if f"pass@{k}" in row]
        means = [100 * row[f"pass@{k}"]["mean"] for k in ks]
        spread = [100 * (row[f"pass@{k}"]["plus_minus"] or 0) for k in ks]
        axes.errorbar(ks, means, spread, marker="o", capsize=3, label=f"{row['family']} {row['setting']}")
    axes.set(xlabel="k", ylabel="pass@k, %", title="Held-out half of the problems; bars: 95 % over draws")
    axes.legend(fontsize=6)
    save_figure(figure, path)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = parser_of("benchmarks.decoding", __doc__)
    add = parser.add_argument
    add("--model", default=str(BASE), help="base model: a folder or a hub name")
    add("--adapter", default=str(ROOT / "demo_output" / "code_problems"), help="adapter on it; '' for none")
    add("--problems", help="HumanEval- or MBPP-format JSONL; without it, the project's own problems")
    add("--limit", type=int, help="problems of the half that is reported on")
    add("--tune-limit", type=int, default=30, help="problems of the half that is tuned on")
    add("--families", nargs="+", help="rows; without it, all of them ('fixed temperature' is always among them)")
    add("--samples", type=int, default=15, help="completions of a problem and draw in the report")
    add("--tune-samples", type=int, default=15, help="completions of a problem while tuning")
    add("--draws", type=int, default=3, help="independent draws in the report, at most 10")
    add("--new-tokens", type=int, default=56, help="tokens of a completion at most")
    add("--probe-texts", type=int, default=300, help="training-grammar problems the learned temperature is fitted on")
    add("--workers", type=int, default=1, help="programs executed at a time")
    add("--threads", type=int, default=2, help="CPU threads")
    add("--device", default="cpu", help="cpu or cuda")
    add("--seed", type=int, default=0, help="of the split into halves, the draws and the probe's texts")
    add("--work", type=Path, default=ROOT / "demo_output" / "decoding", help="folder of the samples")
    add("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    counts = ("samples", "tune_samples", "tune_limit", "draws", "new_tokens", "probe_texts", "workers", "threads")
    require_positive(parser, args, counts)
    if args.draws > MOST_VALUES:
        parser.error(f"--draws {args.draws}: give at most {MOST_VALUES}")
    if args.adapter and not (Path(args.adapter) / "adapter_config.json").exists():
        parser.error(f"--adapter {args.adapter}: no adapter there; make one with python -m examples.code_problems")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    started = time.perf_counter()
    args.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(args)
    probe = fitted_probe(
        bench.model, bench.table, bench.tokenizer, args.work / "probe.json", args.probe_texts, args.seed + 1
    )
    decoders = families(probe)
    if args.families:
        unknown = [name for name in args.families if name not in decoders]
        if unknown:
            raise SystemExit(f"--families {unknown}: give some of {', '.join(decoders)}")
        decoders = {n: d for n, d in decoders.items() if n in args.families or n == "fixed temperature"}
    tuned = tune(bench, decoders)
    rows = report(bench, decoders, tuned)
    result = {
        **environment(torch.device(args.device)),
        "arguments": as_json(vars(args)),
        "problems": {half: len(problems) for half, problems in bench.halves.items()},
        "probe": probe.report,
        "tuned": tuned,
        "rows": rows,
        "differences": differences(rows),
        "paper": PAPER,
        "seconds": time.perf_counter() - started,
    }
    write_json(args.out / "decoding.json", result)
    plot(result, args.out / "decoding.png")
    print(tables(result))
    print(
        f"\nprobe, area under the curve: {probe.report['probe']:.3f} (entropy alone {probe.report['entropy']:.3f}, "
        f"position alone {probe.report['position']:.3f})"
    )
    print(f"\n{result['seconds']:.0f} s; written: {args.out / 'decoding.json'}, {args.out / 'decoding.png'}")


if __name__ == "__main__":
    main()
