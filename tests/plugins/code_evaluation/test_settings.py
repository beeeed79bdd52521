"""The settings of a run, recorded by value, and that only a run with the same ones goes on in a file."""

import collections
import enum
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    WatermarkingConfig,
)

from hf_qst_plugins.adaptive_temperature import AdaptiveTemperatureLogitsProcessor, install_adaptive_temperature
from hf_qst_plugins.code_evaluation import Problem, SamplesFileError, evaluate
from hf_qst_plugins.code_evaluation.run_settings import described, model_settings
from tests.plugins.code_tokenizers import tokenizer


class Scale(LogitsProcessor):
    def __init__(self, factor, table=None):
        self._hidden, self._table, self._cache = factor, table, {}

    def __call__(self, input_ids, scores):
        self._cache[len(self._cache)] = input_ids
        return scores * self._hidden


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


def closed_over(value):
    return lambda ids: value


def loop(value):
    made = [value]
    made.append(made)
    return made


PAIRS = {
    "number": (1, 2),
    "number and bool": (1, True),
    "float": (0.1, 0.2),
    "infinite": (float("inf"), float("-inf")),
    "text": ("a", "b"),
    "text and number": ("1", 1),
    "nothing": (None, 0),
    "bytes": (b"a", b"b"),
    "list": ([1, [2]], [1, [3]]),
    "dict": ({"a": 1}, {"a": 2}),
    "dict of tuples": ({(5,): 1.0}, {(5,): -9.0}),
    "keys of a dict": ({(5,): 1.0}, {(6,): 1.0}),
    "nested dict": ({"a": {1: [2]}}, {"a": {1: [3]}}),
    "ordered dict": (collections.OrderedDict({"a": 1}), collections.OrderedDict({"a": 2})),
    "set": ({1, 2}, {1, 3}),
    "tensor": (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])),
    "bfloat16 tensor": (torch.ones(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.bfloat16)),
    "tensor's type": (torch.zeros(2), torch.zeros(2, dtype=torch.int32)),
    "tensor's shape": (torch.zeros(2, 1), torch.zeros(1, 2)),
    "array": (np.array([1, 2]), np.array([1, 3])),
    "dtype": (torch.float32, torch.bfloat16),
    "enum": (Colour.RED, Colour.BLUE),
    "class": (int, float),
    "function": (len, sum),
    "lambda": (lambda x: x + 1, lambda x: x + 2),
    "lambda's constant in it": (lambda: [y * 2 for y in (1, 2)], lambda: [y * 2 for y in (1, 3)]),
    "closure": (closed_over(1), closed_over(2)),
    "partial": (functools.partial(pow, 2), functools.partial(pow, 3)),
    "method": (Slotted(1).__eq__, Slotted(2).__eq__),
    "pattern": (re.compile("a"), re.compile("b")),
    "object": (Scale(1.0), Scale(2.0)),
    "container given to an object": (Scale(1.0, {1: 2}), Scale(1.0, {1: 3})),
    "object with slots": (Slotted([1]), Slotted([2])),
    "object in an object": (Slotted(Slotted({1: 2})), Slotted(Slotted({1: 3}))),
    "processor": (RepetitionPenaltyLogitsProcessor(1.5), RepetitionPenaltyLogitsProcessor(1.2)),
    "generation config": (GenerationConfig(repetition_penalty=1.5), GenerationConfig()),
    "config in a config": (WatermarkingConfig(bias=2.0), WatermarkingConfig(bias=3.0)),
    "itself": (loop(1), loop(2)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_other_values_are_described_otherwise_and_equal_ones_alike(name):
    one, other = (json.dumps(described(value)) for value in PAIRS[name])
    assert one != other
    assert [json.dumps(described(value)) for value in PAIRS[name]] == [one, other]


@pytest.mark.parametrize(
    "make",
    [
        lambda: float("nan"),
        lambda: {"b": 1, "a": {3, 1, 2}},
        lambda: Scale(1.0, {1: 2}),
        lambda: RepetitionPenaltyLogitsProcessor(1.5),
        lambda: GenerationConfig(temperature=0.3),
        lambda: AdaptiveTemperatureLogitsProcessor(tokenizer("gpt2")),
        lambda: tokenizer("gpt2"),
        lambda: closed_over({"a": torch.ones(2)}),
    ],
)
def test_values_made_anew_are_described_alike(make):
    one, other = described(make()), described(make())
    assert one == other == json.loads(json.dumps(one))


def test_descriptions_hold_in_another_process():
    """No address, no hash of a text: a run goes on in another process."""
    code = "import json\nfrom hf_qst_plugins.code_evaluation.run_settings import described\n"
    code += "from transformers import GenerationConfig\nclass A:\n    def __init__(self, x): self.x = x\n"
    code += "print(json.dumps(described([{'a', 'b', 'c'}, A([1]), lambda x: {x: 'y'}, GenerationConfig(top_k=3), object()])))"
    runs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path), "HF_HUB_OFFLINE": "1", "PATH": ""},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(runs) == 1 and "0x" not in runs.pop()


