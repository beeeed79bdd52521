"""Saving an adapter leaves the 4-bit weights of its base as they are, whatever layout they are in."""

import copy

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from bitsandbytes.nn import Linear4bit

from tests.architectures import digest, in_nf4, side_tuned


def pack(model):
    """What bitsandbytes does at the first forward on a processor with AVX512-BF16; possible on any."""
    for module in model.modules():
        if isinstance(module, Linear4bit) and not getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            module.weight.data, module.weight.quant_state = _convert_weight_packed_for_cpu(
                module.weight.data, module.weight.quant_state
            )


@pytest.fixture
def base(tmp_path):
    model = in_nf4(tmp_path)
    pack(model)
    return model


def test_bare_base_is_changed_by_its_state_dict(base):
    """The reason for the module under test; if this fails, bitsandbytes has been repaired and the module can go."""
    before = digest(base)
    base.state_dict()
    pack(base)
    assert digest(base) != before


def test_tuned_base_is_not_changed(base, tmp_path):
    before = digest(base)
    model = side_tuned(model=base, awake=True)
    model.state_dict()
    model.save_pretrained(tmp_path / "adapter")
    copy.deepcopy(model).state_dict()
    assert digest(model.get_base_model()) == before
    assert all(m.weight.quant_state.packing_format_for_cpu for m in base.modules() if isinstance(m, Linear4bit))


def test_collected_state_dict_is_what_bitsandbytes_gives(base):
    twin = copy.deepcopy(base)
    expected = twin.state_dict()
    got = side_tuned(model=base).get_base_model().state_dict()
    got = {name.replace(".base_layer.", "."): tensor for name, tensor in got.items() if "qst_net" not in name}
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_unloaded_base_has_no_hooks(base):
    unloaded = side_tuned(model=base).unload()
    assert not any(m._state_dict_pre_hooks or m._state_dict_hooks for m in unloaded.modules())
