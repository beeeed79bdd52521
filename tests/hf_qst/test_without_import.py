"""Saved files in a program that does not import this package: what it prints names `import hf_qst`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from hf_qst import DISPConfig, MixedRankConfig, QSTConfig
from tests.architectures import tiny
from tests.reshaped_toys import IDS, load, reshaped, same
from tests.toy_data import tokenizer

SMALL = "small"

PROGRAM = """
import json, sys
from pathlib import Path
import transformers
from peft import (
    AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftMixedModel, PeftModel, PeftModelForCausalLM, get_peft_model
)
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, LlamaConfig,
    LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel, MistralForCausalLM, pipeline
)

transformers.logging.set_verbosity_error()
root = Path(sys.argv[1])
base = lambda: LlamaForCausalLM.from_pretrained(root / "base")
with_lora = lambda: get_peft_model(base(), LoraConfig(target_modules=["q_proj"]))
adapters = {
    "PeftModel": lambda folder: PeftModel.from_pretrained(base(), folder),
    "PeftModelForCausalLM": lambda folder: PeftModelForCausalLM.from_pretrained(base(), folder),
    "PeftMixedModel": lambda folder: PeftMixedModel.from_pretrained(base(), folder),
    "AutoPeftModelForCausalLM": AutoPeftModelForCausalLM.from_pretrained,
    "PeftConfig": PeftConfig.from_pretrained,
    "LoraConfig": LoraConfig.from_pretrained,
    "a second adapter": lambda folder: with_lora().load_adapter(folder, "second"),
    "transformers' load_adapter": lambda folder: base().load_adapter(str(folder)),
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "LlamaForCausalLM": LlamaForCausalLM.from_pretrained,
    "pipeline": lambda folder: pipeline("text-generation", model=str(folder), tokenizer=str(root / "base")),
}
models = {
    "AutoConfig": AutoConfig.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "AutoModelForCausalLM": AutoModelForCausalLM.from_pretrained,
    "AutoModelForSequenceClassification": AutoModelForSequenceClassification.from_pretrained,
    "trust_remote_code": lambda folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True),
    "LlamaForCausalLM": LlamaForCausalLM.from_pretrained,
    "LlamaModel": LlamaModel.from_pretrained,
    "LlamaForSequenceClassification": LlamaForSequenceClassification.from_pretrained,
    "MistralForCausalLM": MistralForCausalLM.from_pretrained,
    "LlamaConfig": lambda folder: LlamaForCausalLM.from_pretrained(folder, config=LlamaConfig.from_pretrained(folder)),
    "in 4 bits": lambda folder: LlamaForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(load_in_4bit=True)
    ),
    "ignore_mismatched_sizes": lambda folder: LlamaForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True),
    "pipeline": lambda folder: pipeline("text-generation", model=str(folder)),
}
printed = {}
for name in sys.argv[2:]:
    for way, load in (models if name == "small" else adapters).items():
        try:
            load(root / name)
            printed[f"{name}: {way}"] = "loaded"
        except Exception as error:
            printed[f"{name}: {way}"] = f"{type(error).__name__}: {error}"
assert not any(module.startswith("hf_qst") for module in sys.modules)
print(json.dumps(printed))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of a base model, of an adapter of each method, and of a model with changed shapes."""
    root = tmp_path_factory.mktemp("without_import")
    tiny("llama").save_pretrained(root / "base")
    tokenizer().save_pretrained(root / "base")
    for name, config in {
        "qst": QSTConfig(task_type="CAUSAL_LM", r=4),
        "disp": DISPConfig(task_type="CAUSAL_LM"),
        "mixed_rank": MixedRankConfig(
            task_type="CAUSAL_LM", calibration_data=[{"input_ids": IDS}], decomposition="plain", progress=False
        ),
    }.items():
        get_peft_model(LlamaForCausalLM.from_pretrained(root / "base"), config).save_pretrained(root / name)
    native = LlamaForCausalLM.from_pretrained(root / "base")
    native.add_adapter(QSTConfig(task_type="CAUSAL_LM", r=4))
    native.save_pretrained(root / "native")
    reshaped().save_pretrained(root / SMALL)
    tokenizer().save_pretrained(root / SMALL)
    return root


def test_every_way_of_loading_names_the_import(root, tmp_path):
    command = [sys.executable, "-c", PROGRAM, root, "qst", "disp", "mixed_rank", "native", SMALL]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=True)
    printed = json.loads(done.stdout)
    assert len(printed) == 4 * 11 + 13
    assert {way: text for way, text in printed.items() if "import hf_qst" not in text} == {}


@pytest.mark.parametrize("plain", [LlamaForCausalLM, LlamaModel, LlamaForSequenceClassification])
@pytest.mark.parametrize("own_config", [False, True])
def test_a_plain_class_refuses_changed_shapes_with_the_import_too(root, plain, own_config):
    """Also with the config that an Auto class read, or that of a loaded model."""
    for config in [load(root / SMALL).config, AutoConfig.from_pretrained(root / SMALL)] if own_config else [None]:
        with pytest.raises(ValueError, match=r"import hf_qst.*an Auto class"):
            plain.from_pretrained(root / SMALL, config=config)


def test_the_class_itself_loads_as_the_auto_class_does(root):
    expected = load(root / SMALL)
    own = type(expected).from_pretrained(
        root / SMALL, use_cache=False, dtype=torch.float32, attn_implementation="eager"
    )
    assert own.config.use_cache is False and own.config._attn_implementation == "eager"
    assert same(type(expected).from_pretrained(root / SMALL), expected)
    assert same(type(expected).from_pretrained(root / SMALL, config=expected.config), expected)


def rewrite(file: Path, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize("name", ["qst", "disp", "mixed_rank", "native"])
def test_adapters_with_the_short_name_load(root, name):
    """As they were saved before the name held the reminder."""
    assert json.loads((root / name / "adapter_config.json").read_text())["peft_type"].endswith(" before loading)")
    before = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(root / "base"), root / name).eval()
    rewrite(root / name / "adapter_config.json", lambda values: values.update(peft_type=values["peft_type"].split()[0]))
    after = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(root / "base"), root / name).eval()
    assert torch.equal(after(input_ids=IDS).logits, before(input_ids=IDS).logits)
    assert PeftConfig.from_pretrained(root / name).peft_type == after.peft_config["default"].peft_type


def test_folders_with_the_short_model_type_load(root, tmp_path):
    expected = load(root / SMALL)
    expected.save_pretrained(tmp_path)

    def as_before(values):
        values["model_type"] = values["model_type"].split()[0]
        del values["transformers_weights"]

    rewrite(tmp_path / "config.json", as_before)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path), expected)
    load(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="import hf_qst"):
        LlamaForCausalLM.from_pretrained(tmp_path)
