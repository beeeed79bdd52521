"""Every damaged file is loaded with the same numbers or refused; none is loaded with others, and none hangs.

`--cases` says how many damaged copies of each kind are tried; a few by default, 1,000 and more with `make test-damage`.
"""

import gc
import resource

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_qst import MixedRankConfig
from hf_qst_plugins.adaptive_temperature import VocabularyTable
from hf_qst_plugins.code_evaluation import read_samples
from peft import PeftModel, get_peft_model
from tests.conformance.methods import LINES, logits, small
from tests.damage.outcomes import load_damaged
from tests.reshaped_toys import reshaped


@pytest.fixture
def cases(request):
    return request.config.getoption("--cases")


@pytest.fixture(autouse=True)
def quiet():
    before = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    yield
    transformers.utils.logging.set_verbosity(before)


def require(outcomes):
    """Nothing silent, nothing that hangs, and no error of ours that names neither the file nor what is in it."""
    print(outcomes)
    assert not outcomes.wrong, str(outcomes)
    assert outcomes.counts["refused by name"] > sum(outcomes.counts.values()) / 4


@pytest.mark.parametrize("line", LINES)
def test_adapters(line, cases, tmp_path):
    line = LINES[line]
    line.random().save_pretrained(tmp_path / "saved")
    line.random(seed=8).save_pretrained(tmp_path / "other")

    def load(folder):
        return logits(PeftModel.from_pretrained(small(), str(folder)))

    load(tmp_path / "saved")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    names = (line.config_class.__name__,)
    require(load_damaged(tmp_path / "saved", tmp_path, load, cases, other=tmp_path / "other", names=names))
    # Kilobytes: an absurd size in a file does not become memory.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def save_reshaped(folder, seed: int, quantised: bool, shard: str):
    torch.manual_seed(seed)
    model = reshaped()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder, max_shard_size=shard)
    if quantised:
        settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings).save_pretrained(folder)


@pytest.mark.parametrize(
    ("quantised", "shard"), [(False, "1GB"), (False, "60KB"), (True, "1GB")], ids=["dense", "sharded", "nf4"]
)
def test_reshaped_models(quantised, shard, cases, tmp_path):
    for name, seed in (("saved", 1), ("other", 2)):
        save_reshaped(tmp_path / name, seed, quantised, shard)

    def load(folder):
        return logits(AutoModelForCausalLM.from_pretrained(folder))

    require(load_damaged(tmp_path / "saved", tmp_path, load, cases, other=tmp_path / "other"))
    gc.collect()
