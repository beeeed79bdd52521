"""Reshaped models in vLLM: the tokens and probabilities of transformers, and what is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs

from hf_qst import MixedRankConfig, compress_model
from hf_qst.errors import CheckpointError, ReshapedModelError
from hf_qst.pruning import prune_blocks
from hf_qst_plugins.serving.reshaped_models import SERVED, ReshapedForCausalLM
from tests.plugins.serving.in_vllm import HEADS, engine, require_same
from tests.pruned_models import random_masks
from tests.tiny_decoders import tiny_decoder


def pruned(model):
    return prune_blocks(model, random_masks(model))


def factorised(model):
    return compress_model(model, MixedRankConfig(keep_ratio=0.6))


def both(model):
    return factorised(pruned(model))


def save(model, folder):
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with a pruned and factorised Llama."""
    return save(both(tiny_decoder("llama", **HEADS)), tmp_path_factory.mktemp("small"))


def require_transformers(folder, **options):
    return require_same(folder, AutoModelForCausalLM.from_pretrained(folder).eval(), **options)


@pytest.mark.parametrize("reshaped", [pruned, factorised, both])
def test_greedy_tokens_are_those_of_transformers(reshaped, tmp_path):
    dense = tiny_decoder("llama", **HEADS)
    before = dense.num_parameters()
    model = reshaped(dense)
    assert model.num_parameters() < 0.8 * before
    assert require_transformers(save(model, tmp_path)) is ReshapedForCausalLM


def test_a_block_that_keeps_everything_stays_whole(tmp_path):
    """Blocks of one class, some with narrowed or factorised layers and some without."""
    model = tiny_decoder("llama", **HEADS)
    masks = random_masks(model)
    for name, mask in masks[0].items():
        masks[0][name] = torch.ones_like(mask)
    prune_blocks(model, masks)
    compress_model(model, MixedRankConfig(keep_ratio=0.6, target_modules=r".*layers\.[12]\..*(q|gate)_proj"))
    require_transformers(save(model, tmp_path))


@pytest.mark.parametrize("model_type", [name for name in SERVED if name != "llama"])
def test_architectures(model_type, tmp_path):
    require_transformers(save(both(tiny_decoder(model_type, **HEADS)), tmp_path))


# --- what is refused ----------------------------------------------------------------------------------------------------


def build(folder, **options):
    """The model as vLLM's worker makes it."""
    options = {"dtype": "float32", "skip_tokenizer_init": True, **options}
    settings = EngineArgs(folder, **options).create_engine_config()
    with set_current_vllm_config(settings):
        return ReshapedForCausalLM(vllm_config=settings)


def test_other_architectures_are_refused(tmp_path):
    folder = save(factorised(tiny_decoder("opt")), tmp_path)
    with pytest.raises(ValueError, match=r"of the types .* llama, .* in vLLM, got opt\. .*hf_qst.to_dense"):
        build(folder)


@pytest.mark.parametrize("argument", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_several_processes_are_refused(small, argument):
    with pytest.raises(ValueError, match=f"need {argument}=1, got 2"):
        build(small, **{argument: 2})


def test_quantisation_by_vllm_is_refused(small):
    with pytest.raises(ValueError, match="need quantization=None, got 'fp8'"):
        build(small, quantization="fp8", dtype="bfloat16")


def test_a_folder_in_4_bits_is_refused_and_served_after_dequantisation(small, tmp_path):
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantised = AutoModelForCausalLM.from_pretrained(small, quantization_config=nf4)
    with pytest.raises(ValueError, match="Unknown quantization method: bitsandbytes"):  # vLLM's own words
        build(save(quantised, tmp_path / "nf4"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4").dequantize()
    require_transformers(save(model, tmp_path / "dequantised"))


def test_a_damaged_folder_is_refused(small, tmp_path):
    folder = save(AutoModelForCausalLM.from_pretrained(small), tmp_path)
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 64
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        engine(folder)


def test_a_users_own_class_is_refused(tmp_path):
    """Also one with the name of transformers' own, whose folder names the same architecture."""
    model = tiny_decoder("llama", **HEADS)
    model.__class__ = type("LlamaForCausalLM", (LlamaForCausalLM,), {"__module__": __name__})
    folder = save(factorised(model), tmp_path)
    with pytest.raises(ReshapedModelError, match="was saved by the class"):
        engine(folder)
