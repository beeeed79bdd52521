"""Damaged or foreign folders of reshaped models are refused by name; saving leaves a whole folder or the old one."""

import json
import resource
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from hf_qst.errors import CheckpointError
from hf_qst.reshaped_models import MANIFEST_NAME, ReshapedModelError, register_kind, reshape_model, to_dense
from tests.architectures import tiny
from tests.reshaped_toys import Factorised, load, outputs, reshaped
from tests.toy_data import tokenizer

WEIGHTS = "model.safetensors"
TENSOR = "model.layers.1.mlp.up_proj.linear.weight"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders") / "model"
    reshaped().save_pretrained(folder)
    return folder


@pytest.fixture
def saved(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def rewrite_json(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def content_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


DAMAGE = {
    "missing": (lambda tensors: tensors.pop(TENSOR), "is missing"),
    "extra": (lambda tensors: tensors.update({TENSOR + "_2": torch.ones(2)}), "not in its manifest"),
    "nan": (lambda tensors: tensors[TENSOR][0].fill_(torch.nan), "NaN"),
    "dtype": (lambda tensors: tensors.update({TENSOR: tensors[TENSOR].bfloat16()}), "dtype bfloat16"),
    "shape": (lambda tensors: tensors.update({TENSOR: tensors[TENSOR][1:].clone()}), "has shape"),
    "flipped_bit": (lambda tensors: tensors[TENSOR].view(torch.int32)[0, 0].bitwise_xor_(1), "checksum"),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("sharded", [False, True])
def test_damaged_tensor_is_named(saved, damage, sharded):
    if sharded:
        load(saved).save_pretrained(saved, max_shard_size="60KB")
        weight_map = json.loads((saved / "model.safetensors.index.json").read_text())["weight_map"]
        assert len(set(weight_map.values())) > 3
    file = saved / (weight_map[TENSOR] if sharded else WEIGHTS)
    tensors = load_file(file)
    DAMAGE[damage][0](tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=DAMAGE[damage][1]) as error:
        load(saved)
    assert file.name in str(error.value) and TENSOR in str(error.value)


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST_NAME])
def test_truncated_file_is_named(saved, name):
    (saved / name).write_bytes((saved / name).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{name} is not"):
        load(saved)


@pytest.mark.parametrize("name", [WEIGHTS, MANIFEST_NAME])
def test_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load(saved)


def test_missing_shard_and_wrong_index_are_named(saved):
    load(saved).save_pretrained(saved, max_shard_size="60KB")
    index = saved / "model.safetensors.index.json"
    before = index.read_text()
    rewrite_json(index, lambda content: content["weight_map"].pop(TENSOR))
    with pytest.raises(CheckpointError, match=TENSOR):
        load(saved)
    index.write_text(before)
    shard = json.loads(before)["weight_map"][TENSOR]
    (saved / shard).unlink()
    with pytest.raises(CheckpointError, match=f"{shard} is missing"):
        load(saved)


def test_weights_of_another_save_are_named(saved):
    shutil.copy(saved / WEIGHTS, saved / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"00001-of-00002\.safetensors is not in the manifest"):
        load(saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda modules: modules["layers.0.mlp.up_proj"].update(rank=3), "'rank': 3"),
        (lambda modules: modules.pop("layers.0.mlp.up_proj"), "None"),
    ],
)
def test_description_that_disagrees_with_the_tensors_is_named(saved, change, words):
    rewrite_json(saved / "config.json", lambda content: change(content["reshaped_modules"]))
    for loader in (AutoModelForCausalLM, type(reshaped())):
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj") as error:
            loader.from_pretrained(saved)
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda content: content.update(hf_qst_format=7), "hf_qst_format 7.*reads 1; update hf_qst"),
        (lambda content: content.pop("hf_qst_format"), "hf_qst_format None"),
        (lambda content: content.update(base_model_type="warp"), "base_model_type 'warp'"),
    ],
)
def test_config_of_another_format_is_refused(saved, change, words):
    rewrite_json(saved / "config.json", change)
    with pytest.raises(ReshapedModelError, match=words):
        load(saved)


def test_newer_manifest_is_refused(saved):
    rewrite_json(saved / MANIFEST_NAME, lambda content: content.update(version=2))
    with pytest.raises(CheckpointError, match=r"version 2.*reads 1"):
        load(saved)


def test_unknown_kind_is_named_with_the_registered_ones(saved):
    for name, modules in (("config.json", "reshaped_modules"), (MANIFEST_NAME, "modules")):
        rewrite_json(saved / name, lambda content, m=modules: content[m]["layers.0.mlp.up_proj"].update(kind="warp"))
    with pytest.raises(ReshapedModelError, match=r"layers\.0\.mlp\.up_proj.*'warp'.*toy_factors.*toy_slice"):
        load(saved)


