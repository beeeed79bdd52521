"""Experts of a mixture as linear layers of their own.

transformers holds the experts of a layer in a few three-dimensional parameters. What knows linear layers (factors,
quantisation, adapters) knows nothing of these. `SplitExperts` holds each expert's matrices as linear layers, and runs
them as transformers' "eager" implementation does: expert after expert, on the tokens that were routed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hf_qst.base_model.linear_layers import dense_shape, is_linear
from hf_qst.base_model.offloading import has_values

KIND = "split_experts"
# Fused parameter of transformers' experts, and the name of the layer that holds one expert's part of it. The names
# differ so that transformers' translation of checkpoints does not take the one for the other.
_PARTS = {"gate_up_proj": "gate_up", "up_proj": "up", "down_proj": "down"}
# transformers' implementations of experts that compute activation and gate apart from the products.
_CHANGEABLE = ("eager", "grouped_mm", "batched_mm")
# Of a module's attributes those that are not copied: every module's own, and what `hook_middle` puts there.
_PLAIN = {*vars(nn.Module()), "_apply_gate"}


def is_fused(module: nn.Module) -> bool:
    """Whether `module` holds experts as transformers' common interface does (`use_experts_implementation`)."""
    weights = [getattr(module, name, None) for name in _fused_names(module)]
    return len(weights) == 2 and all(isinstance(w, nn.Parameter) and w.dim() == 3 for w in weights)


def _fused_names(module: nn.Module) -> tuple[str, ...]:
    has_gate = getattr(module, "has_gate", None)
    return () if has_gate is None else ("gate_up_proj" if has_gate else "up_proj", "down_proj")


def has_post_norm(experts: nn.Module) -> bool:
    """Whether every expert's output is normalised; transformers 5.17 knows no such experts."""
    return getattr(experts, "has_post_expert_norm", False)


def expert_shapes(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of every linear layer that `split` would make of fused experts, by its path inside the module."""
    shapes = {}
    for name in _fused_names(module):
        count, *sizes = getattr(module, name).shape
        shape = tuple(sizes) if module.is_transposed else tuple(reversed(sizes))
        shapes |= {f"{index}.{_PARTS[name]}": shape for index in range(count)}
    return dict(sorted(shapes.items(), key=lambda item: int(item[0].split(".")[0])))


@dataclass(frozen=True)
class ExpertSizes:
    """Sizes of the experts of one layer: how many, their widths, and how many matrices read the input (2 with a gate)."""

    count: int
    inputs: int
    middle: int
    outputs: int
    readers: int
    biased: bool

    @classmethod
    def of(cls, module: nn.Module) -> ExpertSizes:
        """Of fused experts, or of `SplitExperts`."""
        first, last = _fused_names(module)
        if isinstance(module, SplitExperts):
            layers = [module[0].get_submodule(name) for name in module.names]
            shapes, count, biased = [dense_shape(layer) for layer in layers], len(module), layers[0].bias is not None
        else:
            shapes = [expert_shapes(module)[f"0.{_PARTS[name]}"] for name in (first, last)]
            count, biased = len(getattr(module, first)), getattr(module, f"{first}_bias", None) is not None
        return cls(count, shapes[0][0], *shapes[1], 2 if module.has_gate else 1, biased)


def are_experts(module: nn.Module | None) -> bool:
    """Whether `module` holds experts, fused or split."""
    return module is not None and (is_fused(module) or isinstance(module, SplitExperts))


def read_residual(experts: nn.Module, hidden_size: int) -> bool:
    """Whether the experts read channels of the residual and add to them: not of a smaller state, nor through a norm."""
    return not has_post_norm(experts) and ExpertSizes.of(experts).inputs == hidden_size


def layer_names(experts: nn.Module) -> tuple[str, str]:
    """Names that the layers of each expert have in `SplitExperts`, in the order in which they run."""
    first, last = _fused_names(experts)
    return _PARTS[first], _PARTS[last]


def has_plain_layers(experts: nn.Module) -> bool:
    """Whether the experts are fused, or every layer of theirs is a linear one, quantised or not."""
    split = isinstance(experts, SplitExperts)
    return not split or all(is_linear(layer) for index in range(len(experts)) for layer in experts[index].children())


def written_by(experts: nn.Module, middle: torch.Tensor) -> torch.Tensor:
    """Of values of the middle channels [middle] those of the outputs of an expert's first matrix [readers * middle]."""
    if not experts.has_gate:
        return middle
    return torch.cat([middle, middle]) if experts.is_concatenated else middle.repeat_interleave(2)


def summed_by_middle(experts: nn.Module, outputs: torch.Tensor) -> torch.Tensor:
    """Sums over the outputs of an expert's first matrix [readers * middle] that go with each middle channel [middle]."""
    if not experts.has_gate:
        return outputs
    return outputs.unflatten(0, (2, -1)).sum(0) if experts.is_concatenated else outputs.unflatten(0, (-1, 2)).sum(1)


def hook_middle(experts: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]):
    """Put `change(middle)` in the place of the middle [rows, middle] of every expert; returns the hook's handle.

    It is called once for all experts or once for each, as the experts' implementation has it. transformers' own classes
    compute the usual gate without calling `_apply_gate`: there the activation is changed, which the other branch of the
    gate then multiplies.

    Raises:
        ValueError: the experts run in an implementation that calls neither.
    """
    implementation = experts.config._experts_implementation
    if not isinstance(experts, SplitExperts) and implementation not in (None, *_CHANGEABLE):
        raise ValueError(
            f"experts_implementation must be one of {', '.join(_CHANGEABLE)} where the middle channels of experts are "
            f"gated or watched, got {implementation!r}; call model.set_experts_implementation"
        )
    gate = getattr(experts, "fused_class", type(experts))._apply_gate
    name = "act_fn" if not experts.has_gate or gate.__module__ == "transformers.integrations.moe" else "_apply_gate"
    found = getattr(experts, name)
    if isinstance(found, nn.Module):
        return found.register_forward_hook(OnOutput(change))
    changed = found if isinstance(found, _Changed) else _Changed(experts, name)
    changed.changes.append(change)
    return _ChangeHandle(changed, change)


