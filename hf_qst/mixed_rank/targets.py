"""Which layers of a model are compressed."""

from __future__ import annotations

import logging
from types import SimpleNamespace

from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from hf_qst.base_model.decoder_stack import UnsupportedArchitectureError
from hf_qst.base_model.encoder_blocks import find_blocks, known_types
from hf_qst.base_model.linear_layers import is_linear
from hf_qst.mixed_rank.layer import LowRankLinear

logger = logging.getLogger(__name__)


def find_targets(model: nn.Module, config) -> list[str]:
    """Full names of the linear layers that `config` names, in the model's own order.

    Raises:
        UnsupportedArchitectureError: all linear layers are asked for, but where the blocks are is not known.
        ValueError: nothing matches, or something is compressed already or shares its weight.
    """
    wanted = config.target_modules
    everything = wanted is None or (isinstance(wanted, str) and wanted.lower() == "all-linear")
    blocks = find_blocks(model)
    if everything and blocks is None:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} is not of a type whose blocks are known ("
            f"{', '.join(known_types())}): name its layers in MixedRankConfig.target_modules"
        )
    compressed = [name for name, module in model.named_modules() if isinstance(module, LowRankLinear)]
    targets = []
    for name, module in model.named_modules():
        if everything and not name.startswith(f"{blocks}."):
            continue
        if not (is_linear(module) or name in compressed) or not matches(config, name, ".*" if everything else wanted):
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
