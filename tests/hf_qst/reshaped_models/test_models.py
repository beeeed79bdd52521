"""Models with changed modules: loaded by the Auto classes in another process, quantised, tuned, made dense again."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    Trainer,
    TrainingArguments,
    pipeline,
)

from hf_qst import MixedRankConfig, compress_model
from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.reshaped_models import MODEL_TYPE, ReshapedModelError, reshape_model, to_dense
from tests.architectures import NF4, side_tuned, tiny
from tests.reshaped_toys import (
    IDS,
    NAMES,
    VISION,
    Factorised,
    SelectedNorm,
    auto_class,
    load,
    outputs,
    reshaped,
    reshaped_image_classifier,
    same,
)
from tests.toy_data import token_dataset, tokenizer

ROOT = Path(__file__).parents[3]


def python(code, *arguments):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "plugins")))},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder for each architecture, holding its model and beside it what the model computes."""
    root = tmp_path_factory.mktemp("reshaped")
    for name in NAMES:
        model = reshaped_image_classifier(name) if name in VISION else reshaped(name)
        model.save_pretrained(root / name)
        save_file(outputs(model), root / f"{name}.expected.safetensors")
    return root


@pytest.fixture
def saved(folders, tmp_path):
    return Path(shutil.copytree(folders / "llama", tmp_path / "model"))


FRESH = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

root = Path(sys.argv[1])
try:
    AutoModelForCausalLM.from_pretrained(root / "llama")
except ValueError as error:
    assert "hf_qst_reshaped" in str(error)
else:
    raise AssertionError("loaded without hf_qst")

import hf_qst
from tests import reshaped_toys as toys

torch.set_num_threads(1)
for name in toys.NAMES:
    found = toys.outputs(toys.auto_class(name).from_pretrained(root / name))
    for key, expected in load_file(root / f"{name}.expected.safetensors").items():
        assert torch.equal(found[key], expected), (name, key)
    print(name, end=" ")
