"""Quantized side tuning (Zhang et al., ACL 2024): a side network trained next to a frozen, quantised base."""

from hf_qst.qst.apart import learn_apart
from hf_qst.qst.config import QSTConfig
from hf_qst.qst.hidden_states.config import HiddenStateCacheConfig, HiddenStateCacheError
from hf_qst.qst.hidden_states.filling import (
    FillReport,
    fill_hidden_state_cache,
    hidden_state_cache,
    set_hidden_state_cache,
)
from hf_qst.qst.in_turn import InTurn
from hf_qst.qst.layer import QSTLayer, SideNetworkMergeError
from hf_qst.qst.model import QSTModel
from hf_qst.qst.shared_prompt import SharedPrompt, prefill
from hf_qst.qst.side_network import SideNetwork, Taps
from hf_qst.tuner.registration import register_method

register_method(QSTConfig, QSTModel)

__all__ = [
    "FillReport",
    "HiddenStateCacheConfig",
    "HiddenStateCacheError",
    "InTurn",
    "QSTConfig",
    "QSTLayer",
    "QSTModel",
    "SharedPrompt",
    "SideNetwork",
    "SideNetworkMergeError",
    "Taps",
    "fill_hidden_state_cache",
    "hidden_state_cache",
    "learn_apart",
    "prefill",
    "set_hidden_state_cache",
]
