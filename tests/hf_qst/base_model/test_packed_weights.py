"""Saving an adapter leaves the 4-bit weights of its base as they are, whatever layout they are in."""

import copy

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from bitsandbytes.nn import Linear4bit, LinearNF4
from peft import LoraConfig, get_peft_model

from hf_qst.base_model.packed_weights import nf4_weight
from hf_qst_kernels.nf4_weight import naive_weight
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


def linear4bit(inputs=64, outputs=96, kind=Linear4bit, blocksize=64, **settings):
    if kind is Linear4bit:
        settings = {"quant_type": "nf4", **settings}
    layer = kind(inputs, outputs, compute_dtype=torch.float32, **settings)
    layer.weight.blocksize = blocksize
    return layer.to("cpu")


@pytest.mark.parametrize("double", [False, True])
def test_kernels_read_what_the_layer_multiplies_with(double):
    for layer in (linear4bit(compress_statistics=double), linear4bit(kind=LinearNF4, compress_statistics=double)):
        weight = nf4_weight(layer)
        assert (weight.nested_absmax is not None) == double and weight.packed.data_ptr() == layer.weight.data_ptr()
        torch.testing.assert_close(
            torch.eye(64) @ naive_weight(weight, torch.float32).T + layer.bias, layer(torch.eye(64))
        )


def test_kernels_do_not_read_other_layers(tmp_path):
    not_quantised = Linear4bit(64, 96, quant_type="nf4")
    packed = linear4bit()
    pack(packed)
    others = {
        "plain": torch.nn.Linear(64, 96),
        "not quantised": not_quantised,
        "packed": packed,
        "fp4": linear4bit(quant_type="fp4"),
        "blocks of 128": linear4bit(128, 96, blocksize=128),
        "a row ends inside a block": linear4bit(96, 64),
        "stored as bfloat16": linear4bit(quant_storage=torch.bfloat16),
        "no layer": torch.nn.ReLU(),
    }
    assert [name for name, layer in others.items() if nf4_weight(layer) is not None] == []
    tuned = get_peft_model(in_nf4(tmp_path), LoraConfig(target_modules=["q_proj"]))
    adapter = tuned.base_model.model.model.layers[0].self_attn.q_proj
    assert type(adapter).__name__ == "Linear4bit" and nf4_weight(adapter) is None
    assert nf4_weight(adapter.base_layer) is not None
