"""Each layer's error in the compression benchmark, against the best that any factors of its rank can do.

Two questions. For inputs of the dense model: how far are a layer's factors from the closed-form optimum on the data they
were made from, and on new data from the factors that would be best for exactly that data? In the compressed model, where
a layer's inputs are no longer the dense model's: how far is its output from the dense layer's?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from tqdm.auto import tqdm

from benchmarks.compression.methods import DEFAULT, compressed, config, target_shapes
from hf_qst.base_model import dense_weight
from hf_qst.calibration import CalibrationRun, calibration_mode, collect_statistics, hooks, input_groups
from hf_qst.mixed_rank import compress, factorize, output_energies, output_error

STREAM_METHODS = ("svd-llm", "mix", DEFAULT)


def against_optimum(
    model: nn.Module, calibration: Sequence[Mapping], held: Sequence[Mapping], keep: float
) -> list[dict]:
    """One row a layer, of its relative output error E||x (W - A B)||^2 / E||x W||^2 at the rank it is given.

    `calibration_optimum` is the least on the calibration data and `floor` the least on the held-out data, which only
    factors fitted to the held-out data reach.
    """
    small = compress(model, config("mix", keep, calibration))
    names = list(small.factors)
    groups = input_groups(model, names, calibration[0])
    seen, new = (
        collect_statistics(model, groups, data, progress=False, label=label)
        for data, label in ((calibration, "calibration"), (held, "held out"))
    )
    rows = []
    for group in groups:
        before, after = seen[group].second_moment(), new[group].second_moment()
        for name in group:
            weight, rank = dense_weight(model.get_submodule(name)).double(), small.ranks[name]
            lost = weight - small.factors[name].weight.T.double()
            plain = weight - torch.mm(*factorize(weight, rank))
            energies = [output_energies(weight, moment) for moment in (before, after)]
            totals = [energy.sum().item() for energy in energies]
            least = [energy[rank:].sum().item() for energy in energies]
            rows.append(
                {
                    "name": name,
                    "shape": list(weight.shape),
                    "rank": rank,
                    "shrinkage": small.statistics[name]["shrinkage"],
                    "calibration": output_error(lost, before) / totals[0],
                    "calibration_optimum": least[0] / totals[0],
                    "held": output_error(lost, after) / totals[1],
                    "held_plain": output_error(plain, after) / totals[1],
                    "floor": least[1] / totals[1],
                }
            )
    return rows


def in_the_model(
    model: nn.Module, calibration: Sequence[Mapping], held: Sequence[Mapping], keep: float
) -> dict[str, dict[str, float]]:
    """By method and layer: E||y' - y||^2 / E||y||^2 of the layer's output y' in the compressed model, y in the dense one."""
    names = list(target_shapes(model))
    return {
        method: _output_errors(model, compressed(model, method, keep, calibration)[0], names, held)
        for method in tqdm(STREAM_METHODS, desc="errors in the model", unit="method")
    }


def both(model: nn.Module, calibration: Sequence[Mapping], held: Sequence[Mapping], keep: float) -> dict:
    """Each layer by itself, and in the compressed model."""
    return {
        "keep": keep,
        "by_itself": against_optimum(model, calibration, held, keep),
        "in_the_model": in_the_model(model, calibration, held, keep),
    }


def _output_errors(dense: nn.Module, small: nn.Module, names: Sequence[str], batches: Sequence[Mapping]) -> dict:
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in names}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda module, args, output: outputs.__setitem__(name, output)

    def compare(name):
        def hook(module, args, output):
            other = outputs.pop(name)
            sums[name] += torch.stack([(output - other).double().square().sum(), other.double().square().sum()]).cpu()

        return hook

    handles = [dense.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    handles += [small.get_submodule(name).register_forward_hook(compare(name)) for name in names]
    with hooks(handles), calibration_mode(dense), calibration_mode(small):
        for batch in batches:
            for one in (dense, small):
                CalibrationRun(one, names)(batch)
    return {name: (error / energy).item() for name, (error, energy) in sums.items()}
