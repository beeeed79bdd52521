"""A pretrained language model, SmolLM2 unless told otherwise: low rank by method, before and after a short recovery.

Calibration text is Python and English prose in turns, half each: the standard library and the Debian Administrator's
Handbook. What is held out are other files of both. All methods see the same rows, and the peers' ranks are uniform.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common.parts import fill
from benchmarks.compression import llm, speed
from benchmarks.compression.methods import DEFAULT, DISTILLED, METHODS, config, target_shapes
from examples.corpus import blocks, split, stdlib_files, tokens
from examples.demo import nf4
from examples.prose import handbook_files
from hf_qst.base_model import dense_weight, find_blocks
from hf_qst.calibration import SecondMoment, calibration_mode, collect_statistics, input_groups
from hf_qst.mixed_rank import (
    SENSITIVITY_TOKENS,
    CalibrationSet,
    Decomposition,
    LayerSpectrum,
    LowRankLinear,
    Pipeline,
    TargetWeights,
    allocate_ranks,
    factorize,
    fisher_weights,
    installed,
    metric_matrix,
    replace_in_order,
)

LENGTH = 512
BATCH = 4
# Held-out rows in one forward.
EVALUATED = 4
# Part of the handbook's pages that is held out: it is a small book.
HELD_PROSE = 0.15
# Bits of a weight: as models are stored, and in NF4 with its scales (one for 64 weights, themselves in 8 bits).
STORED_BITS, NF4_BITS = 16, 4 + 8 / 64 + 32 / (64 * 256)
SEQUENTIAL = "svd-llm-seq"
DENSE, NF4 = "dense", "nf4"
LABELS = {
    DENSE: "dense",
    NF4: "4 bits (NF4)",
    SEQUENTIAL: "SVD-LLM-style, sequential",
    **{name: method.label for name, method in METHODS.items()},
}
UNIFORM = {"svd": "plain", "asvd": "diagonal", "svd-llm": "second_moment"}
OURS = ("mix-lstsq", "mix-fisher", DEFAULT, *DISTILLED)
ROWS = (*UNIFORM, SEQUENTIAL, *OURS)
# They keep all weights: what the recovery does to them.
WHOLE = (DENSE, NF4)
# Distillation of a model of this size: most steps, one calibration batch each, and the default rate.
KD_STEPS, KD_LEARNING_RATE = 300, 1e-4
# The same recovery for everybody: LoRA on all linear layers of the blocks, their factors where they have some.
RECOVERY = {"rank": 8, "lr": 1e-3, "rows": 2, "length": 256, "most_steps": 200}
# Distillation takes hours on a CPU core.
DEFAULT_METHODS = [method for method in ROWS if method not in DISTILLED]
DEFAULT_ROWS = [
    (keep, method, steps) for steps in (0, 20) for keep in (0.8, 0.6, 0.7, 0.9) for method in DEFAULT_METHODS
]


def row(text: str) -> tuple[float, str, int]:
    """Part kept, method and steps of recovery from KEEP:METHOD[:STEPS]."""
    keep, method, steps = (*text.split(":"), "0")[:3]
    kept = (method in WHOLE and float(keep) == 1) or (method in ROWS and 0 < float(keep) <= 1)
    if not kept or not 0 <= int(steps) <= RECOVERY["most_steps"]:
        raise ValueError(text)
    return float(keep), method, int(steps)


@dataclass
class Text:
    """Batches to calibrate on, rows [n, length] to recover on, code and prose in turns, and held-out rows by kind.

    `choices` are the words of the cloze task: tokens that begin a word of four letters or more.
    """

    calibration: list[dict]
    recovery: torch.Tensor
    held: dict[str, torch.Tensor]
    choices: torch.Tensor


def load_text(model: str | Path, calibration_blocks: int, held_blocks: int, file: Path | None = None) -> Text:
    """The rows of text for a model.

    Args:
        file: a `.npz` file that is read where it is there, and written where it is not.

    Raises:
        ValueError: the file holds other numbers of rows.
    """
    if file is None or not file.exists():
        arrays = _arrays(model, calibration_blocks, held_blocks)
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            np.savez(file, **arrays)
    else:
        with np.load(file) as stored:
            arrays = dict(stored)
    found = {name: torch.from_numpy(array).long() for name, array in arrays.items()}
    calibration, recovery, choices = (found.pop(name) for name in ("calibration", "recovery", "choices"))
    if len(calibration) != calibration_blocks or any(len(rows) > held_blocks for rows in found.values()):
        raise ValueError(
            f"{str(file)!r} holds {len(calibration)} rows of calibration and {[*map(len, found.values())]} held-out ones; "
            f"{calibration_blocks} and at most {held_blocks} of each kind are asked for"
        )
    return Text([{"input_ids": part} for part in calibration.split(BATCH)], recovery, found, choices)


def _arrays(model: str | Path, calibration_blocks: int, held_blocks: int) -> dict[str, np.ndarray]:
    """{calibration [n, 512], recovery [m, 256], choices [k], and held-out rows [<= held_blocks, 512] by kind}, int32."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    kinds = {"code": split(stdlib_files()), "prose": split(handbook_files(), HELD_PROSE)}
    training = {kind: tokens(files, tokenizer) for kind, (files, _) in kinds.items()}
    found = {kind: blocks(tokens(files, tokenizer), LENGTH, held_blocks) for kind, (_, files) in kinds.items()}
    half = RECOVERY["most_steps"] * RECOVERY["rows"] // 2
    found["calibration"] = _in_turns([blocks(ids, LENGTH, calibration_blocks // 2) for ids in training.values()])
    found["recovery"] = _in_turns([blocks(ids, RECOVERY["length"], half) for ids in training.values()])
    # A token that begins a word is marked so, by one of two signs.
    word = lambda token: token[:1] in "Ġ▁" and len(token) > 4 and token[1:].isalpha()
    found["choices"] = torch.tensor(sorted(i for token, i in tokenizer.get_vocab().items() if word(token)))
    return {name: rows.int().numpy() for name, rows in found.items()}


def _in_turns(kinds: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([row for rows in zip(*kinds, strict=True) for row in rows])


@torch.no_grad()
def evaluated(model: nn.Module, text: Text) -> dict:
    """Of each kind of held-out text the losses of the rows in nats per token, the perplexity, and the cloze accuracy.

    Cloze: where a word of the text begins, the model chooses among it and three words of other places of the same text,
    by its logits. They are drawn with a fixed seed and as often as they occur, so that chance and frequency give 25 %.
    """
    losses, accuracy, count = {}, {}, {}
    device = next(model.parameters()).device
    for kind, rows in text.held.items():
        losses[kind], right = [], []
        generator = torch.Generator().manual_seed(0)
        words = rows[torch.isin(rows, text.choices)]
        for part in rows.split(EVALUATED):
            ids = part.to(device)
            every = model(input_ids=ids, use_cache=False).logits.float()
            for row, logits, answers in zip(part, every[:, :-1], ids[:, 1:], strict=True):
                losses[kind].append(F.cross_entropy(logits, answers).item())
                at = torch.isin(row[1:], text.choices).nonzero()[:, 0]
                true = row[1:][at]
                others = words[torch.randint(len(words), (len(at), 3), generator=generator)]
                kept = (others != true[:, None]).all(1)
                offered = torch.cat([true[:, None], others], 1)[kept]
                scores = logits[at[kept].to(device)].gather(1, offered.to(device))
                right.append((scores.argmax(1) == 0).cpu())
        right = torch.cat(right)
        accuracy[kind], count[kind] = right.float().mean().item(), len(right)
    perplexity = {kind: llm.perplexity(parts) for kind, parts in losses.items()}
    return {"losses": losses, "perplexity": perplexity, "cloze": accuracy, "cloze_items": count}


class _RowsSeen(SecondMoment):
    """The second moment of what the compressed model gives a layer."""

    def add_pair(self, rows: torch.Tensor, others: torch.Tensor) -> None:
        self.add(rows)


class _Sequential:
    """Fits the layers of a `Maker` in SVD-LLM's sequential form: W for the inputs it has in the compressed model."""

    def __init__(self, maker: Maker, keep: float):
        self.maker, self.ranks = maker, maker.uniform_ranks(keep)

    def inputs(self, name: str) -> _RowsSeen:
        return _RowsSeen(self.maker.shapes[name][0], self.maker.dense.device)

    def fit(self, group: tuple[str, ...], inputs: _RowsSeen, pool) -> dict[str, nn.Module]:
        moment, weight = inputs.second_moment(), lambda name: dense_weight(self.maker.dense.get_submodule(name))
        return {name: self.maker.layer(name, *factorize(weight(name), self.ranks[name], moment)) for name in group}


class Maker:
    """Makes every method's factors; what does not depend on the part kept is computed once.

    Args:
        dense: the model; left as it is.
        text: what to calibrate on.
        keeps: all parts that will be asked for.
        kd: learning rate and most steps of the distillation.
    """

    def __init__(self, dense: nn.Module, text: Text, keeps: Sequence[float], kd: Mapping):
        self.dense, self.text, self.keeps, self.kd = dense, text, keeps, kd
        self.shapes = target_shapes(dense)
        self.calibration = CalibrationSet(text.calibration, progress=False)
        # What the last distillation measured on calibration batches that it held out.
        self.distillation: dict | None = None
        self._directions: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
        self._sensitivity: dict[str, dict[str, float]] = {}

    def __call__(self, method: str, keep: float) -> dict[str, nn.Module]:
        """The modules that stand in the place of the model's layers, by name."""
        if method in UNIFORM:
            ranks, found = self.uniform_ranks(keep), self.directions(method)
            return {n: self.layer(n, found[n][0][:, :r], found[n][1][:r]) for n, r in ranks.items()}
        return self.sequential(keep) if method == SEQUENTIAL else self.ours(method, keep)

    def layer(self, name: str, left: torch.Tensor, right: torch.Tensor) -> LowRankLinear:
        module = self.dense.get_submodule(name)
        return LowRankLinear.from_factors(left, right, module.bias, False, module.weight.dtype).eval()

    def uniform_ranks(self, keep: float) -> dict[str, int]:
        spectra = [LayerSpectrum(name, *shape, torch.ones(min(shape))) for name, shape in self.shapes.items()]
        budget = int(keep * sum(one.dense_cost for one in spectra))
        return allocate_ranks(spectra, budget, "uniform", rank_multiple=8, allow_dense=False)

    @cached_property
    def statistics(self) -> dict[tuple[str, ...], SecondMoment]:
        names, batches = list(self.shapes), self.calibration.batches
        groups = input_groups(self.dense, names, batches)
        return collect_statistics(self.dense, groups, batches, progress=False)

    def directions(self, method: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """W V [d_in, r] and V' [r, d_out] at the largest rank that is asked for; smaller ranks are the first of these."""
        if method not in self._directions:
            ranks, found = self.uniform_ranks(max(self.keeps)), {}
            metric = UNIFORM[method]
            groups = {(name,): None for name in ranks} if metric == "plain" else self.statistics
            for group, statistic in groups.items():
                moment = metric_matrix(statistic, metric, shrinkage=None)
                for name in group:
                    weight = dense_weight(self.dense.get_submodule(name))
                    factors = factorize(weight, ranks[name], moment, balance=False)
                    found[name] = tuple(factor.float() for factor in factors)
            self._directions = {method: found}  # one method's at a time
        return self._directions[method]

    def sequential(self, keep: float) -> dict[str, nn.Module]:
        """SVD-LLM's sequential form: W for the inputs that the layer has in the compressed model."""
        weights, (blocks,) = self.weights(config("mix-lstsq", keep, [])), find_blocks(self.dense)
        return replace_in_order(weights, blocks, list(self.statistics), self.calibration, _Sequential(self, keep))

    def weights(self, settings) -> TargetWeights:
        return TargetWeights(self.dense, list(self.shapes), settings.resolved(True, self.narrowest))

    @property
    def narrowest(self) -> int:
        return min(min(shape) for shape in self.shapes.values())

    @cached_property
    def layers(self) -> Decomposition:
        """Stage 1, which is the same for every part kept; its layers weigh the same."""
        settings = config("mix-lstsq", self.keeps[0], []).resolved(True, self.narrowest)
        weights = TargetWeights(self.dense, list(self.shapes), settings)
        return Pipeline(weights, settings, self.calibration).decompose()

    def sensitivity(self, method: str) -> dict[str, float]:
        """How much each layer's error counts: Fisher weights of all tokens, of as many as the default takes, or 1."""
        if method not in ("mix-fisher", DEFAULT):
            return dict.fromkeys(self.shapes, 1.0)
        if method not in self._sensitivity:
            seen = self.calibration if method == "mix-fisher" else self.calibration.rows(SENSITIVITY_TOKENS)
            energies = {name: spectrum.total for name, spectrum in self.layers.spectra.items()}
            self._sensitivity[method] = fisher_weights(self.dense, energies, seen.batches, progress=False)
        return self._sensitivity[method]

    def ours(self, method: str, keep: float) -> dict[str, nn.Module]:
        settings = config(method, keep, [])
        if method in DISTILLED:
            settings.compensation = replace(settings.compensation, **self.kd)
        settings = settings.resolved(True, self.narrowest)
        pipeline = Pipeline(TargetWeights(self.dense, list(self.shapes), settings), settings, self.calibration)
        if method in DISTILLED:
            made = pipeline.run()
            self.distillation = made.distillation | {"lr": self.kd["lr"]}
            return made.factors
        for name, weight in self.sensitivity(method).items():
            self.layers.spectra[name].weight = weight
        return pipeline.compensate(self.layers, pipeline.allocate(self.layers))


def block_bits(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int]) -> float:
    """Bits that the weights in the blocks take, stored in 16 bits each."""
    count = sum(ranks[n] * (a + b) if n in ranks else a * b for n, (a, b) in shapes.items())
    return STORED_BITS * count


def in_nf4(model: str | Path, device: torch.device) -> nn.Module:
    """The model with its weights in 4 bits, quantised on the device; the rest is float32."""
    settings = {"quantization_config": nf4(torch.float32), "dtype": torch.float32, "device_map": {"": device}}
    return AutoModelForCausalLM.from_pretrained(model, **settings).eval()


def rows(
    dense,
    model: str | Path,
    text: Text,
    wanted: Sequence[tuple],
    done: dict,
    save: Callable,
    kd_lr: float = KD_LEARNING_RATE,
    kd_steps: int = KD_STEPS,
) -> None:
    """Every method at every part kept, with and without steps of recovery; adds to `done`.

    Args:
        dense: the model on the device that everything runs on.
        model: where it was loaded from.
        wanted: (keep, method, steps of recovery) of each row, in the order in which they are made.
        kd_lr, kd_steps: learning rate and most steps of the distillation.
    """
    keeps = sorted({keep for keep, method, _ in wanted if method not in WHOLE})
    maker = Maker(dense, text, keeps, {"lr": kd_lr, "steps": kd_steps})
    if DENSE not in done:
        done |= {DENSE: {"shapes": maker.shapes, **evaluated(dense, text)}, "rows": []}
        save(done)
    if NF4 not in done:
        done[NF4] = evaluated(in_nf4(model, dense.device), text)
        save(done)
    made: dict[tuple, dict[str, nn.Module]] = {}
    clock = speed.clock_of(dense.device)

    def make(keep: float, method: str, steps: int) -> dict:
        start = clock()
        if method == NF4:
            bits = block_bits(maker.shapes, {}) / STORED_BITS * NF4_BITS
            # Not merged: the sum would have to be rounded to 4 bits again.
            tuned = recovered(in_nf4(model, dense.device), maker.shapes, text, steps) if steps else None
            return {"ranks": {}, "block_bytes": bits / 8} | (done[NF4] if tuned is None else evaluated(tuned, text))
        if (keep, method) not in made:
            made.clear()  # one at a time
            with calibration_mode(dense):
                made[keep, method] = {} if method == DENSE else maker(method, keep)
        modules = made[keep, method]
        facts = {"seconds": clock() - start}
        if method in DISTILLED:
            facts["distillation"] = maker.distillation
        ranks = {name: module.rank for name, module in modules.items()}
        facts |= {"ranks": ranks, "block_bytes": block_bits(maker.shapes, ranks) / 8}
        if steps:
            small = copy.deepcopy(dense)
            for name, module in modules.items():
                small.set_submodule(name, copy.deepcopy(module))
            return facts | evaluated(recovered(small, maker.shapes, text, steps).merge_and_unload(), text)
        with installed(dense, modules):
            return facts | evaluated(dense, text)

    fill(done["rows"], wanted, ("keep", "method", "recovery"), make, lambda: save(done), "pretrained")


def recovered(model: nn.Module, names: Iterable[str], text: Text, steps: int) -> nn.Module:
    """The model after some steps of LoRA on the recovery text; PEFT's model, not merged.

    Args:
        model: changed.
        names: of its layers that are tuned, those that are factorised by their factors.
    """
    halves = lambda name: ("down", "up") if isinstance(model.get_submodule(name), LowRankLinear) else ()
    targets = [target for name in names for target in [f"{name}.{half}" for half in halves(name)] or [name]]
    torch.manual_seed(0)
    lora = LoraConfig(r=RECOVERY["rank"], lora_alpha=2 * RECOVERY["rank"], target_modules=targets)
    device = next(model.parameters()).device
    tuned = get_peft_model(model, lora).train()
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RECOVERY["lr"], weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (steps - step) / steps)
    for part in text.recovery.to(device).split(RECOVERY["rows"])[:steps]:
        tuned(input_ids=part, labels=part, use_cache=False).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return tuned.eval()


def tokens_a_second(dense: nn.Module, done: dict, repeats: int, device: torch.device) -> list[dict]:
    """Prefill and decoding of the dense model and of models with the ranks of the rows, uniform ones and the default's."""
    ranks = {
        f"{row['keep']:g} {row['method']}": row["ranks"]
        for row in done["rows"]
        if row["method"] in ("svd-llm", DEFAULT) and not row["recovery"]
    }
    made = {"dense": dense} | {name: speed.with_ranks(dense, those) for name, those in ranks.items()}
    return speed.models(made, 256, 16, repeats, dense.config.vocab_size, device)
