"""Pruned blocks: narrower matrices, the channels they read picked out, the channels they write put back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_qst.base_model.architecture import Projections, host_of
from hf_qst.base_model.block_calls import with_first_argument
from hf_qst.base_model.decoder_stack import DecoderStack, UnsupportedArchitectureError, find_decoder_stack
from hf_qst.base_model.experts import (
    SplitExperts,
    are_experts,
    has_plain_layers,
    is_fused,
    layer_names,
    written_by,
)
from hf_qst.base_model.linear_layers import dense_shape, dense_weight, empty_linear, float_dtype, is_linear, set_weights
from hf_qst.base_model.packed_weights import drop_quantizer
from hf_qst.pruning.layout import SELECTIONS, PruningLayout
from hf_qst.reshaped_models import ReshapedModelError, reshape_model

KIND = "pruned_branch"


def _resized(like: nn.Module, inputs: int, outputs: int) -> nn.Module:
    """A linear layer of this size, of the class, device and dtype of `like`, not initialised."""
    kind, has_bias = isinstance(like, Conv1D), like.bias is not None
    resized = empty_linear(inputs, outputs, has_bias, kind, float_dtype(like), like.weight.device)
    if type(like).__module__.startswith("transformers.models."):
        resized.__class__ = type(like)  # Falcon's has a product of its own
    return resized


def _for_rows(index: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """The index [width] for every row of `hidden` [..., channels].

    On a CPU `gather` and `scatter_` with it take a third of the time of `index_select` and `index_add_`.
    """
    return index.expand(*hidden.shape[:-1], -1)


READ, WRITE = "read", "write"
"""Roles of a linear layer in a branch: it reads from the residual, or adds to it."""


class PrunedBranch(nn.Module):
    """A module that reads some channels of the residual, or adds to some of them, or both.

    The module inside is the architecture's own with narrower linear layers. It is given the channels `input_index` of
    the normalised hidden states, so that a norm's statistics stay those of the full width; its output goes to the
    channels `output_index`, the others are zero. Gao et al., arXiv 2410.11988, figure 2. Experts of a mixture are held as
    linear layers; the names of those that are alike in all experts start with `*` in a description.

    Made by `from_description` in the place of an architecture's module.

    Args:
        module (`nn.Module`): takes hidden states [batch, seq, channels] first, and returns such, or a tuple with them.
        description (`Mapping`): as `describe` gives it.
        full (`Mapping[str, tuple[int, int]]`): [d_in, d_out] of the linear layers before they were narrowed.
        device: of the index buffers, which are not initialised.
    """

    def __init__(self, module: nn.Module, description: Mapping, full: Mapping[str, tuple[int, int]], device=None):
        super().__init__()
        self.module = module
        self.described = {name: dict(entry) for name, entry in description["linear"].items()}
        self.hidden_size = description["hidden_size"]
        self.full = dict(full)
        for name in ("input", "output"):
            width = description[f"{name}_width"]
            # 64 bits: with 32, index_add is twenty times slower on CPU.
            empty = None if width is None else torch.empty(width, dtype=torch.int64, device=device)
            self.register_buffer(f"{name}_index", empty)

    @classmethod
    def from_description(cls, unchanged: nn.Module, description: Mapping) -> PrunedBranch:
        """A branch of the described sizes, on the device and in the dtype of the module it replaces.

        Its linear layers and indices are not initialised. What else is in the module is kept as it is.

        Raises:
            ReshapedModelError: a linear layer it names is not there, or is narrower.
        """
        device = next(unchanged.parameters()).device
        if is_fused(unchanged):
            unchanged = SplitExperts(unchanged)
        known, full = dict(unchanged.named_modules()), {}
        entries = of_each_expert(unchanged, description["linear"])
        for name, entry in entries.items():
            if not is_linear(known.get(name)):
                raise ReshapedModelError(f"a pruned branch names {name!r}, which is no linear layer of the model")
            full[name] = dense_shape(known[name])
            if any(width > size for width, size in zip(entry["shape"], full[name], strict=True)):
                raise ReshapedModelError(
                    f"a pruned branch describes {name!r} as {entry['shape']}, the model's is {list(full[name])}"
                )
        for name, entry in entries.items():
            unchanged = exchanged(unchanged, name, _resized(known[name], *entry["shape"]))
        return cls(unchanged, description, full, device)

    @property
    def linear(self) -> dict[str, dict]:
        """Description of each narrowed layer by its path in the module."""
        return of_each_expert(self.module, self.described)

    def describe(self) -> dict:
        """What the branch is, as JSON-ready data; `from_description` makes an empty one of it."""
        return {
            "kind": KIND,
            "linear": self.described,
            "input_width": None if self.input_index is None else len(self.input_index),
            "output_width": None if self.output_index is None else len(self.output_index),
            "hidden_size": self.hidden_size,
        }

    def forward(self, *args, **kwargs):
        """As the module's own, on hidden states [batch, seq, hidden]."""
        if self.input_index is not None:
            args, kwargs = with_first_argument(args, kwargs, self.pick_out)
        output = self.module(*args, **kwargs)
        return (self.put_back(output[0]), *output[1:]) if isinstance(output, tuple) else self.put_back(output)

    def pick_out(self, wide: torch.Tensor) -> torch.Tensor:
        """The channels that the module reads: [..., hidden] -> [..., width]."""
        return wide if self.input_index is None else wide.gather(-1, _for_rows(self.input_index, wide))

    def put_back(self, narrow: torch.Tensor) -> torch.Tensor:
        """The module's output at its channels, zeros at the others: [..., width] -> [..., hidden]."""
        if self.output_index is None:
            return narrow
        # The indices are unique: nothing is written twice, and the result does not depend on the order.
        wide = narrow.new_zeros(*narrow.shape[:-1], self.hidden_size)
        return wide.scatter_(-1, _for_rows(self.output_index, narrow), narrow)

    def to_dense(self) -> nn.Module:
        """The module in the architecture's shapes: what was cut out is zero. Middle channels that stayed come first."""
        # Experts may have been fused again, as whoever makes a whole model dense begins with the innermost modules.
        source = SplitExperts(self.module) if is_fused(self.module) else self.module
        module = copy.deepcopy(source)
        for name, entry in of_each_expert(module, self.described).items():
            narrow = source.get_submodule(name)
            dense = _resized(narrow, *self.full[name])
            inputs = _places(self.input_index if entry["role"] == READ else None, narrow, dense, 0)
            stacked = entry.get("stacked", 1)
            outputs = _places(self.output_index if entry["role"] == WRITE else None, narrow, dense, 1, stacked)
            weight = dense_weight(narrow).new_zeros(self.full[name])
            weight[inputs[:, None], outputs] = dense_weight(narrow)
            bias = None if narrow.bias is None else narrow.bias.new_zeros(self.full[name][1])
            if bias is not None:
                bias[outputs] = narrow.bias.detach()
            set_weights(dense, weight, bias)
            module = exchanged(module, name, dense)
        return module.to_dense() if isinstance(module, SplitExperts) else module


