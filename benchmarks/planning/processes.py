"""What the processes of a training exchange in a step, by `hf_qst.plan`: no weights, no GPU, nothing measured.

    python -m benchmarks.planning.processes
    python -m benchmarks.planning.processes --models 8B --processes 8

One sequence of 2,048 tokens in each process; the bytes do not depend on its length. Sizes are what each process receives.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from benchmarks.common.command_line import as_json, parser_of
from benchmarks.common.measure import RESULTS, environment, write_json
from benchmarks.common.tables import markdown
from benchmarks.planning.__main__ import GB, MODELS, config_of, lora, nf4
from hf_qst import DISPConfig, QSTConfig, plan

OUT = RESULTS / "processes.json"
# Label, configuration, whether the base is in 4 bits.
METHODS = {
    "QST": (lambda model: QSTConfig(task_type="CAUSAL_LM"), False),
    "QST, NF4": (lambda model: QSTConfig(task_type="CAUSAL_LM"), True),
    "LoRA": (lora, False),
    "QLoRA": (lora, True),
    "DISP": (lambda model: DISPConfig(task_type="CAUSAL_LM"), False),
    "all parameters": (lambda model: "full", False),
}


def rows_of(models: list[str], processes: list[int]) -> list[dict]:
    """Bytes for each model, method and number of processes."""
    rows = []
    for model, name in tqdm([(model, name) for model in models for name in METHODS], desc="plans", unit="run"):
        make, four_bits = METHODS[name]
        found = plan(
            config_of(model), make(model), 1, 2048, "h100", quantization_config=nf4() if four_bits else None,
            dtype=torch.bfloat16, search=False,
        )  # fmt: skip
        trained = found.parameters["trained"]
        for count in processes:
            received = found.communication(count)
            rows.append({"model": model, "method": name, "processes": count, "trained": trained, **received})
    return rows


def table(rows: list[dict]) -> str:
    columns = ["model", "method", "trained, millions", "processes", "DDP or ZeRO-2, GB a step", "FSDP2, GB a step"]
    cells = [
        [row["model"], row["method"], f"{row['trained'] / 1e6:,.1f}", str(row["processes"]), f"{row['ddp'] / GB:.3f}",
         f"{row['fsdp2'] / GB:.1f}"]
        for row in rows
    ]  # fmt: skip
    return markdown(columns, cells, text=2)


def main(argv: list[str] | None = None) -> None:
    parser: argparse.ArgumentParser = parser_of("benchmarks.planning.processes", __doc__)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["8B", "70B"])
    parser.add_argument("--processes", nargs="+", type=int, default=[8, 128])
    parser.add_argument("--output", type=Path, default=OUT, help="file of the results")
    args = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    rows = rows_of(args.models, args.processes)
    write_json(args.output, {**environment(torch.device("cpu")), "arguments": as_json(vars(args)), "rows": rows})
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
