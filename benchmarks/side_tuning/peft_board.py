"""Side tuning for PEFT's method comparison (`method_comparison/MetaMathQA` of its repository): experiments and rows.

    python -m benchmarks.side_tuning.peft_board --output build/peft_board

- `experiments/qst/NAME/` has the two files that its runner takes, for the board's own task: a 3B model, MetaMathQA, GSM8K,
  on a GPU. The runner must import hf_qst first:
  `python -c "import hf_qst, runpy, sys; sys.argv[:] = ['run.py', '-v', 'experiments/qst/NAME']; runpy.run_path('run.py', run_name='__main__')"`
- `results/` has the runs of `side_tuning_real_model.json` on SmolLM2 in the form of the board's rows, ours and those of PEFT's
  methods. What these runs did not measure is null. They are of other tasks, so they are no submission; the script prints
  which fields one still needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from peft import PeftConfig

from benchmarks.common.command_line import parser_of
from benchmarks.common.measure import RESULTS
from benchmarks.side_tuning.real_model import PEERS, VARIANTS
from benchmarks.side_tuning.real_model_report import best_runs
from hf_qst import QSTConfig
from hf_qst.saved import write_text

EXPERIMENTS = {
    "llama-3.2-3B-default": (QSTConfig(), {"optimizer_kwargs": {"lr": 2e-3, "weight_decay": 0.0}}),
    "llama-3.2-3B-nf4": (QSTConfig(), {"optimizer_kwargs": {"lr": 2e-3, "weight_decay": 0.0}, "dtype": "int4"}),
    "llama-3.2-3B-tail_8": (QSTConfig(tail_layers=8), {"optimizer_kwargs": {"lr": 1e-3, "weight_decay": 0.0}}),
}
"""The board's experiments: the method's configuration, and what differs from the board's own training parameters."""
_REQUIRED = {
    "run_info": ("created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config"),
    "train_info": (
        "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time",
        "file_size", "num_trainable_params", "num_total_params", "status", "metrics",
    ),
    "metrics": ("test accuracy", "train loss", "train samples", "train total tokens", "forgetting"),
}  # fmt: skip


def row(result: dict, task: str, run: dict) -> dict:
    """A run in the form of a row of the board."""
    kind, steps = task.rsplit(", ", 1)
    base, versions = result["tasks"][task]["base"], result["versions"]
    accuracy = run.get("accuracy")
    config = VARIANTS.get(run["method"]) or PEERS[run["method"]](result["layers"])
    return {
        "run_info": {
            "created_at": None,
            "total_time": None,
            "experiment_name": f"{_type(config).lower()}/{result['model']}-{kind}-{run['method']}",
            "peft_branch": None,
            "train_config": {
                "model_id": result["model"],
                "max_steps": int(steps),
                "seed": run["seed"],
                "optimizer_type": "AdamW",
                "optimizer_kwargs": {"lr": run["rate"], "weight_decay": 0.0},
                "lr_scheduler": "linear",
                "grad_norm_clip": 1.0,
            },
            "peft_config": config.to_dict(),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": None,
            "accelerator_memory_reserved_99th": None,
            "train_time": run["seconds_per_step"] * int(steps),
            "file_size": None,
            "num_trainable_params": run["parameters"],
            "num_total_params": None,
            "status": "success",
            "metrics": [
                {
                    "step": int(steps),
                    "test accuracy": None if accuracy is None else accuracy / 100,
                    "test loss": run["loss"],
                    "train loss": None,
                    "train samples": None,
                    "train total tokens": None,
                    "forgetting": run["old_loss"] - base["old_loss"],
                }
            ],
        },
        "meta_info": {
            "package_info": {f"{name}-version": version for name, version in versions.items()},
            "system_info": result["machine"],
        },
    }


def _type(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def rows(result: dict) -> Iterator[dict]:
    """Each of PEFT's methods and ours on each task at its best rate, with its first seed."""
    for task, measured in result["tasks"].items():
        for name, runs in best_runs(measured["runs"]).items():
            if name in VARIANTS or PEERS[name](result["layers"]) is not None:
                yield row(result, task, min(runs, key=lambda run: run["seed"]))


def missing(found: dict) -> list[str]:
    """Fields of a row that the board reads and that are null."""
    parts = {**found, "metrics": found["train_info"]["metrics"][-1]}
    return [f"{part}: {name}" for part, names in _REQUIRED.items() for name in names if parts[part][name] is None]


def main(argv: list[str] | None = None) -> None:
    parser = parser_of("benchmarks.side_tuning.peft_board", __doc__)
    parser.add_argument("--results", type=Path, default=RESULTS / "side_tuning_real_model.json")
    parser.add_argument("--layers", type=int, default=30, help="blocks of the model of these results")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    args = parser.parse_args(argv)
    for name, (config, training) in EXPERIMENTS.items():
        folder = args.output / "experiments" / "qst" / name
        config.save_pretrained(folder)
        (folder / "README.md").unlink()  # a card is of an adapter, and there is none yet
        write_text(folder / "training_params.json", json.dumps(training, indent=2) + "\n")
    (args.output / "results").mkdir(parents=True, exist_ok=True)
    lacking: set[str] = set()
    for found in rows(json.loads(args.results.read_text()) | {"layers": args.layers}):
        run, figures = found["run_info"], found["train_info"]
        name = f"{run['experiment_name']} {run['train_config']['max_steps']}".replace("/", "--").replace(" ", "_")
        write_text(args.output / "results" / f"{name}.json", json.dumps(found, indent=2, default=_plain) + "\n")
        last = figures["metrics"][-1]
        print(
            f"{name}: {figures['num_trainable_params']:,} parameters, {figures['train_time']:.0f} s, test loss "
            f"{last['test loss']:.3f}, forgetting {last['forgetting']:+.3f}"
        )
        lacking |= set(missing(found))
    print("A submission needs a run of the experiments with the board's runner, which also measures:")
    print("\n".join(f"- {name}" for name in sorted(lacking)))


def _plain(value: object) -> object:
    return sorted(value) if isinstance(value, set) else str(value)


if __name__ == "__main__":
    main()
