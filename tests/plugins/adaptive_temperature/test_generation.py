"""The processor inside `generate`: every way of decoding, with temperatures that follow from each prefix alone."""

import copy
import logging
import pickle
from itertools import pairwise

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    TopPLogitsWarper,
    pipeline,
)
from transformers.modeling_outputs import CausalLMOutput

from hf_qst_plugins.adaptive_temperature import (
    AdaptiveTemperatureLogitsProcessor,
    BlockStart,
    LastTokenTemperatureLogitsProcessor,
    VocabularyTable,
    adaptive_generate_kwargs,
    install_adaptive_temperature,
    uninstall_adaptive_temperature,
)
from tests.architectures import side_tuned
from tests.plugins.code_tokenizers import tokenizer

PROMPTS = ["def f(x):\n    ", "x", "class A:\n    def f(self):\n        return 1\n\n    def g(self):\n"]


def llama(seed=0, layers=1, **changes):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(vocab_size=2048, num_hidden_layers=layers, **sizes, **changes)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 0, 1, 2
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 30  # a distribution that is neither flat nor one-hot
    return model


@pytest.fixture(scope="module")
def made():
    return tokenizer("newline_merging")


@pytest.fixture
def model(made):
    return llama()


@pytest.fixture(scope="module")
def inputs(made):
    made.padding_side = "left"
    return made(PROMPTS, return_tensors="pt", padding=True, return_token_type_ids=False)


