"""The average of several side networks' weights, as a new adapter (Wortsman et al., "Model soups", 2022)."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch


@torch.no_grad()
def add_average(
    tuner, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    """See `QSTModel.add_weighted_adapter`."""
    if combination_type != "linear":
        raise ValueError(
            f"combination_type must be 'linear' for QST, got {combination_type!r}: PEFT's other types combine products of "
            "two matrices. For the average of the outputs (its 'cat'), make several adapters active: set_adapter([...])"
        )
    networks = tuner.stack_layer.networks
    if unknown := [name for name in adapters if name not in networks]:
        raise ValueError(f"adapters must be among {', '.join(map(repr, networks))}, got {unknown[0]!r}")
    if len(weights) != len(adapters) or not adapters or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
        raise ValueError(
            f"weights must be one number for each of {len(adapters)} adapters with a sum of 1, got {weights}"
        )
    if heads := [name for name in adapters if tuner.peft_config[name].modules_to_save]:
        raise ValueError(f"the adapter {heads[0]!r} has modules_to_save, which are not averaged")
    first = networks[adapters[0]]
    for name in adapters[1:]:
        _check_alike(adapters[0], first, name, networks[name])
    config = copy.copy(tuner.peft_config[adapters[0]])
    config.manifest = config.calibration_data = None
    tuner.peft_config[adapter_name] = config
    tuner.inject_adapter(tuner.model, adapter_name)
    sources = [networks[name].state_dict() for name in adapters]
    for key, target in networks[adapter_name].state_dict().items():
        parts = [weight * source[key].float() for weight, source in zip(weights, sources, strict=True)]
        target.copy_(sum(parts))


def _check_alike(first_name: str, first, name: str, network) -> None:
    """Raise for two networks whose weights cannot be averaged."""
    mine, others = first.state_dict(), network.state_dict()
    shapes, other_shapes = ({key: tensor.shape for key, tensor in d.items()} for d in (mine, others))
    if shapes != other_shapes:
        key = next(key for key in [*shapes, *other_shapes] if shapes.get(key) != other_shapes.get(key))
        raise ValueError(
            f"the adapters {first_name!r} and {name!r} differ in shape ({key}: {_shape(shapes, key)} and "
            f"{_shape(other_shapes, key)}): their weights cannot be averaged, their outputs can (set_adapter([...]))"
        )
    for path, module in first.named_modules():
        for part in getattr(module, "fixed_parameters", ()):
            key = f"{path}.{part}"
            if not torch.equal(mine[key], others[key]):
                raise ValueError(
                    f"the adapters {first_name!r} and {name!r} differ in {key!r}, which was fitted and not trained: their "
                    "weights cannot be averaged, their outputs can (set_adapter([...]))"
                )


def _shape(shapes: dict, key: str) -> str:
    return str(list(shapes[key])) if key in shapes else "none"
