"""The weights that factors are made for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_qst.base_model.disk_weights import DiskWeights
from hf_qst.base_model.linear_layers import dense_shape, dense_weight, float_dtype, is_linear
from hf_qst.base_model.quantized_layers import scheme_of
from hf_qst.mixed_rank.layer import LowRankLinear, MixedRankLayer
from hf_qst.mixed_rank.quantization import quantize_factors


class TargetWeights:
    """The weights that factors are made for: the model's own, or what it has lost against a dense reference.

    Args:
        model: with the layers that are compressed.
        names: of these layers.
        settings ([`MixedRankConfig`]): resolved.
        on_disk (*optional*): where the model's weights come from, a block at a time, and where the factors go.

    Raises:
        ValueError: a weight is not finite, or the reference model does not fit.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], settings, on_disk: DiskWeights | None = None):
        self.model, self.names, self.settings, self.on_disk = model, list(names), settings, on_disk
        self.residual = settings.residual is not None
        self.reference = _reference(model, settings.residual.reference_model, names) if self.residual else model
        for name in names if on_disk is None else ():  # those are checked when they come in
            if not torch.isfinite(self.dense(name)).all():
                raise ValueError(f"the weight of {name!r} holds NaN or infinite values and cannot be compressed")

    def in_turn(self, names: Iterable[str]) -> Iterator[str]:
        """The names one by one, each while its weight is in memory."""
        return iter(names) if self.on_disk is None else self.on_disk.in_turn(names)

    def put_away(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """The modules that stand for layers, by name, when no more is to be done to them for now."""
        if self.on_disk is not None:
            self.on_disk.put_away(modules)
        return modules

    def forget(self) -> None:
        """What was put away is not needed any more."""
        if self.on_disk is not None:
            self.on_disk.forget()

    def dense(self, name: str) -> torch.Tensor:
        """W [d_in, d_out] of the dense layer."""
        return dense_weight(self.reference.get_submodule(name))

    def kept(self, name: str) -> torch.Tensor | None:
        """The weight [d_in, d_out] that factors are added to, where they are."""
        return dense_weight(self.model.get_submodule(name)).to(self.dense(name).device) if self.residual else None

    def replaced(self, name: str) -> torch.Tensor:
        """What the factors stand for [d_in, d_out]."""
        kept = self.kept(name)
        return self.dense(name) if kept is None else self.dense(name).double() - kept.double()

    def centred(self, name: str) -> bool:
        """Whether a layer's mean output is left to its bias."""
        return self.settings.decomposition.bias_correction and self.model.get_submodule(name).bias is not None

    def layer(
        self,
        name: str,
        left: torch.Tensor,
        right: torch.Tensor,
        quantized: bool = True,
        shift: torch.Tensor | None = None,
    ) -> LowRankLinear:
        """Factors A, B as a module on the device of the layer they are for, with its bias plus `shift` [d_out]."""
        module = self.model.get_submodule(name)
        device = module.weight.device
        bias = None if self.residual else module.bias
        if shift is not None:
            bias = bias.detach().double() + shift.to(device)
        layer = LowRankLinear.from_factors(
            left.to(device), right.to(device), bias, isinstance(module, Conv1D), float_dtype(module)
        )
        return (self.quantize(layer) if quantized else layer).train(module.training)

    def quantize(self, layer: LowRankLinear) -> LowRankLinear:
        """In place, where that is asked for."""
        scheme = self.settings.quantize_factors
        return layer if scheme is None else quantize_factors(layer, scheme)

    def in_place(self, name: str, layer: LowRankLinear) -> nn.Module:
        """What stands in the model where `name` is: a residual runs with the layer it is added to."""
        return MixedRankLayer("residual", layer, self.model.get_submodule(name)) if self.residual else layer


def _reference(model: nn.Module, reference: nn.Module | None, names: Sequence[str]) -> nn.Module:
    if not isinstance(reference, nn.Module):
        raise ValueError(
            "MixedRankConfig.residual needs reference_model, the dense model with the same layers, got "
            f"{type(reference).__name__}"
        )
    for name in names:
        try:
            module = reference.get_submodule(name)
        except AttributeError:
            module = None
        if module is None or not is_linear(module) or dense_shape(module) != dense_shape(model.get_submodule(name)):
            actual = (
                f"{list(dense_shape(module))}" if module is not None and is_linear(module) else type(module).__name__
            )
            raise ValueError(
                f"MixedRankConfig.residual.reference_model must have a linear layer {name!r} of "
                f"{list(dense_shape(model.get_submodule(name)))} ([d_in, d_out]), found {actual}"
            )
        if scheme_of(module) is not None:
            raise ValueError(
                f"MixedRankConfig.residual.reference_model must have the dense weight of {name!r}, found it in "
                f"{scheme_of(module)}; load the reference without quantization_config"
            )
    return reference