def of_each_expert(module: nn.Module, entries: Mapping[str, object]) -> dict:
    """The entries by the paths of single layers, those of all experts of `module` once for each."""
    if not isinstance(module, SplitExperts):
        return dict(entries)
    return {name.replace("*", str(index)): entry for index in range(len(module)) for name, entry in entries.items()}


def _places(
    index: torch.Tensor | None, narrow: nn.Module, dense: nn.Module, side: int, stacked: int = 1
) -> torch.Tensor:
    """Where the input (side 0) or output (1) channels of a narrow layer lie in the dense one.

    Without an index those of each of the `stacked` matrices come first in it.
    """
    if index is not None:
        return index
    width, size = dense_shape(narrow)[side] // stacked, dense_shape(dense)[side] // stacked
    first = torch.arange(width, device=narrow.weight.device)
    return torch.cat([first + part * size for part in range(stacked)])


def exchanged(module: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """`module` with the submodule `name` replaced; with the empty name that is `new` itself."""
    if name == "":
        return new
    module.set_submodule(name, new)
    return module


@dataclass(frozen=True)
class _Branch:
    """One module of a block that will become a `PrunedBranch`: its path in the block, its masks, its linear layers."""

    path: str
    read: torch.Tensor | None
    written: torch.Tensor | None
    linear: dict[str, tuple[str, torch.Tensor | None, torch.Tensor | None]]  # role, masks of inputs and outputs
    stacked: int = 1  # matrices that a layer which reads holds, one behind the other


def _branches(block: nn.Module, names: Projections, masks: Mapping[str, torch.Tensor]) -> list[_Branch]:
    parts, every = {}, None
    if names.attention_out:
        parts |= dict.fromkeys(names.attention_in, (READ, masks["attention_in"], every))
        parts[names.attention_out] = (WRITE, every, masks["attention_out"])
    if names.mlp_out:
        # Of a mixture's shared expert, the middle stays.
        middle = every if names.experts else masks["mlp_middle"]
        stacked = every if names.experts else torch.cat([middle] * names.mlp_stacked)
        parts |= dict.fromkeys(names.mlp_in, (READ, masks["mlp_in"], stacked))
        parts[names.mlp_out] = (WRITE, middle, masks["mlp_out"])
    branches = []
    for host in names.hosts:
        linear = {n[len(host) :].lstrip("."): p for n, p in parts.items() if n == host or n.startswith(f"{host}.")}
        read = next((inputs for role, inputs, _ in linear.values() if role == READ), None)
        written = next((outputs for role, _, outputs in linear.values() if role == WRITE), None)
        stacked = names.mlp_stacked if host in names.mlp_hosts else 1
        branches.append(_Branch(host, read, written, linear, stacked))
    if names.experts:
        branches.append(_experts_branch(block, names.experts, masks))
    return branches


def _experts_branch(block: nn.Module, path: str, masks: Mapping[str, torch.Tensor]) -> _Branch:
    experts, read, written = block.get_submodule(path), masks["mlp_in"], masks["mlp_out"]
    first, last = (f"*.{name}" for name in layer_names(experts))
    linear = {
        first: (READ, read, written_by(experts, masks["mlp_middle"])),
        last: (WRITE, masks["mlp_middle"], written),
    }
    stacked = 2 if experts.has_gate and experts.is_concatenated else 1
    return _Branch(path, read, written, linear, stacked)


def _index(mask: torch.Tensor | None) -> torch.Tensor | None:
    """Channels that stay, ascending; None when all do."""
    return None if mask is None or mask.all() else mask.nonzero().flatten()


def _width(mask: torch.Tensor | None, size: int) -> int:
    return size if mask is None else int(mask.sum())


def _pruned(module: nn.Module, branch: _Branch, hidden_size: int) -> nn.Module:
    """`module` with only the channels of the branch's masks; the same module if they keep everything."""
    if all(_index(mask) is None for _, *both in branch.linear.values() for mask in both):
        return module
    if is_fused(module):
        module = SplitExperts(module)
    known = dict(module.named_modules())
    first = {name: dense_shape(known[name.replace("*", "0")]) for name in branch.linear}
    read, written = _index(branch.read), _index(branch.written)
    description = {
        "linear": {
            name: {"role": role, "shape": [_width(i, first[name][0]), _width(o, first[name][1])]}
            | ({"stacked": branch.stacked} if role == READ and branch.stacked > 1 else {})
            for name, (role, i, o) in branch.linear.items()
        },
        "input_width": None if read is None else len(read),
        "output_width": None if written is None else len(written),
        "hidden_size": hidden_size,
    }
    pruned = PrunedBranch.from_description(module, description)
    for name, (_, inputs, outputs) in of_each_expert(module, branch.linear).items():
        dense = known[name]
        weight, bias = dense_weight(dense), dense.bias
        if (index := _index(inputs)) is not None:
            weight = weight[index.to(weight.device)]
        if (index := _index(outputs)) is not None:
            weight = weight[:, index.to(weight.device)]
            bias = None if bias is None else bias[index.to(bias.device)]
        narrow = pruned.module.get_submodule(name)
        set_weights(narrow, weight, bias)
        narrow.requires_grad_(dense.weight.requires_grad)
    for index, buffer in ((read, pruned.input_index), (written, pruned.output_index)):
        if index is not None:
            buffer.copy_(index)
    return pruned.train(module.training)


def prune_blocks(model: PreTrainedModel, masks: Sequence[Mapping[str, torch.Tensor]]) -> PreTrainedModel:
    """Cut a model down to the selected channels, in place.

    A quantised model comes out in the type it computes in, to be quantised again when it is loaded.

    Args:
        model ([`~transformers.PreTrainedModel`]): of one of the supported decoder architectures, pre-norm.
        masks (`Sequence[Mapping[str, torch.Tensor]]`):
            For each block the five selections by name, bool [size]; True stays.

    Returns:
        The same model, which saves and loads with its new shapes; the model as it was if everything stays.

    Raises:
        ValueError, UnsupportedArchitectureError: the masks do not fit the model; it is unchanged.
    """
    stack = find_prunable_stack(model)
    _check_masks(stack, masks)
    for block, chosen in zip(stack.blocks, masks, strict=True):
        for branch in _branches(block, stack.projections(block), chosen):
            module = block.get_submodule(branch.path)
            block.set_submodule(branch.path, _pruned(module, branch, stack.spec.hidden_size))
    if not any(isinstance(module, PrunedBranch) for module in model.modules()):
        return model
    drop_quantizer(model)
    return reshape_model(model)


def find_prunable_stack(model: nn.Module) -> DecoderStack:
    """The model's decoder stack, if its blocks can be pruned.

    Raises:
        UnsupportedArchitectureError: no decoder this package knows, or a post-norm one.
        ValueError: its blocks were pruned or compressed before.
    """
    stack = find_decoder_stack(model)
    if reason := stack.architecture.pruning_refused:
        raise UnsupportedArchitectureError(f"{type(model).__name__} cannot be pruned: {reason}")
    if not stack.spec.pre_norm:
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} with this config is a post-norm decoder: a norm after the addition mixes pruned and "
            "kept channels. Pruning supports pre-norm decoders."
        )
    architecture = stack.architecture
    if sum(len(list(block.parameters())) for block in stack.blocks) != len(list(stack.blocks.parameters())):
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} shares parameters between its blocks, which pruning would cut twice"
        )
    candidates = [
        path
        for names in (architecture.projections, *architecture.alternatives)
        for path in (*names.paths, *([names.experts] if names.experts else []))
    ]
    for i, block in enumerate(stack.blocks):
        known = dict(block.named_modules())
        for name in candidates:
            if _was_changed(known, name):
                raise ValueError(
                    f"block {i} of {type(model).__name__} has no plain linear layer or experts {name!r}: it was pruned, "
                    "compressed or wrapped before"
                )
    if not any(stack.projections(block).are_any for block in stack.blocks):
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has no block whose attention or MLP pruning knows: a row of its type would name "
            "the linear layers that read from the residual and those that add to it"
        )
    return stack