def test_what_a_processor_caches_is_no_setting():
    scale, before = Scale(1.0), described(Scale(1.0))
    scale(torch.ones(1, 1), torch.ones(1, 1))
    assert described(scale) == before
    made = tokenizer("gpt2")
    processor = AdaptiveTemperatureLogitsProcessor(made)
    before = described(processor)
    processor(torch.tensor([made("def f(x):\n    ")["input_ids"]]), torch.zeros(1, len(made)))
    assert described(processor) == before
    assert described(AdaptiveTemperatureLogitsProcessor(made, temperature=0.4)) != before


# --- whole runs --------------------------------------------------------------------------------------------------------


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer("gpt2")), **sizes, pad_token_id=0)).eval()


def adapted(**changes):
    return get_peft_model(model(), LoraConfig(target_modules=["q_proj"], **changes))


def trained():
    made = model()
    with torch.no_grad():
        made.lm_head.weight += 0.5
    return made


def other_defaults():
    made = model()
    made.generation_config.repetition_penalty = 1.7
    return made


def installed(**options):
    made = model()
    install_adaptive_temperature(made, tokenizer("gpt2"), **options)
    return made


def without_adapter():
    made = adapted()
    made.add_adapter("other", LoraConfig(target_modules=["q_proj"]))
    return made


def with_other_adapter():
    made = without_adapter()
    made.set_adapter("other")
    return made


MODELS = {
    "weights": (model, trained),
    "adapter or none": (model, adapted),
    "an adapter's config": (lambda: adapted(lora_alpha=8), lambda: adapted(lora_alpha=16)),
    "which adapter is active": (without_adapter, with_other_adapter),
    "the model's generation config": (model, other_defaults),
    "an installed rule": (model, installed),
    "an installed rule's arguments": (installed, lambda: installed(temperature=0.1)),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_models_are_told_apart_and_the_same_one_made_anew_is_not(name):
    one, other = MODELS[name]
    assert model_settings(one()) == model_settings(one())
    assert model_settings(other()) == model_settings(other())
    assert model_settings(one()) != model_settings(other())


def test_saving_and_loading_an_adapter_changes_no_setting(tmp_path):
    from peft import PeftModel

    made = adapted()
    made.save_pretrained(tmp_path)
    assert model_settings(PeftModel.from_pretrained(model(), tmp_path)) == model_settings(made)


PROBLEMS = [Problem("1", "def f(x):\n    ", "", "pass", "f")]


def run(path, network=None, problems=PROBLEMS, **options):
    kwargs = {"max_new_tokens": 4, **options}
    return evaluate(
        network or model(), tokenizer("gpt2"), problems, 2, kwargs, path, allow_execution=True, progress=False
    )


GENERATE = {
    "sequence_bias": ({(5,): 1.0}, {(5,): -9.0}),
    "bad_words_ids": ([[5]], [[6]]),
    "generation_config": (GenerationConfig(repetition_penalty=1.5), GenerationConfig()),
    "watermarking_config": (WatermarkingConfig(bias=2.0), WatermarkingConfig(bias=3.0)),
    "logits_processor": ([Scale(1.0)], [Scale(2.0)]),
    "stopping_criteria": ([lambda ids, _: ids[:, -1] == 7], [lambda ids, _: ids[:, -1] == 8]),
    "pad_token_id": (0, 2),
    "eos_token_id": (1, [1, 2]),
}


@pytest.mark.parametrize("name", GENERATE)
def test_a_run_goes_on_with_equal_arguments_of_generate_only(name, tmp_path):
    path = tmp_path / "samples.jsonl"
    first = run(path, **{name: GENERATE[name][0]})
    before = path.read_bytes()
    assert run(path, **{name: GENERATE[name][0]}) == first
    with pytest.raises(SamplesFileError) as error:
        run(path, **{name: GENERATE[name][1]})
    assert str(path) in str(error.value) and path.read_bytes() == before


def test_a_run_goes_on_with_the_same_weights_only(tmp_path):
    first = run(tmp_path / "samples.jsonl")
    assert run(tmp_path / "samples.jsonl", model()) == first
    with pytest.raises(SamplesFileError, match=r"model=\{'weights': '\w+'\}"):
        run(tmp_path / "samples.jsonl", trained())


def test_the_difference_is_named(tmp_path):
    run(tmp_path / "samples.jsonl", temperature=0.5)
    words = r"generate_kwargs=\{'temperature': 0\.5\}, this run has \{'temperature': 0\.25\}"
    with pytest.raises(SamplesFileError, match=words):
        run(tmp_path / "samples.jsonl", temperature=0.25)


@pytest.mark.parametrize("ids", [("a", "b", "a"), ("HumanEval/0", "HumanEval/0"), (1, "1")])
def test_problems_of_one_name_are_refused_by_it(ids, tmp_path):
    problems = [Problem(task, f"def f{number}(x):", "", "pass", "f") for number, task in enumerate(ids)]
    with pytest.raises(ValueError, match=rf"task_id '{ids[0]}' 2 times"):
        run(tmp_path / "samples.jsonl", problems=problems)
    assert not Path(tmp_path / "samples.jsonl").exists()
