"""What stored states depend on: the base's configuration and every byte of its weights, and what is kept of its states."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import nn

from hf_qst.base_model.offloading import require_weights
from hf_qst.qst.downsample import Downsample, LinearDownsample
from hf_qst.saved.json_files import digest
from hf_qst.saved.manifest import describe

FORMAT_VERSION = 1
# Fields of a configuration that no hidden state depends on.
_IRRELEVANT = (
    "_name_or_path", "architectures", "id2label", "label2id", "num_labels", "problem_type", "transformers_version", "use_cache",
    "output_hidden_states", "output_attentions", "return_dict", "bos_token_id", "eos_token_id",
)  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """What is stored of the base's blocks for one side network.

    Args:
        blocks: how many of them are replaced.
        states: those whose outputs are stored whole, the last of `blocks` among them.
        taps: those of which a downsampler without trained weights stores its reading, with that downsampler's fingerprint.
    """

    blocks: int
    states: tuple[int, ...]
    taps: dict[int, str]

    @property
    def names(self) -> list[str]:
        """Of the stored tensors."""
        return [*(f"state.{i}" for i in self.states), *(f"tap.{i}" for i in self.taps)]


def plan_of(network) -> Plan:
    """What a [`SideNetwork`] reads, in the narrowest form that does not change while it is trained."""
    blocks = network.places[-1] + 1
    states = {blocks - 1, *(() if network.readout is None else map(int, network.readout.down))}
    taps = {}
    for place, downsample in zip(network.places, network.downsample, strict=True):
        if isinstance(downsample, LinearDownsample):
            states.add(place)
        elif place not in states:
            taps[place] = _downsampler(downsample)
    return Plan(blocks, tuple(sorted(states)), {i: tap for i, tap in taps.items() if i not in states})


def _downsampler(downsample: Downsample) -> str:
    fixed = [describe(getattr(downsample, name)) for name in getattr(downsample, "fixed_parameters", ())]
    settings = {name: getattr(downsample, name, None) for name in ("kind", "side_size")}
    return digest([type(downsample).__name__, settings, fixed])


def base_fingerprint(stack: nn.Module) -> str:
    """Of the configuration and all tensors of a decoder stack, quantised ones too. Reads every byte of them once.

    Raises:
        MissingWeightsError: weights are not in memory.
    """
    require_weights(stack, "a hidden-state cache")
    config = {name: value for name, value in stack.config.to_dict().items() if name not in _IRRELEVANT}
    config["attention"] = stack.config._attn_implementation
    tensors = {}
    for name, module in stack.named_modules():
        for part, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                tensors[f"{name}.{part}"] = [describe(tensor), _described(getattr(tensor, "quant_state", None))]
        tensors[f"{name}.compute_dtype"] = str(getattr(module, "compute_dtype", None))
    return digest([config, tensors])


def _described(state):
    """A quantised weight's constants, nested ones too."""
    if isinstance(state, torch.Tensor):
        return describe(state)
    if hasattr(state, "__dict__"):
        return {name: _described(value) for name, value in sorted(vars(state).items())}
    return str(state)


def description(plan: Plan, base: str, storage: str, compute: str) -> dict:
    """All that states which fit each other have in common; its digest is their folder's name.

    Args:
        base: its fingerprint.
        compute: the dtype of autocast, under which the base runs.
    """
    taps = {str(i): tap for i, tap in plan.taps.items()}
    return {
        "format": FORMAT_VERSION,
        "base": base,
        "storage": storage,
        "compute": compute,
        **asdict(plan),
        "taps": taps,
    }


def stamp(modules: Iterable[nn.Module], downsamplers: Iterable[Downsample]) -> tuple:
    """Changes when a tensor of the base, or a fixed one of a downsampler, is replaced, moved or written to in place.

    Writing through `.data` does not show.
    """
    of_base = (tensor for m in modules for tensor in (*m._parameters.values(), *m._buffers.values()))
    fixed = (getattr(part, name) for part in downsamplers for name in getattr(part, "fixed_parameters", ()))
    return tuple((t.data_ptr(), t._version) for tensors in (of_base, fixed) for t in tensors if t is not None)
