"""The figures of mixtures of experts: what is counted on the meta device is what a real model has."""

import json

import pytest
import torch

from benchmarks.compression import mixtures
from hf_qst import MixedRankConfig
from hf_qst.base_model import fused_experts
from hf_qst.mixed_rank import compress
from tests.architectures import token_batch
from tests.mixtures import CONFIGS, tiny_mixture


def test_predicted_bytes_are_those_of_a_quantised_model():
    found = mixtures.check()
    assert found["predicted"] == pytest.approx(found["measured"], rel=0.005)
    assert found["measured"] < found["before"] / 2


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_said_to_be_in_reach_is_compressed(name):
    found = mixtures.reach(mixtures.on_meta(CONFIGS[name]()))
    model = tiny_mixture(name)
    result = compress(model, MixedRankConfig(calibration_data=[{"input_ids": token_batch(4, 12)}], progress=False))
    sizes = sum(layer.in_features * layer.out_features for layer in result.factors.values())
    fused = fused_experts(model)
    for dense in result.dense:
        path, _, part = dense.rpartition(".")
        if path.rpartition(".")[0] in fused:
            projection = getattr(fused[path.rpartition(".")[0]], "down_proj" if part == "down" else "gate_up_proj")
            sizes += projection[0].numel()
        else:
            sizes += model.get_submodule(dense).weight.numel()
    assert found["reached"] == sizes and 0.8 < found["part_of_blocks"] <= 1


def test_the_committed_figures_are_those_of_the_shapes():
    known = json.loads(mixtures.RESULT.read_text())["models"]
    assert known.keys() == mixtures.SHAPES.keys()
    name = "gpt-oss-20b"
    assert known[name]["reach"] == mixtures.reach(mixtures.on_meta(mixtures.SHAPES[name]()))
    assert known[name]["pruned_part_of_blocks"] == mixtures.prunable(mixtures.on_meta(mixtures.SHAPES[name]()))
    assert all(one["reach"]["part_of_blocks"] > 0.99 for one in known.values())
    assert all(one["pruned_part_of_blocks"] > 0.99 for one in known.values())
    assert torch.get_default_device().type == "cpu"
