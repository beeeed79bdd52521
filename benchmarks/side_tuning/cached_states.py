"""A training step on stored hidden states, next to QST and QLoRA that run the base, and next to its own arithmetic.

    python -m benchmarks.side_tuning.cached_states                       # ~100M parameters, a vocabulary of 8k
    python -m benchmarks.side_tuning.cached_states --model smollm2       # its head of 49k tokens weighs more

Each way of storing is filled, then trained for two passes over the same batches with and without the cache, and the losses
are compared. Then one step of each method is timed in turn: QLoRA, QST without a cache, QST with one, the arithmetic of
that step alone (side network, head, backward pass and optimiser on states that lie in memory), and reading a batch. Writes
`benchmarks/results/side_cached_<shape>.json`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
import transformers
from peft import get_peft_model
from torch import nn
from transformers import AutoTokenizer

from benchmarks.common.command_line import as_json, parser_of, require_positive
from benchmarks.common.measure import RESULTS, environment, write_json
from benchmarks.common.tables import markdown, verdict
from benchmarks.common.timing import in_turns, paired_ratio, processor_clock
from benchmarks.side_tuning import bases
from benchmarks.side_tuning.methods import MAX_GRAD_NORM, METHODS, Method, Run
from benchmarks.side_tuning.tasks import TASKS
from examples.real_model import HELP, model_argument
from hf_qst import QSTConfig
from hf_qst.qst import HiddenStateCacheConfig, Taps, fill_hidden_state_cache, hidden_state_cache, set_hidden_state_cache
from hf_qst_kernels import dequantize_taps, linear_cross_entropy, quantize_taps

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Variant:
    """A configuration of QST, and how its states are stored."""

    label: str
    storage: str
    settings: dict


NARROW = {"downsample": "principal", "readout_rank": 0}
VARIANTS = {
    "full": Variant("default", "full", {}),
    "int8": Variant("default", "int8", {}),
    "narrow": Variant("principal, no readout", "full", NARROW),
    "narrow-int8": Variant("principal, no readout", "int8", NARROW),
}


def make_run(variant: Variant, base: nn.Module, calibration: list[dict], seed: int, rate: float = 1e-3) -> Run:
    """A `Run` of the variant without a cache."""
    data = {"calibration_data": calibration} if variant.settings.get("downsample") == "principal" else {}

    def make(base: nn.Module, _):
        return get_peft_model(base, QSTConfig(task_type="CAUSAL_LM", **variant.settings, **data))

    return Run(Method(variant.label, make, rate), bases.copy_of(base), CPU, calibration, seed=seed)


class Arithmetic:
    """The step of a run from states that lie in memory, as they are."""

    def __init__(self, run: Run, ids: torch.Tensor):
        self.run, self.ids = run, ids
        self.layer = run.model.base_model.model.model
        self.network = self.layer.active_network()
        self.head = run.model.get_output_embeddings().weight.detach()
        self.read: dict[int, tuple] = {}
        with torch.no_grad(), self.layer.tape.using(self):
            self.output = self.layer.base_layer(input_ids=ids, use_cache=False)[0]

    def reads(self, index: int) -> bool:
        return index in self.network.read_blocks

    def replaced(self, index: int, entering: torch.Tensor) -> None:
        return None

    def record(self, index: int, entering: torch.Tensor, leaving: torch.Tensor, context) -> None:
        """What the side network reads of a block: its output, or the reading of a downsampler without trained weights."""
        network, tapped = self.network, None
        whole = network.readout is not None and network.readout.weight(index) is not None
        if index in network.places and hasattr(network.downsample[0], "directions") and not whole:
            tapped = network.downsample[network.places.index(index)].tap(leaving)
        self.read[index] = entering, leaving, context, tapped

    def step(self) -> None:
        run, network, taps = self.run, self.network, Taps()
        for index, (entering, leaving, context, tapped) in self.read.items():
            context.side_tables = {}
            network.record(taps, index, entering, leaving, context, tapped)
        hidden = network.mix(self.output, network(taps))
        labels = nn.functional.pad(self.ids, (0, 1), value=-100)[..., 1:]
        linear_cross_entropy(hidden, self.head, labels).backward()
        nn.utils.clip_grad_norm_(run.trainable, MAX_GRAD_NORM)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)


def losses(run: Run, batches: list[torch.Tensor], passes: int = 2) -> list[float]:
    """The loss of each training step."""
    found = []
    for ids in batches * passes:
        loss = run.loss(ids)
        loss.backward()
        nn.utils.clip_grad_norm_(run.trainable, MAX_GRAD_NORM)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        found.append(loss.item())
    return found


def _corrected(state: torch.Tensor) -> torch.Tensor:
    first = dequantize_taps(*quantize_taps(state))
    return first + dequantize_taps(*quantize_taps(state - first))


LAST_STATE: dict[str, tuple[float, Callable]] = {
    "float32": (4.0, lambda state: state),
    "bfloat16": (2.0, lambda state: state.bfloat16().float()),
    "int8": (1 + 4 / 64, lambda state: dequantize_taps(*quantize_taps(state))),
    "int8, and int8 of the rest": (2 + 8 / 64, _corrected),
}
"""How the last state can be stored: bytes a channel, and what comes back."""


@torch.no_grad()
def last_state(base: nn.Module, batches: list[torch.Tensor]) -> dict:
    """Of each way to store the state before the final norm: the base's loss, and its error in parts of it."""
    base, result = base.eval(), {}
    norm = base.get_decoder().norm
    for name, (size, store) in LAST_STATE.items():
        handle = norm.register_forward_pre_hook(lambda _, args, store=store: (store(args[0]), *args[1:]))
        found = [base(input_ids=ids, labels=ids, use_cache=False).loss.item() for ids in batches]
        handle.remove()
        loss = sum(found) / len(found)
        exact = result["float32"]["loss"] if result else loss
        result[name] = {"bytes_per_token": size * base.config.hidden_size, "loss": loss, "error": loss / exact - 1}
    return result