class Recording(AdaptiveTemperatureLogitsProcessor):
    """Notes each call's rows and the temperatures they were given."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.lengths, self.calls = [], []

    def __call__(self, input_ids, scores):
        processed = super().__call__(input_ids, scores)
        column = scores.nan_to_num(neginf=0).abs().argmax(-1, keepdim=True)
        given = scores.gather(1, column) / processed.gather(1, column)
        self.lengths.append(input_ids.shape[1])
        self.calls += list(zip(input_ids.tolist(), given[:, 0].tolist(), strict=True))
        return processed

    def assert_follows_from_prefixes(self, at_least):
        """Each temperature is what the text of the prefix says, whenever and in whatever order it was asked for."""
        assert len(self.calls) >= at_least
        automaton = self.policy.automaton
        for row, temperature in self.calls:
            hot = automaton.is_hot(row)
            expected = self.policy.block_temperature if hot else self.policy.temperature
            assert temperature == pytest.approx(expected, rel=1e-4)
        assert {automaton.is_hot(row) for row, _ in self.calls} == {True, False}


def favour_whitespace(model, made):
    """Raise the scores of line breaks and indentation, so that random weights write lines."""
    kinds = VocabularyTable.from_tokenizer(made).kinds
    bias = torch.nn.Parameter(torch.where((kinds > 0) & (kinds < 4), 9.0, 0.0))
    model.lm_head.bias = bias
    model.generation_config.suppress_tokens = [0, 1, 2]
    return model


def sample(model, inputs, processors=(), seed=0, **options):
    torch.manual_seed(seed)
    settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": 20}
    return model.generate(**inputs, logits_processor=list(processors), **{**settings, **options})


# --- equal to what transformers does ------------------------------------------------------------------------------------


def test_equal_temperatures_are_the_built_in_temperature(model, made, inputs):
    same = AdaptiveTemperatureLogitsProcessor(made, 0.5, 0.5)
    ours = sample(model, inputs, [same], max_new_tokens=64)
    assert torch.equal(ours, sample(model, inputs, temperature=0.5, max_new_tokens=64))
    assert not torch.equal(ours, sample(model, inputs, temperature=0.9, max_new_tokens=64))


def test_greedy_is_unchanged(model, made, inputs):
    processor = AdaptiveTemperatureLogitsProcessor(made, 3.0, 0.01)
    greedy = {"do_sample": False, "temperature": None, "top_k": None}
    assert torch.equal(sample(model, inputs, [processor], **greedy), sample(model, inputs, **greedy))


# --- every way of decoding ----------------------------------------------------------------------------------------------


def test_batches_and_several_sequences_a_prompt(model, made, inputs):
    recording = Recording(made)
    out = sample(favour_whitespace(model, made), inputs, [recording], num_return_sequences=3)
    assert out.shape[0] == 9 and recording.lengths == list(range(recording.lengths[0], recording.lengths[0] + 20))
    recording.assert_follows_from_prefixes(9 * 20)


def test_an_instance_used_again_is_as_new(model, made, inputs):
    used = AdaptiveTemperatureLogitsProcessor(made)
    sample(model, inputs, [used], seed=3)
    two = {name: value[:2] for name, value in inputs.items()}
    for batch in (inputs, two):
        fresh = AdaptiveTemperatureLogitsProcessor(made)
        assert torch.equal(sample(model, batch, [used]), sample(model, batch, [fresh]))


def test_assisted_decoding(model, made):
    favour_whitespace(model, made)
    assistant = favour_whitespace(llama(seed=1), made)
    one = made(PROMPTS[:1], return_tensors="pt", return_token_type_ids=False)
    recording = Recording(made)
    sample(model, one, [recording], assistant_model=assistant, max_new_tokens=40)
    assert recording.lengths != sorted(set(recording.lengths))  # the same lengths come again
    recording.assert_follows_from_prefixes(40)


def test_prompt_lookup_decoding(model, made):
    favour_whitespace(model, made)
    one = made(PROMPTS[-1:], return_tensors="pt", return_token_type_ids=False)
    recording = Recording(made)
    sample(model, one, [recording], prompt_lookup_num_tokens=3, max_new_tokens=40)
    assert any(b <= a for a, b in pairwise(recording.lengths))  # rejected drafts rewind
    recording.assert_follows_from_prefixes(40)


def test_beam_search(model, made, inputs):
    """Works, follows the reordered beams, and changes the search, which one temperature for all rows does not."""
    favour_whitespace(model, made)
    beams = {"num_beams": 4, "do_sample": False, "temperature": None, "top_k": None}
    plain = sample(model, inputs, **beams)
    recording = Recording(made, 1.6, 0.4)
    sample(model, inputs, [recording], **beams)
    recording.assert_follows_from_prefixes(3 * 4 * 20)
    uniform = AdaptiveTemperatureLogitsProcessor(made, 1.0, 1.0)
    assert torch.equal(sample(model, inputs, [uniform], **beams), plain)


def test_first_step_of_embeddings_without_ids(model, made, inputs):
    recording = Recording(made)
    embeddings = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"])}
    sample(model, {**embeddings, "attention_mask": inputs["attention_mask"]}, [recording], max_new_tokens=3)
    assert recording.lengths == [0, 1, 2]


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prefill_chunk_size": 4}])
def test_one_call_a_token_with_other_caches(model, made, inputs, options):
    recording = Recording(made)
    if "cache_implementation" in options:
        options = {**options, "disable_compile": True}
    sample(model, inputs, [recording], max_new_tokens=6, **options)
    assert len(recording.lengths) == 6


def test_a_model_with_more_ids_than_its_tokenizer(made, inputs):
    model = llama()
    model.resize_token_embeddings(2100)
    recording = Recording(made)
    out = sample(model, inputs, [recording], temperature=5.0, max_new_tokens=40)
    assert (out >= 2048).any()
    assert len(recording.calls) == 3 * 40


def test_a_side_tuned_model_is_given_the_same_temperatures(inputs):
    """The processor sees ids and scores alone; the ids a base and a side-tuned model share get the same."""
    model = side_tuned("llama", awake=True).eval()
    texts = [None, None, None, "\n", "    ", "x:\n", *("x" for _ in range(model.config.vocab_size - 6))]
    table = VocabularyTable(texts)
    ids = {"input_ids": torch.tensor([[7, 3, 4], [7, 8, 5], [4, 5, 4]])}
    recording = Recording(table)
    sample(model, ids, [recording])
    with model.disable_adapter():
        sample(model, ids, [recording])
    recording.assert_follows_from_prefixes(2 * 3 * 20)


# --- the law of what is drawn -------------------------------------------------------------------------------------------


class MarkovConfig(PretrainedConfig):
    model_type = "markov_for_tests"
    num_hidden_layers = 1  # `generate` makes a cache for so many


class Markov(PreTrainedModel, GenerationMixin):
    """Scores are a fixed row of a table, chosen by the last id: the law of its samples is known exactly."""

    config_class = MarkovConfig
    main_input_name = "input_ids"

    def __init__(self, scores):
        super().__init__(MarkovConfig(vocab_size=len(scores), pad_token_id=0, eos_token_id=None))
        self.scores = torch.nn.Parameter(scores)

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.scores[input_ids])

    def prepare_inputs_for_generation(self, input_ids, **_):
        return {"input_ids": input_ids}


# The 99.99 % point of chi-square with 7 degrees of freedom.
CHI_SQUARE_7 = 29.9


@pytest.mark.parametrize(("row", "right", "wrong"), [([1, 2], 0.8, 0.3), ([2, 3], 0.3, 0.8)])
def test_draws_follow_the_tempered_law(row, right, wrong):
    table = VocabularyTable([None, "\n", "    ", "x", "y", "z", "w", "v"])
    markov = Markov(torch.randn(8, 8))
    settings = adaptive_generate_kwargs(table, block_temperature=0.8, temperature=0.3, top_p=1.0)
    ids = torch.tensor([row])
    drawn = markov.generate(ids, **settings, max_new_tokens=1, num_return_sequences=20_000, use_cache=False)[:, -1]
    counts = torch.bincount(drawn, minlength=8)

    def chi_square(temperature):
        expected = 20_000 * (markov.scores[row[-1]] / temperature).softmax(-1)
        return float(((counts - expected) ** 2 / expected).sum())

    assert chi_square(right) < CHI_SQUARE_7 < chi_square(wrong) / 10


# --- generate's arguments -----------------------------------------------------------------------------------------------


def prepared(model, inputs, **arguments):
    """The processors that `generate` has built."""
    built = []

    def look(model, input_ids, logits_processor, **_):
        built.extend(logits_processor)
        return input_ids

    model.generate(**inputs, custom_generate=look, **arguments)
    return built


def test_generate_kwargs_leave_no_room_for_the_checkpoints_sampling(model, made, inputs):
    model.generation_config.update(temperature=0.6, top_k=20, do_sample=True, num_beams=3)
    built = prepared(model, inputs, **adaptive_generate_kwargs(made))
    assert [type(one) for one in built] == [AdaptiveTemperatureLogitsProcessor, TopPLogitsWarper]
    assert built[1].top_p == 0.95


def test_generate_kwargs_take_options_of_both(made):
    settings = adaptive_generate_kwargs(
        made, preset="mbpp", block_temperature=0.7, scope="block", min_p=0.05, top_p=1.0
    )
    policy = settings.pop("logits_processor")[0].policy
    assert (policy.block_temperature, policy.temperature, policy.scope) == (0.7, 0.3, "block")
    fixed = {"do_sample": True, "temperature": 1.0, "top_k": 0, "num_beams": 1}
    assert settings == {**fixed, "top_p": 1.0, "min_p": 0.05}
    assert adaptive_generate_kwargs(made, temperature=0.4)["logits_processor"][0].policy.temperature == 0.4
    GenerationConfig(**settings).validate(strict=True)


def test_generate_kwargs_without_sampling_warn(made, caplog):
    with caplog.at_level(logging.WARNING):
        adaptive_generate_kwargs(made, do_sample=False)
    assert "do_sample=False: the adaptive temperature does nothing" in caplog.text


def test_installed_processor_is_used_until_uninstalled(model, made, inputs):
    before = sample(model, inputs, top_p=0.95)
    expected = sample(model, inputs, [AdaptiveTemperatureLogitsProcessor(made, preset="pass1")], top_p=0.95)
    processor = install_adaptive_temperature(model, made, preset="pass1")
    assert processor.policy.temperature == 0.01
    torch.manual_seed(0)
    assert torch.equal(model.generate(**inputs, do_sample=True, max_new_tokens=20), expected)
    assert not torch.equal(expected, before)
    with pytest.raises(ValueError, match="installed on this model already"):
        install_adaptive_temperature(model, made)
    uninstall_adaptive_temperature(model)
    uninstall_adaptive_temperature(model)
    assert "generate" not in vars(model) and torch.equal(sample(model, inputs, top_p=0.95), before)


def test_installed_processor_gives_way_to_a_calls_own_arguments(model, made, inputs):
    model.generation_config.update(temperature=0.6, top_k=20)
    install_adaptive_temperature(model, made)
    built = prepared(model, inputs, do_sample=True)
    assert [type(one) for one in built] == [AdaptiveTemperatureLogitsProcessor, TopPLogitsWarper]
    own = LastTokenTemperatureLogitsProcessor(made)
    built = prepared(model, inputs, do_sample=True, top_p=0.5, logits_processor=[own])
    assert built[0] is own and built[2].top_p == 0.5
    built = prepared(model, inputs, generation_config=GenerationConfig(do_sample=True, top_k=7))
    assert [type(one) for one in built] == [AdaptiveTemperatureLogitsProcessor, TopPLogitsWarper]


@pytest.mark.parametrize("wrapped", [False, True])
def test_arguments_by_position_are_read_as_those_by_name(model, made, inputs, wrapped):
    """The documented order is inputs, generation_config, logits_processor."""
    called = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])) if wrapped else model
    config = GenerationConfig(do_sample=True, max_new_tokens=8, pad_token_id=2)
    other = LogitsProcessorList([TopPLogitsWarper(0.5)])

    def drawn(*args, **kwargs):
        torch.manual_seed(0)
        return called.generate(*args, attention_mask=inputs["attention_mask"], **kwargs)

    uninstalled = drawn(inputs["input_ids"], config)
    install_adaptive_temperature(called, made, block_temperature=9.0, temperature=5.0)
    named = drawn(inputs=inputs["input_ids"], generation_config=config)
    assert not torch.equal(named, uninstalled)
    assert torch.equal(drawn(inputs["input_ids"], config), named)
    both = drawn(inputs["input_ids"], generation_config=config, logits_processor=other)
    assert not torch.equal(both, named)
    assert torch.equal(drawn(inputs["input_ids"], config, other), both)


def test_a_config_by_position_that_is_greedy_stays_greedy(model, made, inputs, caplog):
    model.generation_config.do_sample = True
    config = GenerationConfig(do_sample=False, max_new_tokens=4, pad_token_id=2)
    mask = inputs["attention_mask"]
    expected = model.generate(inputs["input_ids"], config, attention_mask=mask)
    install_adaptive_temperature(model, made)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model.generate(inputs["input_ids"], config, attention_mask=mask), expected)
    assert "do_sample=False" in caplog.text


def test_an_argument_given_twice_is_refused_as_generate_does(model, made, inputs):
    install_adaptive_temperature(model, made)
    config = GenerationConfig(do_sample=True, max_new_tokens=4)
    with pytest.raises(TypeError, match=r"multiple values.*generation_config"):
        model.generate(inputs["input_ids"], config, generation_config=config)


def test_installed_processor_warns_once_that_greedy_ignores_it(model, made, inputs, caplog):
    expected = model.generate(**inputs, max_new_tokens=4)
    install_adaptive_temperature(model, made)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(model.generate(**inputs, max_new_tokens=4), expected)
            model.generate(**inputs, do_sample=False, max_new_tokens=4)
    assert caplog.text.count("do_sample=False: the adaptive temperature does nothing") == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_the_model_use_their_own_weights(model, made, inputs, copied):
    install_adaptive_temperature(model, made)
    twin = copied(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert twin.generate.model is twin
    out = twin.generate(**inputs, do_sample=True, max_new_tokens=5)
    assert not torch.equal(out[:, -5:], model.generate(**inputs, do_sample=True, max_new_tokens=5)[:, -5:])


def test_saved_model_and_generation_config_are_as_without(model, made, tmp_path):
    model.generation_config.update(max_new_tokens=7, repetition_penalty=1.1)
    before = model.generation_config.to_dict()
    install_adaptive_temperature(model, made)
    model.save_pretrained(tmp_path)
    assert GenerationConfig.from_pretrained(tmp_path).to_dict() == before
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.generation_config.max_new_tokens == 7 and "generate" not in vars(again)


def test_settings_kept_in_a_generation_config_survive_a_round_trip(model, made, inputs, tmp_path):
    settings = adaptive_generate_kwargs(made)
    processors = settings.pop("logits_processor")
    model.generation_config.update(**settings)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    built = prepared(again, inputs, logits_processor=processors)
    assert [type(one) for one in built] == [AdaptiveTemperatureLogitsProcessor, TopPLogitsWarper]


def test_pipelines(model, made):
    pipe = pipeline("text-generation", model=model, tokenizer=made)
    recording = Recording(made)
    install_adaptive_temperature(pipe, recording)
    pipe(PROMPTS[0], do_sample=True, max_new_tokens=4)
    assert len(recording.lengths) == 4
    uninstall_adaptive_temperature(pipe)
    install_adaptive_temperature(pipe)
    assert isinstance(model.generate.processor, AdaptiveTemperatureLogitsProcessor)


def test_peft_models(made, inputs):
    model = side_tuned("llama").eval()
    table = VocabularyTable(["\n", "    ", *("x" for _ in range(model.config.vocab_size - 2))])
    recording = Recording(table)
    install_adaptive_temperature(model, recording)
    model.generate(input_ids=torch.tensor([[5, 0, 1]]), do_sample=True, max_new_tokens=3)
    assert recording.lengths == [3, 4, 5]


def test_what_cannot_be_installed_is_named(model, made):
    with pytest.raises(TypeError, match="tokenizer must be given"):
        install_adaptive_temperature(model)
    with pytest.raises(TypeError, match="expected a model with `generate` or a pipeline of one, got int"):
        install_adaptive_temperature(3, made)
    with pytest.raises(ValueError, match="continuous_batching=True does not fit AdaptiveTemperatureLogitsProcessor"):
        install_adaptive_temperature(model, AdaptiveTemperatureLogitsProcessor(made), continuous_batching=True)
    assert "generate" not in vars(model)


# --- continuous batching ------------------------------------------------------------------------------------------------


class RecordingLast(LastTokenTemperatureLogitsProcessor):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shapes = []

    def __call__(self, input_ids, scores):
        self.shapes.append((tuple(input_ids.shape), tuple(scores.shape)))
        return super().__call__(input_ids, scores)


def test_continuous_batching_keeps_the_last_token_rule_and_drops_the_other(model, made):
    assert LastTokenTemperatureLogitsProcessor.supports_continuous_batching is True
    assert AdaptiveTemperatureLogitsProcessor.supports_continuous_batching is False
    prompts = [made.encode(prompt, add_special_tokens=False) for prompt in PROMPTS]
    recording = RecordingLast(made)
    install_adaptive_temperature(model, recording, continuous_batching=True)
    out = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(do_sample=True, max_new_tokens=6, eos_token_id=-1, temperature=0.6),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=16, page_size=16, max_batch_tokens=32),
        warmup=False,
    )
    assert sorted(len(one.generated_tokens) for one in out.values()) == [6, 6, 6]
    assert recording.shapes and all(ids[-1] == scores[-2] for ids, scores in recording.shapes)
    uninstall_adaptive_temperature(model)
    assert "_get_logits_processor" not in vars(model)


def test_last_token_rule_takes_rows_too(made):
    last = LastTokenTemperatureLogitsProcessor(made, 0.8, 0.5)
    rows = torch.tensor([made.encode("if x:\n        ")[-2:], made.encode("x y")[-2:]])
    scores = torch.randn(2, 9)
    assert torch.equal(last(rows, scores), last(rows[:, -1], scores))
    assert torch.allclose(last(rows, scores), scores / torch.tensor([[0.8], [0.5]]))
    assert BlockStart(VocabularyTable.from_tokenizer(made)).hot_rows(rows) == [True, False]
