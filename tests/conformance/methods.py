"""What `tests/conformance` asks of each method: one line a method, or a line for each way of using it.

A new method gets every test by one line. `test_registration` fails for a registered method without one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import get_peft_model

from hf_qst import DISPConfig, MixedRankConfig, QSTConfig
from hf_qst.errors import NoDenseWeightsError, SideNetworkMergeError
from hf_qst.tuner.registration import METHODS
from tests.architectures import tiny, token_batch

IDS = token_batch(rows=2, length=12)


@dataclass(frozen=True)
class Line:
    """How a method is built on a tiny Llama, and where it differs from the others.

    Args:
        config_class: the method's configuration.
        settings: its arguments, made anew for each configuration.
        identity: changes of them with which a fresh adapter computes what the base does, in evaluation mode.
        tolerance: absolute and relative difference of such an adapter; 0 where it is the base to the last bit.
        refuses: operations that are refused, with the error: "second", "disable", "delete", "unload", "merge_and_unload",
            "merge_adapter".
        edit: changes a setting of a saved configuration on which the shapes of the tensors depend, if there is one.
        mixes: whether rows of one batch may have different adapters.
        dtype_of_base: whether the weights always have the base's dtype, because they stand in its weights' place.
    """

    config_class: type
    settings: Callable[[], dict] = dict
    identity: dict = field(default_factory=dict)
    tolerance: float = 0.0
    refuses: dict[str, type[Exception]] = field(default_factory=dict)
    edit: Callable[[dict], object] | None = None
    dtype_of_base: bool = False
    mixes: bool = False

    def config(self, **changes):
        return self.config_class(**{"task_type": "CAUSAL_LM", **self.settings(), **changes})

    def model(self, base=None, adapter_name: str = "default", **changes):
        """A new adapter on a tiny base, or on `base`."""
        return get_peft_model(small() if base is None else base, self.config(**changes), adapter_name)

    def random(self, base=None, seed: int = 5, **changes):
        """One that computes something else than its base."""
        base = small() if base is None else base
        torch.manual_seed(seed)
        return self.model(base, **{"init_weights": False, **changes})

    def load_random(self, model, adapter_name: str, seed: int) -> None:
        """Add a second one to a model."""
        torch.manual_seed(seed)
        model.add_adapter(adapter_name, self.config(init_weights=False))

    @property
    def layer_class(self) -> type:
        return METHODS[self.config_class.method][1].tuner_layer_cls

    @property
    def container(self) -> str:
        """Name of the modules that hold the method's own tensors."""
        return self.layer_class.adapter_layer_names[0]

    def own(self, model) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in model.named_parameters() if self.container in name.split(".")}


def _mixed_rank() -> dict:
    data = [{"input_ids": token_batch(4, 12, seed=seed)} for seed in range(2)]
    return {"calibration_data": data, "keep_ratio": 0.5, "compensation": "none", "progress": False}


def _edit_rank(values: dict) -> None:
    values["rank_pattern"]["model.layers.0.self_attn.q_proj"] = 3


_WIDE = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_FULL_RANKS = {"rank_pattern": dict.fromkeys(_WIDE, 64) | dict.fromkeys(["k_proj", "v_proj"], 32)}
_IN_PLACE = dict.fromkeys(["second"], ValueError) | dict.fromkeys(
    ["disable", "delete", "unload", "merge_adapter"], NoDenseWeightsError
)

LINES = {
    "qst": Line(
        QSTConfig,
        lambda: {"r": 4, "downsample_rank": 4},
        refuses=dict.fromkeys(["merge_and_unload", "merge_adapter"], SideNetworkMergeError),
        edit=lambda values: values.update(r=2),
        mixes=True,
    ),
    "qst_tail": Line(
        QSTConfig,
        lambda: {"r": 4, "downsample_rank": 4, "tail_layers": 1, "tail_rank": 4},
        refuses=dict.fromkeys(["merge_and_unload", "merge_adapter"], SideNetworkMergeError),
        edit=lambda values: values.update(tail_rank=2),
        mixes=True,
    ),
    "disp": Line(
        DISPConfig, identity={"keep_ratio": 1.0}, edit=lambda values: values.update(hypernetwork_input_size=16)
    ),
    "mixed_rank": Line(
        MixedRankConfig,
        lambda: {**_mixed_rank(), "keep_base_weights": True},
        _FULL_RANKS,
        1e-4,
        edit=_edit_rank,
    ),
    "mixed_rank_in_place": Line(
        MixedRankConfig, _mixed_rank, _FULL_RANKS, 1e-4, _IN_PLACE, _edit_rank, dtype_of_base=True
    ),
}


def small(**changes):
    """The base: a random Llama of two layers in evaluation mode."""
    return tiny("llama", **{"num_hidden_layers": 2, **changes})


@torch.no_grad()
def logits(model) -> torch.Tensor:
    """[2, 12, vocabulary] in evaluation mode."""
    return model.eval()(input_ids=IDS, use_cache=False).logits


def disturb(line: Line, model, seed: int = 9) -> None:
    """Give all weights of the method's own other values, as training does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in line.own(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