def measure(base: nn.Module, batches: list[torch.Tensor], args: argparse.Namespace) -> dict:
    """Everything about one base."""
    calibration = [{"input_ids": ids} for ids in batches[:2]]
    rows, calls = {}, {}
    qlora = Run(METHODS["qlora"], bases.copy_of(base), CPU, calibration, seed=args.seed)
    turn = cycle(batches)
    calls["qlora"] = lambda: qlora.step(next(turn))
    folders = []
    for name in args.variants:
        variant = VARIANTS[name]
        folders.append(tempfile.TemporaryDirectory(dir=args.folder))
        plain = make_run(variant, base, calibration, args.seed, args.rate)
        run = make_run(variant, base, calibration, args.seed, args.rate)
        set_hidden_state_cache(run.model, HiddenStateCacheConfig(folders[-1].name, variant.storage))
        report = fill_hidden_state_cache(run.model, [{"input_ids": ids} for ids in batches])
        pairs = list(zip(losses(plain, batches), losses(run, batches), strict=True))
        if hidden_state_cache(run.model).counts.missing:
            raise RuntimeError("a filled cache had to compute examples")
        rows[name] = {
            "label": variant.label,
            "storage": variant.storage,
            "bytes_per_token": report.bytes_per_token,
            "break_even_epochs": report.break_even_epochs,
            "fill_seconds_per_1000_tokens": 1000 * report.seconds / report.tokens,
            "losses": pairs,
            "largest_loss_difference": max(abs(a - b) for a, b in pairs),
            "largest_loss_error": max(abs(b / a - 1) for a, b in pairs),
        }
        arithmetic = Arithmetic(plain, batches[0])
        turn_of = cycle(batches)
        calls |= {
            f"{name} plain": lambda run=plain, turn=turn_of: run.step(next(turn)),
            f"{name} cached": lambda run=run, turn=turn_of: run.step(next(turn)),
            f"{name} arithmetic": arithmetic.step,
            f"{name} read": lambda run=run, turn=turn_of: read(run, next(turn)),
        }
    times = in_turns(calls, args.repeats, CPU, clock=processor_clock)
    for name, row in rows.items():
        row["seconds"] = {what: median(times[f"{name} {what}"]) for what in ("plain", "cached", "arithmetic", "read")}
        row["of_arithmetic"] = paired_ratio(times, f"{name} cached", f"{name} arithmetic")
        row["read_of_arithmetic"] = paired_ratio(times, f"{name} read", f"{name} arithmetic")
        row["faster_than_plain"] = paired_ratio(times, f"{name} plain", f"{name} cached")
        row["faster_than_qlora"] = paired_ratio(times, "qlora", f"{name} cached")
    for folder in folders:
        folder.cleanup()
    return {"qlora_seconds": median(times["qlora"]), "rows": rows, "times": times}


@torch.no_grad()
def read(run: Run, ids: torch.Tensor) -> None:
    """All stored tensors of a batch, from the files to float32."""
    layer = run.model.base_model.model.model
    states = hidden_state_cache(run.model).stored(layer, layer.active_network(), {"input_ids": ids, "use_cache": False})
    for name in states.plan.names:
        states.tensor(name, torch.float32, CPU)


