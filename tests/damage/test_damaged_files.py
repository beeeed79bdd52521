"""Every damaged file is loaded with the same numbers or refused; none is loaded with others, and none hangs.

`--cases` says how many damaged copies of each kind are tried; a few by default, 1,000 and more with `make test-damage`.
"""

import gc
import resource
import shutil

import pytest
import torch
import transformers
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_qst_kernels import break_even
from hf_qst_plugins.adaptive_temperature import DifficultyProbe, VocabularyTable
from hf_qst_plugins.adaptive_temperature.learned import CERTAINTY_FEATURES, FEATURES
from hf_qst_plugins.code_evaluation import read_samples
from hf_qst_plugins.code_evaluation.samples_file import SamplesFile
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


@pytest.mark.parametrize("line", LINES)
def test_weights_that_a_training_run_is_resumed_from(line, cases, tmp_path):
    """As Trainer reads a checkpoint, and the best one at the end: into an adapter that is there."""
    line = LINES[line]
    for name, seed in (("saved", 5), ("other", 8)):
        line.random(seed=seed).save_pretrained(tmp_path / name)
    model = line.random(seed=11)
    own = line.own(model)
    start = {name: parameter.detach().clone() for name, parameter in own.items()}

    def load(folder):
        for name, parameter in own.items():
            parameter.data.copy_(start[name])
        model.load_adapter(str(folder), "default", is_trainable=True)
        return torch.cat([parameter.detach().reshape(-1) for parameter in own.values()])

    require(load_damaged(tmp_path / "saved", tmp_path, load, cases, other=tmp_path / "other"))


def test_samples_of_an_evaluation(cases, tmp_path):
    (tmp_path / "saved").mkdir()
    with SamplesFile(tmp_path / "saved" / "samples.jsonl", {"seed": 1, "sampling": {"temperature": 0.5}}) as file:
        for number in range(6):
            text = {"task_id": f"HumanEval/{number}", "completion": "return 1\n", "detail": "", "outcome": "passed"}
            file.append({**text, "sample": 0, "program_parses": True, "tokens": 7, "seconds": 0.25})

    def load(folder):
        return read_samples(folder / "samples.jsonl")

    def equal(found, expected):
        # A file that was cut short ends at a sample; the run goes on there.
        return found[0] == expected[0] and found[1] == expected[1][: len(found[1])]

    require(load_damaged(tmp_path / "saved", tmp_path, load, cases, equal=equal))


def test_vocabulary_tables_and_probes(cases, tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    VocabularyTable(["a", " x", "\n", ":\n    ", None]).save(folder / "table.json")
    mean, weights = [0.5] * len(CERTAINTY_FEATURES), [0.25] * len(FEATURES)
    DifficultyProbe(weights, 0.1, mean, mean, "hash", {"probe": 0.9}).save(folder / "probe.json")

    def load(folder):
        table = VocabularyTable.load(folder / "table.json")
        return table.texts, table.language, table.tab_width, DifficultyProbe.load(folder / "probe.json")

    require(load_damaged(tmp_path / "saved", tmp_path, load, cases, equal=lambda a, b: a == b))


def test_tables_of_kernel_times(cases, tmp_path):
    """A changed time chooses another kernel that computes the same; what cannot be a time or a size is refused."""
    (tmp_path / "saved").mkdir()
    chip = "nvidia_h200"
    shutil.copy(break_even.SHIPPED / f"{chip}.json", tmp_path / "saved")

    def load(folder):
        return break_even.read_table(folder / f"{chip}.json", chip)

    outcomes = load_damaged(tmp_path / "saved", tmp_path, load, cases // 4, equal=lambda found, expected: True)
    assert not outcomes.wrong, str(outcomes)