"""


def test_fresh_process_gives_the_same_logits_and_tokens(folders):
    assert python(FRESH, folders).split() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_to_dense_is_a_plain_model_of_the_same_function(folders, name, tmp_path):
    small = auto_class(name).from_pretrained(folders / name)
    before = copy.deepcopy(small.state_dict())
    dense = to_dense(small)
    expected = outputs(small)["logits"]
    torch.testing.assert_close(outputs(dense)["logits"], expected, atol=2e-5, rtol=1e-4)
    assert all(torch.equal(tensor, before[key]) for key, tensor in small.state_dict().items())
    assert type(dense).__module__.startswith("transformers.models.")
    assert type(dense.config).__module__.startswith("transformers.models.")
    dense.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == small.config.base_model_type
    plain, info = auto_class(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(outputs(plain)["logits"], outputs(dense)["logits"])


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "gemma2"])
def test_loads_in_nf4(folders, name, tmp_path):
    """Every linear module inside the blocks is packed, those of the changed modules too, and saving keeps them so."""
    quantized = load(folders / name, quantization_config=BitsAndBytesConfig(**NF4), device_map={"": "cpu"})
    blocks = find_decoder_stack(quantized).blocks
    inner = [m for block in blocks[:2] for m in block.modules() if isinstance(m, nn.Linear)]
    assert len(inner) > 8
    assert {type(m).__name__ for m in inner} == {"Linear4bit"}
    quantized.save_pretrained(tmp_path)
    assert same(load(tmp_path, device_map={"": "cpu"}), quantized)
    expected = outputs(load(folders / name))["logits"]
    found = outputs(quantized)["logits"]
    assert nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.9
    with pytest.raises(ReshapedModelError, match="quantised"):
        to_dense(quantized)


def test_dtype_is_the_one_asked_for_and_indices_stay_whole(saved, tmp_path):
    load(saved, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    half = load(tmp_path / "half", device_map={"": "cpu"})
    full = load(tmp_path / "half", dtype=torch.float32)
    for model, dtype in ((half, torch.bfloat16), (full, torch.float32)):
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model.model.layers[1].mlp.up_proj.input_index.dtype == torch.int32
    assert all(torch.equal(p.float(), q) for p, q in zip(half.parameters(), full.parameters(), strict=True))


def test_tied_embeddings_stay_tied(tmp_path):
    model = reshaped(tie_word_embeddings=True)
    model.tie_weights()
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert same(loaded, model)


def test_base_model_and_a_new_head_load_from_the_same_folder(saved, tmp_path):
    with torch.no_grad():
        expected = load(saved).model(IDS).last_hidden_state
        assert torch.equal(AutoModel.from_pretrained(saved)(IDS).last_hidden_state, expected)
        classifier = AutoModelForSequenceClassification.from_pretrained(saved, num_labels=4)
        assert torch.equal(classifier.model(IDS).last_hidden_state, expected)
    assert classifier.score.out_features == 4
    classifier.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    classifier.config.pad_token_id = again.config.pad_token_id = 0
    assert torch.equal(again(IDS).logits, classifier.eval()(IDS).logits)


def test_reshaped_classifier_reloads(tmp_path):
    model = reshaped(classifier=True, num_labels=3)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert again.score.out_features == 3 and torch.equal(again(IDS).logits, model(IDS).logits)
    dense = to_dense(again)
    torch.testing.assert_close(dense(IDS).logits, model(IDS).logits, atol=1e-5, rtol=1e-4)
    assert {type(m).__module__.partition(".")[0] for m in dense.modules()} == {"torch", "transformers"}


def test_config_answers_like_the_architectures_own(saved):
    original, config = tiny("llama").config, AutoConfig.from_pretrained(saved)
    assert isinstance(config, LlamaConfig) and type(config) is type(load(saved).config)
    ours = {"base_model_type", "hf_qst_format", "reshaped_from", "reshaped_modules"}
    fields = {k: v for k, v in config.to_dict().items() if k not in {*ours, "architectures", "_name_or_path"}}
    assert fields == {k: original.to_dict()[k] for k in fields}
    assert config.model_type == config.base_model_type == "llama"
    stored = json.loads((saved / "config.json").read_text())
    assert (stored["model_type"], stored["hf_qst_format"]) == (MODEL_TYPE, 1)
    config.save_pretrained(saved)
    assert json.loads((saved / "config.json").read_text()) == stored
    assert "quantization_config" not in stored


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_from_config_builds_the_same_shapes(folders, name):
    model = auto_class(name).from_config(AutoConfig.from_pretrained(folders / name))
    expected = auto_class(name).from_pretrained(folders / name).state_dict()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in expected.items()}
    assert all(torch.isfinite(v).all() for v in outputs(model).values())


def test_a_pickled_config_makes_the_reshaped_model_in_another_process(tmp_path):
    """As servers hand it to their workers."""
    model = compress_model(tiny("llama"), MixedRankConfig(keep_ratio=0.5))
    (tmp_path / "config").write_bytes(pickle.dumps(model.config))
    made = python(
        """
import pickle, sys
from transformers import AutoModelForCausalLM
with open(sys.argv[1], "rb") as file:
    config = pickle.load(file)
