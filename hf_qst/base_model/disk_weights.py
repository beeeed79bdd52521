"""Decoders whose weights stay in their files: a block's are in memory while it runs, or while somebody holds it.

transformers finds each tensor of the model in the folder's safetensors files; it does so for `device_map="disk"`. What is
done here is when they come in: accelerate brings in one layer for one call, we bring in one block for all that is to be done
with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import groupby

import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from hf_qst.base_model.decoder_stack import find_decoder_stack


class DiskWeights:
    """The weights of one model, and where they lie.

    Args:
        folder (`str`): with the safetensors files of a causal language model, that are not quantised.
        skeleton: the model without weights (`skeleton_of`).
        scratch (`str`): an empty folder, for tensors that transformers converts and for those of `put_away`.
        dtype: as in `from_pretrained`.
        device: where the weights come.

    Raises:
        ValueError: the folder lacks a tensor.
    """

    def __init__(self, folder: str, skeleton: PreTrainedModel, scratch: str, dtype="auto", device="cpu"):
        self.scratch, self.device = scratch, torch.device(device)
        stays = str(self.device)
        units = _units(skeleton)
        self.model: PreTrainedModel
        self.model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=_device_map(skeleton, units, stays),
            offload_folder=os.path.join(scratch, "converted"),
            output_loading_info=True,
        )
        if missing := sorted(found["missing_keys"]):
            raise ValueError(f"{folder} has no tensor {missing[0]!r} ({len(missing)} such tensors)")
        index = next(
            hook.weights_map.dataset.index
            for module in self.model.modules()
            if isinstance(getattr(hook := getattr(module, "_hf_hook", None), "weights_map", None), PrefixedDataset)
        )
        remove_hook_from_submodules(self.model)
        self.model.tie_weights()
        self.index: dict[str, dict] = dict(index)
        self._own: dict[str, list[str]] = {}
        loader = OffloadedWeightsLoader(index=self.index, device=stays)
        self.units = {
            path: _Unit(self.model.get_submodule(path), path, loader, self.device, is_block)
            for path, is_block in units.items()
        }
        for unit in self.units.values():
            unit.others = self.units.values()

    def in_turn(self, names: Iterable[str]) -> Iterator[str]:
        """The names of layers one by one, each while its weights are in memory."""
        for path, own in groupby(names, self._unit_of):
            with self.units[path].held() if path else nullcontext():
                yield from own

    def _unit_of(self, name: str) -> str | None:
        return next((path for path in self.units if name.startswith(f"{path}.")), None)

    def put_away(self, modules: Mapping[str, nn.Module]) -> None:
        """Write the tensors of modules of the model, by name, to a file, from which they come as the model's own do."""
        tensors = {f"{name}.{key}": value for name, one in modules.items() for key, value in one.state_dict().items()}
        if not tensors:
            return
        file = os.path.join(self.scratch, f"{len(self._own):05}-{next(iter(modules))}.safetensors")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            self.index[name] = {"safetensors_file": file, "weight_name": name, "dtype": dtype}
        self._own[file] = list(tensors)
        for module in modules.values():
            module.to("meta")

    def drop(self) -> None:
        """Let all weights that nobody holds out of memory."""
        for unit in self.units.values():
            unit.drop()

    def forget(self) -> None:
        """Remove the files of `put_away`."""
        for file, names in self._own.items():
            for name in names:
                self.index.pop(name, None)
            os.remove(file)
        self._own.clear()


def skeleton_of(config: PreTrainedConfig) -> PreTrainedModel:
    """The causal language model of a configuration, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def present(module: nn.Module) -> AbstractContextManager:
    """A context in which a module's weights are in memory, wherever they lie otherwise."""
    unit = getattr(module, "_hf_hook", None)
    return unit.held() if isinstance(unit, _Unit) else nullcontext()


def comes_from_disk(module: nn.Module) -> bool:
    """Whether a module's weights are in memory for a while only."""
    return isinstance(getattr(module, "_hf_hook", None), _Unit)


def _units(model: PreTrainedModel) -> dict[str, bool]:
    """Paths of what comes into memory as a whole, and whether it is a block: the embeddings, the head, each block. The rest is
    small, and stays."""
    stack = find_decoder_stack(model)
    outside = (stack.embeddings, model.get_output_embeddings())
    blocks = [f"{stack.path}.{stack.architecture.blocks}.{i}" for i in range(len(stack.blocks))]
    found = [path for path, module in model.named_modules() if module in outside]
    return dict.fromkeys(found, False) | dict.fromkeys(blocks, True)


def _device_map(model: nn.Module, units: Iterable[str], device: str, path: str = "") -> dict[str, str]:
    """ "disk" for the units and `device` for all others, without an entry inside another, as accelerate wants it."""
    if path in units:
        return {path: "disk"}
    if path and not any(unit.startswith(f"{path}.") for unit in units):
        return {path: device}
    prefix, module = f"{path}." if path else "", model.get_submodule(path)
    found = {f"{prefix}{name}": device for name, _ in module.named_parameters(recurse=False)}
    for name, _ in module.named_children():
        found |= _device_map(model, units, device, f"{prefix}{name}")
    return found


class _Unit:
    """A module whose weights come from files: for each of its calls, and for as long as they are held.

    They stay until another unit's are needed: the embeddings are called for one batch after the other. It stands where
    accelerate's hooks do and has their attributes, which transformers reads when it saves a model whose weights are not in
    memory.
    """

    offload = True
    others: Iterable[_Unit] = ()

    def __init__(
        self, module: nn.Module, path: str, loader: OffloadedWeightsLoader, device: torch.device, is_block: bool
    ):
        self.module, self.path, self.execution_device = module, path, device
        self.weights_map = PrefixedDataset(loader, f"{path}.")
        self._holders = 0
        self._absent: list[tuple[nn.Module, str, nn.Parameter]] = []
        self._checked = not is_block  # others are not compressed
        module._hf_hook = self
        module.register_forward_pre_hook(lambda module, args: self._take())
        module.register_forward_hook(lambda module, args, output: self._release(), always_call=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """The weights are in memory meanwhile."""
        try:
            self._take()
            yield
        finally:
            self._release()

    def _take(self) -> None:
        self._holders += 1
        if self._holders > 1:
            return
        for other in self.others:
            if other is not self and not other._holders:
                other.drop()
        found: dict[int, nn.Parameter] = {}
        for path, module in self.module.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                if not parameter.is_meta:
                    continue
                if id(parameter) not in found:
                    found[id(parameter)] = self._load(f"{path}.{name}" if path else name, parameter)
                module._parameters[name] = found[id(parameter)]
                self._absent.append((module, name, parameter))
        self._checked = True

    def _load(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        tensor = self.weights_map[name]
        if not self._checked and not torch.isfinite(tensor).all():
            file = self.weights_map.dataset.index[f"{self.path}.{name}"]["safetensors_file"]
            raise ValueError(
                f"{file}: the weight of {f'{self.path}.{name}'.removesuffix('.weight')!r} holds NaN or infinite values and "
                "cannot be compressed"
            )
        return nn.Parameter(tensor, requires_grad=parameter.requires_grad)

    def _release(self) -> None:
        self._holders -= 1

    def drop(self) -> None:
        """Let the memory go."""
        for module, name, parameter in self._absent:
            module._parameters[name] = parameter
        self._absent.clear()