def test_description_of_a_module_that_is_not_there_is_named(saved):
    config = AutoConfig.from_pretrained(saved)
    config.reshaped_modules["layers.9.mlp"] = {"kind": "toy_factors", "rank": 2}
    with pytest.raises(ReshapedModelError, match=r"layers\.9\.mlp.*LlamaModel"):
        AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("existing", [False, True])
def test_weights_with_nan_leave_what_was_there(saved, tmp_path, existing):
    model = load(saved)
    with torch.no_grad():
        model.get_parameter(TENSOR)[0, 0] = torch.nan
    target = saved if existing else tmp_path / "new"
    before = content_of(saved)
    with pytest.raises(CheckpointError, match=f"{TENSOR}.*cannot be saved"):
        model.save_pretrained(target)
    assert content_of(saved) == before
    assert existing or not target.exists()


@pytest.mark.parametrize("existing", [False, True])
def test_failed_write_leaves_what_was_there(saved, tmp_path, existing):
    """Files over 100 kB cannot be written, as on a full disk."""
    model = load(saved)
    before = content_of(saved)
    target = saved if existing else tmp_path / "new"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises((OSError, SafetensorError)):
            model.save_pretrained(target)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert content_of(saved) == before
    assert existing or not target.exists()


def test_saving_over_a_folder_replaces_its_weights_and_keeps_the_rest(saved):
    tokenizer().save_pretrained(saved)
    model = load(saved)
    model.save_pretrained(saved, max_shard_size="60KB")
    assert not (saved / WEIGHTS).exists()
    expected = outputs(model)["tokens"]
    assert torch.equal(outputs(load(saved))["tokens"], expected)
    model.save_pretrained(saved)
    assert [f.name for f in saved.glob("model*")] == [WEIGHTS]
    assert (saved / "tokenizer.json").exists()
    assert torch.equal(outputs(load(saved))["tokens"], expected)


def test_model_card_says_how_to_load_once(saved):
    (saved / "README.md").write_text("# Mine\n")
    for _ in range(2):
        load(saved).save_pretrained(saved)
    text = (saved / "README.md").read_text()
    assert text.count("# Mine\n") == 1 and text.count("import hf_qst ") == 1
    assert text.count("AutoModelForCausalLM.from_pretrained") == 1


class OwnBuffer(Factorised):
    def __init__(self, dense, rank):
        super().__init__(dense, rank)
        self.register_buffer("scale", torch.ones(1), persistent=False)


class IsLinear(nn.Linear):
    describe = Factorised.describe
    rank = 3


class Unregistered(Factorised):
    def describe(self):
        return {"kind": "warp"}


class NotJson(Factorised):
    def describe(self):
        return {"kind": "toy_factors", "rank": torch.tensor(3)}


class WrongRank(Factorised):
    def describe(self):
        return {"kind": "toy_factors", "rank": self.rank + 1}


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (lambda dense: OwnBuffer(dense, 3), r"up_proj\.scale.*persistent"),
        (lambda dense: IsLinear(64, 128, bias=False), "up_proj.*nn.Linear"),
        (lambda dense: Unregistered(dense, 3), "up_proj.*'warp'.*toy_factors"),
        (lambda dense: NotJson(dense, 3), "up_proj.*not JSON"),
        (lambda dense: WrongRank(dense, 3), r"up_proj\.down\.weight.*\[3, 64\].*\[4, 64\]"),
        (lambda dense: dense, "no module"),
    ],
)
def test_module_that_could_not_be_rebuilt_is_refused_and_the_model_unchanged(module, words):
    model = tiny("llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = module(mlp.up_proj)
    plain, config = type(model), model.config
    with pytest.raises(ReshapedModelError, match=words):
        reshape_model(model)
    assert type(model) is plain and model.config is config and not hasattr(config, "reshaped_modules")


def test_module_outside_the_base_model_is_refused():
    model = reshaped()
    model.lm_head = Factorised(model.lm_head, 3)
    with pytest.raises(ReshapedModelError, match="lm_head"):
        reshape_model(model)


def test_what_is_no_reshaped_model_is_refused():
    with pytest.raises(ReshapedModelError, match="Linear"):
        reshape_model(nn.Linear(2, 2))
    with pytest.raises(ReshapedModelError, match="LlamaForCausalLM"):
        to_dense(tiny("llama"))


def test_kind_cannot_be_taken_over():
    register_kind("toy_once", Factorised)
    register_kind("toy_once", Factorised)
    with pytest.raises(ReshapedModelError, match=r"toy_once.*Factorised"):
        register_kind("toy_once", OwnBuffer)


def test_config_the_model_was_built_from_stays_as_it_was():
    model = tiny("llama")
    config, twin = model.config, type(model)(model.config)
    before = config.to_dict()
    model.model.layers[0].mlp.up_proj = Factorised(model.model.layers[0].mlp.up_proj, 3)
    reshape_model(model)
    assert twin.config is config and config.to_dict() == before
    assert model.model.layers[0].self_attn.config is model.config is not config