def _was_changed(known: Mapping[str, nn.Module], path: str) -> bool:
    """Whether the linear layer or experts at this path, or the module it lies in, was replaced by something of another library."""
    if are_experts(known.get(path)):
        return not has_plain_layers(known[path])
    if path in known:
        # An architecture's own module here holds experts in a form of its own, which stay.
        return not is_linear(known[path]) and not type(known[path]).__module__.startswith("transformers.models.")
    host = known.get(host_of(path))
    return host is not None and not type(host).__module__.startswith("transformers.")


def _check_masks(stack: DecoderStack, masks: Sequence[Mapping[str, torch.Tensor]]) -> None:
    if len(masks) != len(stack.blocks):
        raise ValueError(f"masks must be given for each of the {len(stack.blocks)} blocks, got {len(masks)}")
    layout = PruningLayout.of(stack)
    for i, chosen in enumerate(masks):
        for name in SELECTIONS:
            mask = chosen.get(name)
            size = layout.size(name, i)
            if mask is None or mask.dtype != torch.bool or mask.shape != (size,):
                got = None if mask is None else (mask.dtype, list(mask.shape))
                raise ValueError(f"masks[{i}][{name!r}] must be bool [{size}], got {got}")
            if not mask.any():
                raise ValueError(f"masks[{i}][{name!r}] must keep at least one channel, it keeps none")
