"""Which layers of a model are compressed."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from hf_qst.base_model.budget import BudgetError
from hf_qst.base_model.decoder_stack import UnsupportedArchitectureError
from hf_qst.base_model.encoder_blocks import find_blocks, known_types, stays_out
from hf_qst.base_model.experts import expert_shapes, fused_experts, put_back, split
from hf_qst.base_model.linear_layers import dense_shape, is_linear
from hf_qst.mixed_rank.layer import LowRankLinear

logger = logging.getLogger(__name__)


def find_targets(model: nn.Module, config) -> list[str]:
    """Full names of the linear layers that `config` names, in the model's own order; those of experts as if they were split.

    Raises:
        UnsupportedArchitectureError: all linear layers are asked for, but where the blocks are is not known.
        ValueError: nothing matches, or something is compressed already or shares its weight.
    """
    with experts_split(model, config):
        return _find(model, config)


def _find(model: nn.Module, config) -> list[str]:
    wanted = config.target_modules
    is_wanted = _rule(model, config)
    compressed = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    targets = []
    for name, module in model.named_modules():
        if not (is_linear(module) or name in compressed) or not is_wanted(name):
            continue
        if any(name == other or name.startswith(f"{other}.") for other in compressed):
            raise ValueError(f"MixedRankConfig.target_modules: {name!r} is compressed already")
        targets.append(name)
    if not targets:
        raise ValueError(
            f"MixedRankConfig.target_modules={wanted!r} with exclude_modules={config.exclude_modules!r} matches no "
            f"linear layer of {type(model).__name__}"
        )
    _refuse_outside(model, targets)
    _refuse_shared(model, targets)
    _name_what_is_left_out(model)
    return targets


@contextmanager
def experts_split(model: nn.Module, config) -> Iterator[None]:
    """The experts some of whose layers `config` names as linear layers for a while, in the reference model too."""
    reference = config.residual and config.residual.reference_model
    fused = fused_experts(model)
    is_wanted = _rule(model, config) if fused else None
    paths = [path for path, one in fused.items() if any(is_wanted(f"{path}.{name}") for name in expert_shapes(one))]
    models = [model] if reference is None else [model, reference]
    taken = [split(one, [path for path in paths if path in fused_experts(one)]) for one in models]
    try:
        yield
    finally:
        for one, experts in zip(models, taken, strict=True):
            put_back(one, experts)


def _is_everything(config) -> bool:
    wanted = config.target_modules
    return wanted is None or (isinstance(wanted, str) and wanted.lower() == "all-linear")


def _rule(model: nn.Module, config) -> Callable[[str], bool]:
    """Whether a layer's name is one of those that `config` asks for."""
    if not _is_everything(config):
        return lambda name: bool(matches(config, name, config.target_modules))
    blocks = tuple(f"{path}." for path in find_blocks(model))
    if not blocks:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} is not of a type whose blocks are known ("
            f"{', '.join(known_types())}): name its layers in MixedRankConfig.target_modules"
        )
    return lambda name: name.startswith(blocks) and stays_out(model, name) is None and bool(matches(config, name, ".*"))


def require_reach(model: nn.Module, targets: list[str], config) -> None:
    """Refuse a budget that the model's blocks as a whole cannot meet, whatever becomes of the targets.

    It is not asked of layers that the caller named or left out, and matrices alone count.

    Raises:
        BudgetError: naming what is out of reach.
    """
    if not _is_everything(config) or config.exclude_modules or config.residual:
        return
    blocks = tuple(f"{path}." for path in find_blocks(model))
    own = {f"{name}.weight" for name in targets}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.dim() > 1}
    outside = {name: size for name, size in sizes.items() if name.startswith(blocks) and name not in own}
    reached = sum(size for size in (math.prod(dense_shape(model.get_submodule(name))) for name in targets))
    total, left = reached + sum(outside.values()), sum(outside.values())
    if left <= config.keep_ratio * total:
        return
    largest = max(outside, key=outside.get)
    raise BudgetError(
        f"MixedRankConfig.keep_ratio={config.keep_ratio} cannot be met in the blocks of {type(model).__name__}: {left} of "
        f"their {total} parameters in matrices ({left / total:.1%}) are out of reach, such as {largest!r} of "
        f"{list(model.get_parameter(largest).shape)}. Name the layers in target_modules to compress these alone, for which "
        "keep_ratio then counts",
        left,
    )


def matches(config, name: str, target_modules):
    """PEFT's answer to whether a module's name is one of `target_modules` and not left out."""
    return check_target_module_exists(
        SimpleNamespace(
            target_modules=target_modules,
            exclude_modules=config.exclude_modules,
            modules_to_save=config.modules_to_save,
            target_parameters=None,
        ),
        name,
    )


def _refuse_outside(model: nn.Module, names: list[str]) -> None:
    """The saved form of a compressed model describes changed modules by their path in the backbone."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return
    for name in names:
        if not name.startswith(f"{model.base_model_prefix}."):
            raise ValueError(
                f"MixedRankConfig.target_modules: {name!r} lies outside {model.base_model_prefix!r}; only layers of "
                "the backbone can be compressed"
            )


def _refuse_shared(model: nn.Module, names: list[str]) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for name in names:
        shared = owners[id(model.get_submodule(name).weight)]
        if len(shared) > 1:
            raise ValueError(
                f"MixedRankConfig.target_modules: {name!r} shares its weight ({' = '.join(shared)}) and cannot be "
                "compressed; leave it out, or load the model with tie_word_embeddings=False"
            )


def _name_what_is_left_out(model: nn.Module) -> None:
    experts = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if "expert" in f"{path} {type(module).__name__}".lower()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    ]
    if experts:
        logger.warning(
            "%d three-dimensional weights (stacked experts, such as %s) are not compressed", len(experts), experts[0]
        )