print(AutoModelForCausalLM.from_config(config).num_parameters())
""",
        tmp_path / "config",
    )
    assert int(made) == model.num_parameters()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_models_of_the_same_class(saved, copied):
    model = load(saved)
    twin = copied(model)
    assert type(twin) is type(model) and type(twin.config) is type(model.config)
    assert twin.config is not model.config and same(twin, model)


def test_attention_implementation_can_be_exchanged(saved):
    model = load(saved)
    expected = outputs(model)["logits"]
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(outputs(model)["logits"], expected, atol=1e-5, rtol=1e-5)


def test_pipeline_with_the_tokenizer_beside_the_model(saved):
    tokenizer().save_pretrained(saved)
    words = AutoTokenizer.from_pretrained(saved)
    assert words("t3 t9")["input_ids"] == [3, 9]
    generate = pipeline("text-generation", model=str(saved), device="cpu")
    text = generate("t3 t9", max_new_tokens=6, do_sample=False)[0]["generated_text"]
    tokens = load(saved).generate(torch.tensor([[3, 9]]), max_new_tokens=6, do_sample=False)
    assert text.replace(" ", "") == words.decode(tokens[0], skip_special_tokens=True).replace(" ", "")


def test_libraries_that_look_for_the_class_by_name_find_the_right_one(saved):
    """TRL does so for `SFTTrainer("folder")`, a pipeline when the Auto class refuses; a plain class would be wrong."""
    from trl.trainer.utils import create_model_from_path

    assert same(create_model_from_path(str(saved)), load(saved))
    damaged = saved / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 64
    damaged.write_bytes(content)
    with pytest.raises(ValueError, match="checksum"):
        pipeline("text-generation", model=str(saved), tokenizer=tokenizer(), device="cpu")


def losses_in_training(model, folder, steps):
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        save_steps=steps,
        learning_rate=5e-3,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        label_smoothing_factor=0.1,
    )
    trainer = Trainer(model, arguments, train_dataset=token_dataset(16))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer_trains_and_its_checkpoint_reloads(saved, tmp_path):
    model = load(saved)
    losses = losses_in_training(model, tmp_path / "run", 8)
    assert losses[-1] < losses[0]
    assert not same(model, load(saved))
    assert same(load(tmp_path / "run" / "checkpoint-8"), model)
    # Smoothed labels are shifted for classes whose name Trainer knows.
    assert losses[0] == pytest.approx(losses_in_training(to_dense(load(saved)), tmp_path / "dense", 1)[0], rel=1e-4)


def test_lora_on_a_loaded_model(saved, tmp_path):
    tuned = get_peft_model(
        load(saved), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    )
    assert any("up_proj.down.lora_A" in name for name, _ in tuned.named_parameters())
    tuned.save_pretrained(tmp_path / "lora")
    expected = outputs(tuned)["logits"]
    assert torch.equal(outputs(PeftModel.from_pretrained(load(saved), tmp_path / "lora"))["logits"], expected)
    assert torch.equal(outputs(load(tmp_path / "lora"))["logits"], expected)
    assert torch.equal(
        outputs(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora"))["tokens"], outputs(tuned)["tokens"]
    )
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(outputs(load(tmp_path / "merged"))["logits"], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"quantization_config": BitsAndBytesConfig(**NF4)}])
def test_side_network_on_a_loaded_model(saved, tmp_path, settings):
    tuned = side_tuned(model=load(saved, **settings), awake=True)
    tuned.save_pretrained(tmp_path / "side")
    again = PeftModel.from_pretrained(load(saved, **settings), tmp_path / "side")
    assert torch.equal(outputs(again)["tokens"], outputs(tuned)["tokens"])
    assert not torch.equal(outputs(tuned)["logits"], outputs(load(saved, **settings))["logits"])


def test_changed_modules_inside_changed_modules(saved, tmp_path):
    """A pruned model is factorised: the factors stand inside the pruned module. Its norms are exchanged too."""
    model = load(saved)
    for layer in model.model.layers:
        layer.input_layernorm = SelectedNorm(layer.input_layernorm, 50)
    up = model.model.layers[1].mlp.up_proj
    up.linear = Factorised(up.linear, 7)
    reshape_model(model).save_pretrained(tmp_path / "twice")
    loaded = load(tmp_path / "twice")
    assert loaded.config.reshaped_modules["layers.1.mlp.up_proj.linear"] == {"kind": "toy_factors", "rank": 7}
    assert same(loaded, model)
    torch.testing.assert_close(outputs(to_dense(loaded))["logits"], outputs(model)["logits"], atol=2e-5, rtol=1e-4)
