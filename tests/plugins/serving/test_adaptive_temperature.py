"""The adaptive temperature in vLLM: it draws from the model's own distribution over the temperatures of the rule."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import vllm
from transformers import LlamaForCausalLM
from vllm.exceptions import VLLMValidationError
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    build_custom_logits_processors,
    build_custom_logits_processors_params_validator,
)

from hf_qst_plugins.adaptive_temperature import BlockStart, VocabularyTable
from tests.plugins.adaptive_temperature.test_generation import llama
from tests.plugins.code_tokenizers import tokenizer

NAME = "hf_qst_plugins.serving:AdaptiveTemperature"
TEXTS = ["if x:\n    ", "def f(x):\n    return x\n", "x", "class A:\n    def f(self):\n        return 1\n\n    "]
OWN = {"block_temperature": 1.7, "temperature": 0.9}
PRESET = {"block_temperature": 0.8, "temperature": 0.6}
BAD = [{"temperature": 0}, {"block_temperature": -1.0}, {"temperature": "0.5"}, {"temperature": 1e-60}]
SETTINGS = {"adaptive_temperature": {"preset": "humaneval"}}
IN_NEWER_RUNNER = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"


@pytest.fixture(scope="module")
def made():
    return tokenizer("newline_merging")


@pytest.fixture(scope="module")
def folder(made, tmp_path_factory):
    root = tmp_path_factory.mktemp("vllm")
    llama(head_dim=64).save_pretrained(root)  # the heads vLLM's CPU attention has
    made.save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def engine(folder):
    made = vllm.LLM(
        model=str(folder),
        dtype="float32",
        max_model_len=128,
        enforce_eager=True,
        max_num_seqs=4,  # fewer than the requests, so that rows are taken over and moved
        logprobs_mode="processed_logprobs",
        logits_processors=[NAME],
        additional_config=SETTINGS,
        kv_cache_memory_bytes=2**26,
    )
    assert made.llm_engine.vllm_config.use_v2_model_runner is IN_NEWER_RUNNER
    return made


@pytest.fixture(scope="module")
def allowed(made):
    """Ids of line breaks, indentation and content, so that hot and cold steps take turns."""
    texts = VocabularyTable.from_tokenizer(made).texts
    blank = [i for i, text in enumerate(texts) if text and not text.strip() and set(text) <= {"\n", " "}]
    content = [i for i, text in enumerate(texts) if text and text.isidentifier()]
    return sorted({*blank[:8], *content[:6]})


def expected_logprobs(model, ids, allowed, temperature):
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -1]
    masked = torch.full_like(logits, -torch.inf)
    masked[allowed] = logits[allowed]
    return (masked / temperature).log_softmax(-1)


def check(model, policy, output, allowed, pair):
    """Each step's reported distribution is the reference's; returns how many steps were hot."""
    drawn, hot = output.outputs[0], 0
    for step, token in enumerate(drawn.token_ids):
        ids = [*output.prompt_token_ids, *drawn.token_ids[:step]]
        is_hot = policy.hot_rows(torch.tensor([ids]))[0]
        hot += is_hot
        temperature = pair["block_temperature" if is_hot else "temperature"]
        expected = expected_logprobs(model, ids, allowed, temperature)
        found = drawn.logprobs[step]
        assert token in found and len(found) >= 5
        for candidate, entry in found.items():
            assert entry.logprob == pytest.approx(expected[candidate].item(), abs=2e-3), (step, candidate, is_hot)
    return hot


@pytest.fixture(scope="module")
def reference(folder, made):
    return LlamaForCausalLM.from_pretrained(folder).eval(), BlockStart(VocabularyTable.from_tokenizer(made))


def parameters(allowed, **options):
    return vllm.SamplingParams(**{"max_tokens": 12, "logprobs": 8, "allowed_token_ids": allowed, "seed": 1, **options})


def test_a_mixed_batch_draws_each_row_at_its_own_temperatures(engine, reference, allowed):
    """Requests of several lengths, with temperatures of their own and without, beside greedy ones."""
    model, policy = reference
    kinds = [{}, {"extra_args": OWN}, {"temperature": 0.0}]
    asked = [
        parameters(allowed, max_tokens=4 + 3 * i, **kinds[(i + j) % 3]) for i in range(len(TEXTS)) for j in range(3)
    ]
    texts = [text for text in TEXTS for _ in range(3)]
    outputs = engine.generate(texts, asked)
    hot = 0
    for output, request in zip(outputs, asked, strict=True):
        assert len(output.outputs[0].token_ids) == request.max_tokens
        if request.temperature == 0:
            ids = list(output.prompt_token_ids)
            for token in output.outputs[0].token_ids:
                assert token == expected_logprobs(model, ids, allowed, 1.0).argmax()
                ids.append(token)
        else:
            hot += check(model, policy, output, allowed, OWN if request.extra_args else PRESET)
    assert 5 < hot < sum(request.max_tokens for request in asked) - 5


@pytest.mark.parametrize("own", BAD)
def test_a_bad_request_is_refused_and_the_engine_goes_on(engine, reference, allowed, own):
    model, policy = reference
    with pytest.raises(
        VLLMValidationError, match=rf"extra_args\['{next(iter(own))}'\] must be a finite number above 0"
    ):
        engine.generate(TEXTS[:2], [parameters(allowed), parameters(allowed, extra_args=own)])
    output = engine.generate(TEXTS[:1], parameters(allowed))[0]
    check(model, policy, output, allowed, PRESET)


# --- the V2 model runner and its interface ------------------------------------------------------------------------------


@pytest.mark.skipif(IN_NEWER_RUNNER, reason="runs the others in the V2 model runner, where they run already")
def test_the_engine_of_the_newer_runner_does_the_same():
    command = [
        sys.executable,
        "-m",
        "tests.plugins.serving.newer_runner",
        __file__,
        "-k",
        "mixed_batch or bad_request",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert f"{1 + len(BAD) + 1} passed" in done.stdout


def test_the_newer_validator_refuses_a_bad_request():
    validate = build_custom_logits_processors_params_validator([NAME])
    validate(vllm.SamplingParams())
    validate(vllm.SamplingParams(extra_args=OWN))
    for own in BAD:
        with pytest.raises(VLLMValidationError, match="must be a finite number above 0"):
            validate(vllm.SamplingParams(extra_args=own))


class _Requests:
    """What vLLM's `RequestState` has of this, in ordinary memory."""

    class _Tensor:
        def __init__(self, *size):
            self.gpu = torch.zeros(*size, dtype=torch.int32)

    def __init__(self, count, length, vocabulary):
        self.device, self.max_num_reqs, self.vocab_size = torch.device("cpu"), count, vocabulary
        self.all_token_ids = self._Tensor(count, length)
        self.prompt_len, self.prefill_len, self.total_len = (self._Tensor(count) for _ in range(3))


