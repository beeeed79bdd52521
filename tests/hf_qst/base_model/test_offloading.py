"""Models whose weights are not in memory are named before any work is done."""

import pytest
import torch
from accelerate import cpu_offload
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from hf_qst import DISPConfig, prune_model
from hf_qst.base_model.offloading import MissingWeightsError, input_device, is_offloaded
from hf_qst.mixed_rank import MixedRankConfig, compress_model
from tests.architectures import side_tuned, tiny, token_batch

DATA = [{"input_ids": token_batch(4, 12, seed=s)} for s in range(2)]


def config(**changes):
    return MixedRankConfig(keep_ratio=0.5, calibration_data=DATA, progress=False, **changes)


READERS = {
    "MixedRankConfig": lambda model: get_peft_model(model, config()),
    "MixedRankConfig, in place": lambda model: compress_model(model, config()),
    "MixedRankConfig.residual.reference_model": lambda model: get_peft_model(
        tiny("llama"), config(residual={"reference_model": model})
    ),
    "prune_model": lambda model: prune_model(model, "magnitude", 0.5),
    "DISPConfig": lambda model: get_peft_model(model, DISPConfig(keep_ratio=0.5)),
}


def offloaded(tmp_path, kind):
    if kind == "cpu_offload":
        model = tiny("llama")
        cpu_offload(model, execution_device=torch.device("cpu"))
        return model
    tiny("llama").save_pretrained(tmp_path / "dense")
    where = {"device_map": "auto", "max_memory": {"cpu": "100KB"}, "offload_folder": tmp_path / "offload"}
    return AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **where)


@pytest.mark.parametrize("kind", ["device_map", "cpu_offload"])
@pytest.mark.parametrize("reader", READERS)
def test_an_offloaded_model_is_named(reader, kind, tmp_path):
    model = offloaded(tmp_path, kind)
    with torch.no_grad():
        before = model(**DATA[0]).logits
    with pytest.raises(MissingWeightsError, match=rf"^{reader.split(',')[0]} reads .* offloaded .*device_map"):
        READERS[reader](model)
    with torch.no_grad():
        assert torch.equal(model(**DATA[0]).logits, before)


@pytest.mark.parametrize("reader", [reader for reader in READERS if reader != "DISPConfig"])
def test_a_model_without_weights_is_named(reader):
    with pytest.raises(
        MissingWeightsError, match=r"'model\.embed_tokens\.weight' is not in memory: it was never loaded"
    ):
        READERS[reader](tiny("llama").to("meta"))


def test_pruning_on_the_meta_device_is_for_planning():
    model = get_peft_model(tiny("llama").to("meta"), DISPConfig(keep_ratio=0.5))
    with pytest.raises(MissingWeightsError, match=r"merge_and_unload\(\) reads"):
        model.merge_and_unload()


def test_saved_factors_are_not_put_on_an_offloaded_base(tmp_path):
    get_peft_model(tiny("llama"), config()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(MissingWeightsError, match=r"MixedRankConfig reads .* offloaded"):
        PeftModel.from_pretrained(offloaded(tmp_path, "cpu_offload"), tmp_path / "adapter")


@pytest.mark.parametrize("kind", ["device_map", "cpu_offload"])
def test_principal_directions_of_an_offloaded_base_are_those_of_the_base(kind, tmp_path):
    base = offloaded(tmp_path, kind)
    assert is_offloaded(base) and input_device(base).type == "cpu"
    settings = {"downsample": "principal", "calibration_data": DATA}
    found, expected = (
        {
            n: b
            for n, b in side_tuned(model=model, **settings).named_parameters()
            if n.endswith((".directions", ".mean"))
        }
        for model in (base, tiny("llama"))
    )
    assert found and all(torch.equal(found[name], expected[name]) for name in expected)


def test_principal_directions_of_a_base_without_weights_are_refused():
    with pytest.raises(MissingWeightsError, match=r"QSTConfig\.downsample='principal' reads"):
        side_tuned(model=tiny("llama").to("meta"), downsample="principal", calibration_data=DATA)
