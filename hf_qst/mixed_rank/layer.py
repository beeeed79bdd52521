"""The layer that stands in the place of a dense one, and the PEFT layer that holds it while it is an adapter."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_qst.linear_layers import dense_shape, dense_weight, empty_linear, float_dtype, set_weights
from hf_qst.packed_weights import forbid_packing
from hf_qst.reshaped_models import ReshapedModelError

KIND = "low_rank"
# bitsandbytes' packed layout of 4-bit weights on CPU fails for widths that are no multiple of it.
_PACKED_BLOCK = 64


class LowRankLinear(nn.Module):
    """y = (x A) B + b, with A [d_in, rank] and B [rank, d_out]: a linear layer of a lower rank.

    The factors are the weights of two linear layers, `down` and `up`, so that what knows linear layers (quantisation on
    loading, LoRA) knows them. A B is never formed in forward.

    Args:
        in_features, out_features, rank (`int`): sizes.
        bias (`bool`): whether there is a bias.
        conv1d (`bool`): whether the dense layer was a `Conv1D`, which `to_dense` gives back.
        device, dtype: of the parameters, which are not initialised.
    """

    def __init__(self, in_features, out_features, rank, bias=True, conv1d=False, device=None, dtype=None):
        super().__init__()
        self.in_features, self.out_features, self.rank, self.conv1d = in_features, out_features, rank, conv1d
        # Made on the meta device: the usual initialisation would draw random numbers.
        self.down = nn.Linear(in_features, rank, bias=False, device="meta", dtype=dtype)
        self.up = nn.Linear(rank, out_features, bias=bias, device="meta", dtype=dtype)
        device = torch.get_default_device() if device is None else torch.device(device)
        if device.type != "meta":
            self.to_empty(device=device)

    @classmethod
    def from_factors(cls, left, right, bias=None, conv1d=False, dtype=None) -> LowRankLinear:
        """The layer of these factors.

        Args:
            left: A [d_in, rank].
            right: B [rank, d_out].
            bias: [d_out], or None.
        """
        layer = cls(left.shape[0], right.shape[1], left.shape[1], bias is not None, conv1d, left.device, dtype)
        with torch.no_grad():
            layer.down.weight.copy_(left.T)
            layer.up.weight.copy_(right.T)
            if bias is not None:
                layer.up.bias.copy_(bias)
        return layer

    def describe(self) -> dict:
        """What the layer is, as JSON-ready data; `from_description` makes an empty one of it."""
        return {
            "kind": KIND,
            "rank": self.rank,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.up.bias is not None,
            "shared": None,
        }

    @classmethod
    def from_description(cls, dense_module: nn.Module, description: dict) -> LowRankLinear:
        """An empty layer in the place of a dense one, on its device and in its dtype.

        Raises:
            ReshapedModelError: the description is not one of `describe`, or of a layer of another shape.
        """
        if description.get("kind") != KIND:
            raise ReshapedModelError(
                f"description of a low-rank layer must have kind {KIND!r}, got {description.get('kind')!r}"
            )
        shape = dense_shape(dense_module)
        described = description.get("in_features", shape[0]), description.get("out_features", shape[1])
        if described != shape:
            raise ReshapedModelError(
                f"a layer described as {list(described)} cannot replace one of {list(shape)} ([d_in, d_out])"
            )
        rank = description.get("rank")
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= min(shape):
            raise ReshapedModelError(f"rank of a {list(shape)} layer must be from 1 to {min(shape)}, got {rank!r}")
        bias = description.get("bias", dense_module.bias is not None)
        conv1d = isinstance(dense_module, Conv1D)
        return cls(*shape, rank, bias, conv1d, dense_module.weight.device, float_dtype(dense_module))

    @property
    def weight(self) -> torch.Tensor:
        """The product as the dense layer would hold it: [d_out, d_in], or [d_in, d_out] of a `Conv1D`."""
        if not self.down.weight.is_floating_point():
            product = (dense_weight(self.down) @ dense_weight(self.up)).T
        else:
            product = self.up.weight @ self.down.weight
        return product.T if self.conv1d else product

    @property
    def bias(self) -> torch.Tensor | None:
        return self.up.bias

    def requires_grad_(self, requires_grad: bool = True) -> LowRankLinear:
        """As of any module; quantised factors do not train."""
        for parameter in self.parameters():
            if parameter.is_floating_point():
                parameter.requires_grad_(requires_grad)
        return self

    def to_dense(self) -> nn.Module:
        """A dense layer with the same outputs."""
        weight = self.weight.detach()
        shape = self.in_features, self.out_features
        dense = empty_linear(*shape, self.bias is not None, self.conv1d, weight.dtype, weight.device)
        set_weights(dense, weight if self.conv1d else weight.T, self.bias)
        dense.weight.requires_grad_(self.down.weight.requires_grad)
        if self.bias is not None:
            dense.bias.requires_grad_(self.bias.requires_grad)
        return dense

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """[..., d_in] -> [..., d_out]"""
        weight = self.down.weight
        if self.rank % _PACKED_BLOCK and getattr(self.down, "support_avx512bf16_for_cpu", False):
            forbid_packing(self)
        if not weight.is_floating_point():
            # A quantised layer takes any dtype, but bitsandbytes' 8-bit one not any number of dimensions.
            return self.up(self.down(inputs.reshape(-1, self.in_features))).view(*inputs.shape[:-1], self.out_features)
        # The dense layer may have been quantised and have taken any dtype; autocast brings its own.
        if inputs.dtype != weight.dtype and not torch.is_autocast_enabled(inputs.device.type):
            return self.up(self.down(inputs.to(weight.dtype))).to(inputs.dtype)
        return self.up(self.down(inputs))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class MixedRankLayer(nn.Module, BaseTunerLayer):
    """Holds the factors of one layer as a PEFT adapter, under the adapter's name.

    Usually they stand in the place of the dense layer, which is gone: there is nothing to go back to. As a residual
    they are added to a layer that stays.

    Args:
        adapter_name (`str`)
        factors ([`LowRankLinear`])
        base_layer: the layer they are added to, or None.
    """

    adapter_layer_names = ("mixed_rank_factors",)
    other_param_names = ()

    def __init__(self, adapter_name: str, factors: LowRankLinear, base_layer: nn.Module | None = None):
        super().__init__()
        if base_layer is not None:
            self.base_layer = base_layer
        self.mixed_rank_factors = nn.ModuleDict({adapter_name: factors})
        self.in_features, self.out_features = factors.in_features, factors.out_features
        self.merged_adapters = []
        self._disable_adapters = False
        self._active_adapter = [adapter_name]

    @property
    def is_residual(self) -> bool:
        return "base_layer" in self._modules

    @property
    def factors(self) -> LowRankLinear:
        return next(iter(self.mixed_rank_factors.values()))

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight if self.is_residual else self.factors.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return (self.base_layer if self.is_residual else self.factors).bias

    # PEFT's own two would ask quantised weights for gradients.
    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, factors in self.mixed_rank_factors.items():
            factors.requires_grad_(name in names and not inference_mode)
        self._active_adapter = names

    def set_requires_grad(self, adapter_names: str | list[str], requires_grad: bool = True) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in names:
            if name in self.mixed_rank_factors:
                self.mixed_rank_factors[name].requires_grad_(requires_grad)

    def enable_adapters(self, enabled: bool) -> None:
        if not enabled and not self.is_residual:
            raise NoDenseWeightsError("switched off")
        super().enable_adapters(enabled)

    def merge(self, safe_merge: bool = False, adapter_names=None) -> None:
        self._refuse("merged in place")

    def unmerge(self) -> None:
        self._refuse("unmerged")

    def _refuse(self, what: str) -> None:
        if self.is_residual:
            raise NotImplementedError(f"mixed-rank residuals cannot be {what}; merge_and_unload() and unload() can")
        raise NoDenseWeightsError(what)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names=None
    ) -> nn.Module:
        """The factors as a layer of the smaller model; a residual is added to the weight it belongs to."""
        if not merge:
            if not self.is_residual:
                raise NoDenseWeightsError("unloaded")
            return self.base_layer
        if safe_merge and not all(torch.isfinite(p).all() for p in self.factors.parameters() if p.is_floating_point()):
            raise ValueError("safe_merge: the factors hold NaN or infinite values")
        if not self.is_residual:
            return self.factors
        with torch.no_grad():
            self.base_layer.weight += self.factors.weight
        return self.base_layer

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.is_residual:
            return self.factors(inputs)
        output = self.base_layer(inputs)
        return output if self.disable_adapters or not self.mixed_rank_factors else output + self.factors(inputs)


class NoDenseWeightsError(NotImplementedError):
    """What was asked for needs the dense weights, which the compression replaced."""

    def __init__(self, what: str):
        super().__init__(
            f"mixed-rank factors cannot be {what}: they replaced the dense weights, which are gone. merge_and_unload() "
            "gives the smaller model, to_dense() the same function in the original shapes; load the base model again "
            "to have it back."
        )