def targets(shape: str, rows: dict) -> list[list[str]]:
    """The aims and what was reached: what, target, reached, verdict."""
    lines = []

    def add(what: str, sense: str, target: float, reached: float) -> None:
        holds = reached >= target if sense == ">=" else reached <= target
        lines.append(
            [what, f"{sense} {target:g}", f"{reached:.2g}" if target < 1 else f"{reached:.2f}", verdict(holds)]
        )

    for name, row in rows.items():
        if row["storage"] == "full":
            add(f"{name}: largest difference of a loss", "<=", 1e-5, row["largest_loss_difference"])
        else:
            add(f"{name}: largest error of a loss", "<=", 5e-3, row["largest_loss_error"])
        add(f"{name}: cached step / its arithmetic", "<=", 1.2, row["of_arithmetic"])
        add(f"{name}: reading / arithmetic", "<=", 1.0, row["read_of_arithmetic"])
        if shape == "100m":
            add(f"{name}: QLoRA / cached step", ">=", 8.0, row["faster_than_qlora"])
            add(f"{name}: QST / cached step", ">=", 4.0, row["faster_than_plain"])
    return lines


def table(result: dict) -> str:
    """The result as text."""
    lines = []
    for row in result["rows"].values():
        seconds = row["seconds"]
        lines.append(
            [
                f"{row['label']}, {row['storage']}",
                f"{row['bytes_per_token']:,.0f}",
                *(f"{seconds[what] * 1e3:.0f}" for what in ("cached", "arithmetic", "read", "plain")),
                f"{row['of_arithmetic']:.2f}",
                f"{row['faster_than_plain']:.1f}",
                f"{row['faster_than_qlora']:.1f}",
                f"{row['largest_loss_error']:.1e}",
                f"{row['break_even_epochs']:.2f}",
            ]
        )
    columns = ["stored for", "bytes a token", "cached ms", "arithmetic ms", "read ms", "QST ms", "of arithmetic"]
    columns += ["times QST", "times QLoRA", "loss error", "pays after epochs"]
    last = [
        [name, f"{row['bytes_per_token']:,.0f}", f"{row['loss']:.5f}", f"{row['error']:.1e}"]
        for name, row in result["last_state"].items()
    ]
    goals = markdown(["to reach", "target", "reached", ""], targets(result["shape"], result["rows"]))
    return "\n\n".join(
        [
            f"{result['shape']}: {len(result['batches'])} batches of {result['batches'][0]}; QLoRA {result['qlora_seconds'] * 1e3:.0f} ms",
            markdown(columns, lines),
            markdown(["the last state", "bytes a token", "loss", "error"], last),
            goals,
        ]
    )


def main(argv: list[str] | None = None) -> None:
    parser = parser_of("benchmarks.side_tuning.cached_states", __doc__)
    add = parser.add_argument
    add("--shape", choices=("100m", "tiny"), default="100m", help="random base to measure on")
    add("--model", type=model_argument, help=f"in place of --shape: {HELP}")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="what is stored, and how")
    add("--batches", type=int, default=6, help="batches of two rows of 256 tokens")
    add("--repeats", type=int, default=7, help="timed rounds")
    add("--threads", type=int, default=1, help="CPU threads")
    add("--rate", type=float, default=1e-3, help="learning rate of the losses that are compared")
    add("--seed", type=int, default=0)
    add("--folder", type=Path, help="where the caches lie meanwhile (default: the system's folder for temporary files)")
    add("--output", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    require_positive(parser, args, ("batches", "repeats", "threads"))
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()

    shape = args.shape if args.model is None else Path(args.model).name.partition("-")[0]
    if args.model is None:
        settings = bases.SHAPES[args.shape]
        base = bases.load_base(args.shape, None, CPU, packed=False, seed=args.seed)
        rows = bases.random_tokens(base.config.vocab_size, settings.batch * args.batches, settings.seq, args.seed)
        batches = list(rows.split(settings.batch))
    else:
        base = bases.load_base("demo", args.model, CPU, packed=False)
        task = TASKS["prose"](AutoTokenizer.from_pretrained(args.model), args.batches, args.seed)
        batches = [batch.ids for batch in task.train]
    result = {**environment(CPU), "arguments": as_json(vars(args)), "shape": shape}
    result["batches"] = [list(ids.shape) for ids in batches]
    result |= measure(base, batches, args)
    result["last_state"] = last_state(base, batches)
    path = args.output / f"side_cached_{shape}.json"
    write_json(path, result)
    print(f"\n{table(result)}\n\nwritten: {path}")


if __name__ == "__main__":
    main()
