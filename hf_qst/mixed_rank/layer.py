"""The layer that stands in the place of a dense one, and the PEFT layer that holds it while it is an adapter."""

from __future__ import annotations

import functools
import warnings

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_qst.base_model.linear_layers import dense_shape, dense_weight, empty_linear, float_dtype, set_weights
from hf_qst.base_model.packed_weights import forbid_packing
from hf_qst.reshaped_models import ReshapedModelError
from hf_qst.tuner.manifest_tuner import ManifestLayer

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

    def randomized(self) -> LowRankLinear:
        """A layer of the same shape and bias with random factors, whose outputs are about as large as its inputs."""
        weight, dtype = self.down.weight, float_dtype(self.up)
        left = torch.randn(self.in_features, self.rank, device=weight.device) / self.in_features**0.5
        right = torch.randn(self.rank, self.out_features, device=weight.device) / self.rank**0.5
        return LowRankLinear.from_factors(left, right, self.bias, self.conv1d, dtype).train(self.training)

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


class MixedRankLayer(ManifestLayer):
    """Holds the factors of one layer as PEFT adapters, under the adapters' names.

    Factors of mode `"replace"` run in the place of the dense layer; those of mode `"residual"` are added to it. Without
    a base layer there is one adapter, of mode `"replace"`, and nothing to go back to. With one, several adapters may be
    active: each adds its difference from the base layer, `A B - W` where it replaces.

    Args:
        adapter_name (`str`)
        factors ([`LowRankLinear`])
        base_layer: the dense layer, or None if it is not kept.
        mode (`str`): `"replace"` or `"residual"`.
    """

    adapter_layer_names = ("mixed_rank_factors",)
    other_param_names = ("mixed_rank_modes",)
    method = "mixed rank"
    alone = "Mixed rank replaces dense weights, which cannot have adapters of another method."

    def __init__(
        self, adapter_name: str, factors: LowRankLinear, base_layer: nn.Module | None = None, mode: str = "residual"
    ):
        super().__init__(base_layer)
        self.mixed_rank_modes: dict[str, str] = {}
        self.in_features, self.out_features = factors.in_features, factors.out_features
        self._active_adapter = [adapter_name]
        # The dense weight and bias while adapters are merged into the base layer.
        self.register_buffer("dense_weight", None, persistent=False)
        self.register_buffer("dense_bias", None, persistent=False)
        self.add_factors(adapter_name, factors, mode)

    def add_factors(self, adapter_name: str, factors: LowRankLinear, mode: str) -> None:
        """Hold the factors of one more adapter."""
        self.mixed_rank_factors[adapter_name] = factors
        self.mixed_rank_modes[adapter_name] = mode

    @property
    def keeps_base(self) -> bool:
        """Whether the dense layer is still there."""
        return "base_layer" in self._modules

    @property
    def used(self) -> list[str]:
        """The active adapters that this layer has factors of."""
        return [name for name in self.active_adapters if name in self.mixed_rank_factors]

    @property
    def factors(self) -> LowRankLinear:
        """Those of the first adapter."""
        return next(iter(self.mixed_rank_factors.values()))

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight if self.keeps_base else self.factors.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return (self.base_layer if self.keeps_base else self.factors).bias

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
        if not enabled:
            self._require_base("switched off")
        super().enable_adapters(enabled)

    def _require_base(self, what: str) -> None:
        if not self.keeps_base:
            raise NoDenseWeightsError(what)

    def check_merge(self, adapter_names: list[str]) -> None:
        """Check that the base layer can take these adapters into its weight.

        Raises:
            NoDenseWeightsError: there is no base layer.
            NotImplementedError: its weight is quantised.
        """
        self._require_base("merged in place")
        if any(name in self.mixed_rank_factors for name in adapter_names) and not self.weight.is_floating_point():
            raise NotImplementedError(
                "mixed-rank factors cannot be merged into a quantised weight: rounding would undo it. Keep them as an "
                "adapter (save_pretrained), or take the base back with unload()"
            )

    def check_finite(self, adapter_names: list[str]) -> None:
        """Check the factors of these adapters.

        Raises:
            ValueError: naming the first adapter with NaN or infinite values.
        """
        for name in adapter_names:
            factors = self.mixed_rank_factors[name].parameters() if name in self.mixed_rank_factors else ()
            if not all(torch.isfinite(p).all() for p in factors if p.is_floating_point()):
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the differences that the factors make to the base layer's weight and bias; `unmerge` takes them back."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.mixed_rank_factors]
        self.check_merge(names)
        if safe_merge:
            self.check_finite(names)
        if not names:
            return
        base = self.base_layer
        if not self.merged:
            self.dense_weight = base.weight.detach().clone()
            self.dense_bias = None if base.bias is None else base.bias.detach().clone()
        for name in names:
            replaces, factors = self.mixed_rank_modes[name] == "replace", self.mixed_rank_factors[name]
            _add_difference(base.weight, factors.weight, self.dense_weight if replaces else None)
            if factors.bias is not None:
                _add_difference(base.bias, factors.bias, self.dense_bias if replaces else None)
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the base layer its dense weight and bias back."""
        self._require_base("unmerged")
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.base_layer.weight.copy_(self.dense_weight)
        if self.dense_bias is not None:
            self.base_layer.bias.copy_(self.dense_bias)
        self.dense_weight = self.dense_bias = None
        self.merged_adapters = []

    def _to_unload(self, adapter_names: list[str] | None) -> list[str]:
        """The adapters that go into the smaller model, those that are merged already included."""
        wanted = self.active_adapters if adapter_names is None else adapter_names
        names = dict.fromkeys([*self.merged_adapters, *wanted])
        return [name for name in names if name in self.mixed_rank_factors]

    def _replaced_by(self, names: list[str]) -> LowRankLinear | None:
        """The factors that are the layer of the smaller model, if no sum of weights is."""
        one = len(names) == 1 and self.mixed_rank_modes[names[0]] == "replace"
        return self.mixed_rank_factors[names[0]] if one else None

    def check_unload(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Check that `unload_and_optionally_merge_module` will go through. Errors as of `check_merge`, `check_finite`."""
        if not merge:
            return self._require_base("unloaded")
        names = self._to_unload(adapter_names)
        if self._replaced_by(names) is None:
            self.check_merge(names)
        if safe_merge:
            self.check_finite(names)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """The layer of the smaller model: the factors where one adapter replaces the dense layer, else a dense one."""
        self.check_unload(merge, safe_merge, adapter_names)
        names = self._to_unload(adapter_names)
        if not merge:
            if self.merged:
                self.unmerge()
            return self.base_layer
        factors = self._replaced_by(names)
        if factors is not None:
            # PEFT holds adapters of a model in half precision in float32.
            cast = self.keeps_base and factors.down.weight.is_floating_point()
            return factors.to(float_dtype(self.base_layer)) if cast else factors
        if rest := [name for name in names if name not in self.merged_adapters]:
            self.merge(adapter_names=rest)
        return self.base_layer

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if not self.keeps_base:
            (name,) = self.mixed_rank_factors
            return self.checked(name)(inputs)
        if self.merged:
            if self.disable_adapters:
                self.unmerge()
            return self.base_layer(inputs)
        names = [] if self.disable_adapters else self.used
        replacing = sum(self.mixed_rank_modes[name] == "replace" for name in names)
        outputs = [self.checked(name)(inputs) for name in names]
        if replacing != 1:
            base = self.base_layer(inputs)
            outputs.insert(0, base if replacing == 0 else base * (1 - replacing))
        return functools.reduce(torch.add, outputs)


def _add_difference(parameter: nn.Parameter, value: torch.Tensor, dense: torch.Tensor | None) -> None:
    """Add `value` to a parameter, less the dense one that it stands for, in float64."""
    total = parameter.double() + value.double()
    parameter.copy_(total if dense is None else total - dense.double())


class NoDenseWeightsError(NotImplementedError):
    """What was asked for needs the dense weights, which the compression replaced."""

    def __init__(self, what: str):
        super().__init__(
            f"mixed-rank factors cannot be {what}: they replaced the dense weights, which are gone. "
            "MixedRankConfig.keep_base_weights=True keeps them. merge_and_unload() gives the smaller model, to_dense() "
            "the same function in the original shapes; load the base model again to have it back."
        )