@pytest.fixture
def newer(engine):
    """The adapter as vLLM's V2 runner makes it, and the state of its requests."""
    requests = _Requests(4, 128, 2048)
    config = engine.llm_engine.vllm_config
    (processor,) = build_custom_logits_processors(config, requests, False, [NAME])
    return processor, requests


def context(rows):
    """Of (slot, committed ids, drafted ids): a row for the last committed id and one for each drafted one."""
    slots, local, ids, places = [], [], [], []
    for slot, committed, drafted in rows:
        for i, token in enumerate([committed[-1], *drafted]):
            slots.append(slot)
            local.append(i)
            ids.append(token)
            places.append(len(committed) - 1 + i)
    batch = [slot for slot, _, _ in rows]
    return LogitsContext(
        expanded_idx_mapping=torch.tensor(slots, dtype=torch.int32),
        idx_mapping=torch.tensor(batch, dtype=torch.int32),
        idx_mapping_np=np.array(batch, np.int32),
        expanded_local_pos=torch.tensor(local, dtype=torch.int32),
        input_ids=torch.tensor(ids, dtype=torch.int32),
        pos=torch.tensor(places),
        seq_lens_upper_bound_np=np.array([len(committed) for _, committed, _ in rows], np.int32),
    )


def test_the_newer_interface_gives_each_row_its_temperature(newer, made, reference):
    """Slots in any order, taken over by other requests, with drafted tokens and greedy requests among them."""
    processor, requests = newer
    _, policy = reference
    generator = torch.Generator().manual_seed(0)
    blank = made.encode("\n    \n        ", add_special_tokens=False)
    words = made.encode("x = f(y)\nreturn", add_special_tokens=False)
    hot = 0

    def draw(least, most):
        count = int(torch.randint(least, most, (), generator=generator))
        return [(blank + words)[i] for i in torch.randint(len(blank + words), (count,), generator=generator).tolist()]

    for _ in range(40):
        slots = torch.randperm(4, generator=generator).tolist()[:3]
        kinds = [{}, {"extra_args": OWN}, {"temperature": 0.0}]
        rows, expected = [], []
        for slot, kind in zip(slots, kinds, strict=True):
            committed = draw(1, 30)
            drafted = draw(0, 4)
            requests.all_token_ids.gpu[slot] = 7  # what an earlier request left
            requests.all_token_ids.gpu[slot, : len(committed)] = torch.tensor(committed)
            assert processor.add_request(slot, vllm.SamplingParams(**kind)) is ("temperature" not in kind)
            rows.append((slot, committed, drafted))
            pair = kind.get("extra_args", PRESET)
            for i in range(len(drafted) + 1):
                is_hot = policy.hot_rows(torch.tensor([committed + drafted[:i]]))[0]
                hot += is_hot
                value = pair["block_temperature" if is_hot else "temperature"]
                expected.append(1.0 if "temperature" in kind else value)
        processor.apply_staged_writes()
        logits = torch.randn(len(expected), 2048, generator=generator)
        found = processor.apply(logits.clone(), context(rows))
        torch.testing.assert_close(found, logits / torch.tensor(expected)[:, None])
    assert hot > 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"presets": "humaneval"}, "preset, scope, language, tokenizer_name, got 'presets'"),
        ({"preset": "HumanEval"}, "preset must be one of default, humaneval, .*, got 'HumanEval'"),
    ],
)
def test_wrong_settings_are_refused(engine, newer, settings, message):
    _, requests = newer
    config = copy.copy(engine.llm_engine.vllm_config)
    config.additional_config = {"adaptive_temperature": settings}
    with pytest.raises(ValueError, match=message):
        build_custom_logits_processors(config, requests, False, [NAME])