@dataclass(frozen=True)
class OnOutput:
    """A class and no closure, so that models with the hook pickle and deep-copy."""

    change: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, module, args, output):
        return self.change(output)


class _Changed:
    """A function of experts with changes of its output, in the function's place until the last is removed."""

    def __init__(self, experts: nn.Module, name: str):
        self.experts, self.name, self.function = experts, name, getattr(experts, name)
        self.is_method = name not in vars(experts)
        self.changes: list[Callable] = []
        setattr(experts, name, self)

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        output = self.function(rows)
        for change in self.changes:
            output = change(output)
        return output

    def remove(self, change: Callable) -> None:
        self.changes.remove(change)
        if not self.changes:
            delattr(self.experts, self.name)
            if not self.is_method:
                setattr(self.experts, self.name, self.function)


@dataclass(frozen=True)
class _ChangeHandle:
    changed: _Changed
    change: Callable

    def remove(self) -> None:
        if self.change in self.changed.changes:
            self.changed.remove(self.change)


class SplitExperts(nn.Module):
    """The experts of one layer, each with linear layers `gate_up` (or `up`, where there is no gate) and `down`.

    Where `forced_routing` [tokens, k] is set, it stands in the place of the router's choice. While an expert runs,
    `running` is the index [n] of its tokens and the number of all tokens.

    Args:
        fused: transformers' module, whose class's gate, activation and settings are used.
        empty (`bool`): make layers without values, to be loaded; else they share the memory of the fused parameters.
    """

    def __init__(self, fused: nn.Module, empty: bool = False):
        super().__init__()
        self.fused_class = type(fused)
        for name, value in vars(fused).items():
            if name not in _PLAIN:
                setattr(self, name, value)
        for name, child in fused.named_children():
            self.add_module(name, child)
        self.forced_routing: torch.Tensor | None = None
        self.last_routing: torch.Tensor | None = None
        self.running: tuple[torch.Tensor, int] | None = None
        for name in _fused_names(fused):
            weights, biases = getattr(fused, name), getattr(fused, f"{name}_bias", None)
            for index, weight in enumerate(weights.detach()):
                if str(index) not in self._modules:
                    self.add_module(str(index), nn.Module())
                bias = None if biases is None else biases.detach()[index]
                weight = weight.T if self.is_transposed else weight
                layer = _linear(weight, bias, empty).requires_grad_(weights.requires_grad)
                self.get_submodule(str(index)).add_module(_PARTS[name], layer)
        self.train(fused.training)

    @property
    def in_features(self) -> int:
        """Width of what the experts are given."""
        return self[0].get_submodule(self.names[0]).in_features

    @property
    def out_features(self) -> int:
        """Width of what the experts give."""
        return self[0].get_submodule(self.names[-1]).out_features

    @property
    def names(self) -> tuple[str, str]:
        """Names of an expert's layers, in the order in which they run."""
        return layer_names(self)

    def __getitem__(self, index: int) -> nn.Module:
        return self._modules[str(index)]

    def __len__(self) -> int:
        return sum(name.isdigit() for name in self._modules)

    def forward(self, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
        """[tokens, d_in], [tokens, k], [tokens, k] -> [tokens, d_out]; the index `len(self)` stands for no expert."""
        self.last_routing = top_k_index if self.forced_routing is None else self.forced_routing
        chosen = self.last_routing.flatten()
        # Sorted by expert and within it by token, as in the loop of transformers' classes.
        order = chosen.argsort(stable=True)
        counts = self._counts(chosen)
        total, start = hidden_states.new_zeros(len(hidden_states), self.out_features), 0
        for index, count in enumerate(counts):
            if not count and not _is_watched(self[index]):
                continue
            own = order[start : start + count]
            start += count
            tokens = own // self.last_routing.shape[-1]
            self.running = tokens, len(hidden_states)
            output = self._run(self[index], hidden_states[tokens])
            output = output * top_k_weights.flatten()[own, None]
            total.index_add_(0, tokens, output.to(total.dtype))
        self.running = None
        return total

    def _counts(self, chosen: torch.Tensor) -> list[int]:
        """How often each expert was chosen; in a plan, which knows no choices, all alike."""
        if has_values(chosen):
            return chosen.bincount(minlength=len(self))[: len(self)].tolist()
        ends = [chosen.numel() * index // len(self) for index in range(len(self) + 1)]
        return [end - start for start, end in zip(ends, ends[1:], strict=False)]

    def _run(self, expert: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        first, last = (expert.get_submodule(name) for name in self.names)
        middle = first(inputs)
        middle = self._apply_gate(middle) if self.has_gate else self.act_fn(middle)
        output = last(middle)
        return self.post_expert_norm(output) if has_post_norm(self) else output

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        return self.fused_class._apply_gate(self, gate_up)

    def describe(self) -> dict:
        return {"kind": KIND}

    @classmethod
    def from_description(cls, fused: nn.Module, description: dict) -> SplitExperts:
        """Empty layers in the place of fused experts; experts that are split already stay."""
        return fused if isinstance(fused, cls) else cls(fused, empty=True)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """transformers' module with these experts' weights, which must be in floating point."""
        fused = self.fused_class.__new__(self.fused_class)
        nn.Module.__init__(fused)
        for name, value in vars(self).items():
            if name not in _PLAIN and name not in ("fused_class", "forced_routing", "last_routing", "running"):
                setattr(fused, name, value)
        for name, child in self.named_children():
            if not name.isdigit():
                fused.add_module(name, child)
        for name in _fused_names(self):
            layers = [self[index].get_submodule(_PARTS[name]) for index in range(len(self))]
            weights = torch.stack([layer.weight.T if self.is_transposed else layer.weight for layer in layers])
            trains = any(layer.weight.requires_grad for layer in layers)
            fused.register_parameter(name, nn.Parameter(weights, requires_grad=trains))
            if layers[0].bias is not None:
                biases = torch.stack([layer.bias for layer in layers])
                fused.register_parameter(f"{name}_bias", nn.Parameter(biases, requires_grad=trains))
        return fused.train(self.training)


def _linear(weight: torch.Tensor, bias: torch.Tensor | None, empty: bool) -> nn.Linear:
    """A layer that shares the memory of `weight` [d_out, d_in] and `bias` [d_out], or with memory of its own."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(
        torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if empty else weight
    )
    if bias is not None:
        layer.bias = nn.Parameter(torch.empty_like(bias) if empty else bias)
    return layer


def _is_watched(expert: nn.Module) -> bool:
    """Whether something listens to the calls of an expert's layers; then it is called even with no token."""
    return any(layer._forward_hooks or layer._forward_pre_hooks for layer in expert.children())


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that `SplitExperts` can stand for, by their paths."""
    return {path: module for path, module in model.named_modules() if is_fused(module)}


def split(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Exchange the fused experts at these paths for `SplitExperts`, which share their memory; returns what was there."""
    taken = {path: model.get_submodule(path) for path in paths}
    for path, fused in taken.items():
        model.set_submodule(path, SplitExperts(fused))
    return taken


def split_named(model: nn.Module, names: Iterable[str]) -> list[str]:
    """`split` the fused experts that layers of these names would be in; returns their paths."""
    wanted = tuple(names)
    paths = [path for path in fused_experts(model) if any(name.startswith(f"{path}.") for name in wanted)]
    split(model, paths)
    return paths


def put_back(model: nn.Module, taken: Mapping[str, nn.Module]) -> None:
    """Undo `split`."""
    for path, fused in taken.items():
        model.set_submodule(path, fused)


def join(model: nn.Module, paths: Iterable[str]) -> None:
    """Exchange the `SplitExperts` at these paths whose layers are all plain for transformers' modules of the same weights."""
    for path in paths:
        experts = model.get_submodule(path)
        if all(type(layer) is nn.Linear for index in range(len(experts)) for layer in experts[index].children()):
            model.set_submodule(path, experts.to_dense())


def own_memory(model: nn.Module) -> None:
    """Give the plain layers of `SplitExperts` memory of their own, so that what was replaced is freed."""
    for module in model.modules():
        if isinstance(module, SplitExperts):
            for index in range(len(module)):
                for layer in module[index].children():
                    if type(layer) is nn.Linear:
                        for parameter in layer.parameters():
                            parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)


def enclosing_experts(model: nn.Module, name: str) -> tuple[str, SplitExperts, str] | None:
    """Path and module of the `SplitExperts` that the layer `name` is of, and what the layer is in it; None for others."""
    path, _, rest = name.rpartition(".")
    path, _, index = path.rpartition(".")
    if not index.isdigit():
        return None
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None
    return (path, module, rest) if isinstance(module, SplitExperts) else None
