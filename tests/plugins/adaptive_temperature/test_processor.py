"""The processors as functions of ids and scores: rows, padding, devices, copies, bad input."""

import copy
import pickle

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from hf_qst_plugins.adaptive_temperature import (
    PRESETS,
    AdaptiveTemperatureLogitsProcessor,
    BlockStart,
    LastTokenTemperatureLogitsProcessor,
    VocabularyTable,
)
from tests.plugins.code_tokenizers import tokenizer

PROMPTS = [
    "",
    "x",
    "\n",
    "def f(x):\n    ",
    "def f(x):\n    return",
    "if x:\n\t",
    "class A:\n    def f(self):\n        ",
]
HOT = [False, False, False, True, False, True, True]


@pytest.fixture(scope="module")
def made():
    return tokenizer("newline_merging")


@pytest.fixture(scope="module")
def processor(made):
    return AdaptiveTemperatureLogitsProcessor(made, block_temperature=0.8, temperature=0.5)


def padded(made, prompts, pad):
    rows = [made.encode(prompt, add_special_tokens=False) for prompt in prompts]
    longest = max(map(len, rows))
    return torch.tensor([[pad] * (longest - len(row)) + row for row in rows])


def is_hot(processed, scores):
    """bool `[rows]`, after checking that each row was divided by one of the two temperatures."""
    hot = torch.isclose(processed, scores / 0.8).all(-1)
    assert (hot ^ torch.isclose(processed, scores / 0.5).all(-1)).all()
    return hot.tolist()


@pytest.mark.parametrize("pad", ["pad_token_id", "eos_token_id"])
def test_left_padded_rows_are_as_alone(made, processor, pad):
    batch = padded(made, PROMPTS, getattr(made, pad))
    scores = torch.randn(len(PROMPTS), 2048)
    assert is_hot(processor(batch, scores), scores) == HOT
    for prompt, row, hot in zip(PROMPTS, scores, HOT, strict=True):
        alone = padded(made, [prompt], 0)
        assert is_hot(processor(alone.long(), row[None]), row[None]) == [hot]


def test_row_of_padding_alone_and_no_row_at_all(made, processor):
    pads = torch.full((2, 40), made.pad_token_id)
    scores = torch.randn(2, 9)
    assert is_hot(processor(pads, scores), scores) == [False, False]
    assert is_hot(processor(pads[:, :0], scores), scores) == [False, False]  # inputs_embeds: no ids at the first step
    assert processor(pads[:0], scores[:0]).shape == (0, 9)
    every_line = AdaptiveTemperatureLogitsProcessor(made, 0.8, 0.5, scope="line+col0")
    assert is_hot(every_line(pads[:, :0], scores), scores) == [True, True]


def test_scores_are_not_changed_and_keep_their_type(made, processor):
    batch = padded(made, PROMPTS, made.pad_token_id)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        scores = torch.randn(len(PROMPTS), 50, dtype=dtype)
        before, ids = scores.clone(), batch.clone()
        assert processor(batch, scores).dtype == dtype
        assert torch.equal(scores, before) and torch.equal(batch, ids)


def test_ruled_out_scores_stay_ruled_out(made, processor):
    batch = padded(made, PROMPTS, made.pad_token_id)
    scores = torch.randn(len(PROMPTS), 50)
    scores[:, ::3] = -torch.inf
    processed = processor(batch, scores)
    assert not processed.isnan().any() and torch.equal(processed == -torch.inf, scores == -torch.inf)


def test_only_the_window_is_read(made, processor):
    ids = made.encode("def f(x):\n    " * 40)
    window = processor.policy.automaton.window
    row, scores = torch.tensor([ids]), torch.ones(1, 4)
    changed = row.clone()
    changed[:, : -window - 1] = 7
    assert torch.equal(processor(row, scores), processor(changed, scores))


def test_more_blank_tokens_than_the_window_are_cold():
    table = VocabularyTable(["x", "\n", " "])
    automaton = BlockStart(table).automaton
    for spaces in (1, 15, 16, 17, 40):
        row = [0, 1] + [2] * spaces
        assert automaton.is_hot(row) == (spaces < 16)
        assert automaton.hot_states[automaton.states(torch.tensor([row]))[0]] == (spaces < 16)


def test_ids_beyond_the_tokenizer_are_content(processor, made):
    indented = made.encode("x:\n    ", add_special_tokens=False)
    rows = torch.tensor([[*indented, 5000], [5000, *indented]])
    scores = torch.randn(2, 6000)
    assert is_hot(processor(rows, scores), scores) == [False, True]
    automaton = processor.policy.automaton
    assert [automaton.hot_states[state] for state in automaton.states(rows)] == [False, True]
    last = LastTokenTemperatureLogitsProcessor(made, 0.8, 0.5)
    assert is_hot(last(rows[:, -1], scores), scores) == [False, True]


def test_one_temperature_is_bitwise_the_built_in_division(made):
    batch = padded(made, PROMPTS, made.pad_token_id)
    scores = torch.randn(len(PROMPTS), 300)
    same = AdaptiveTemperatureLogitsProcessor(made, block_temperature=0.7, temperature=0.7)
    assert torch.equal(same(batch, scores), scores / 0.7)


def test_integers_are_taken_for_floats(made):
    processor = AdaptiveTemperatureLogitsProcessor(made, block_temperature=2, temperature=1)
    assert processor(torch.tensor([[5]]), torch.ones(1, 3)).tolist() == [[1.0, 1.0, 1.0]]


def test_no_tokenizer_is_touched_while_generating(made, processor, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a tokenizer was used")

    batch = padded(made, PROMPTS, made.pad_token_id)
    for name in ("decode", "batch_decode", "convert_ids_to_tokens", "encode", "__call__"):
        monkeypatch.setattr(PreTrainedTokenizerBase, name, refuse)
        monkeypatch.setattr(type(made), name, refuse)
    scores = torch.randn(len(PROMPTS), 9)
    assert is_hot(processor(batch, scores), scores) == HOT


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("scope", ["line", "block", "reference", "line+col0"])
def test_copies_decide_the_same(made, scope, copied):
    batch = padded(made, PROMPTS, made.pad_token_id)
    scores = torch.randn(len(PROMPTS), 9)
    for original in (
        AdaptiveTemperatureLogitsProcessor(tokenizer("sentencepiece"), scope=scope),
        LastTokenTemperatureLogitsProcessor(made),
    ):
        assert torch.equal(copied(original)(batch, scores), original(batch, scores))


@pytest.mark.parametrize("scope", ["line", "block"])
def test_compiles_into_one_graph(made, scope):
    processor = AdaptiveTemperatureLogitsProcessor(made, scope=scope)
    compiled = torch.compile(processor, fullgraph=True, backend="aot_eager", dynamic=True)
    batch = padded(made, PROMPTS, made.pad_token_id)
    for length in (batch.shape[1], 3, 1):
        scores = torch.randn(len(PROMPTS), 40)
        torch.testing.assert_close(compiled(batch[:, -length:], scores), processor(batch[:, -length:], scores))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("scope", ["line", "block", "reference", "line+col0"])
def test_no_host_synchronisation_on_cuda(made, scope):
    processor = AdaptiveTemperatureLogitsProcessor(made, scope=scope)
    batch = padded(made, PROMPTS, made.pad_token_id)
    scores = torch.randn(len(PROMPTS), 40)
    ids, on_device = batch.cuda(), scores.cuda()
    processor(ids, on_device)  # copies the tables to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = processor(ids, on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(found.cpu(), processor(batch, scores))


def test_presets_and_arguments_over_them(made):
    for name, pair in PRESETS.items():
        policy = AdaptiveTemperatureLogitsProcessor(made, preset=name).policy
        assert {"block_temperature": policy.block_temperature, "temperature": policy.temperature} == pair
        assert pair["block_temperature"] > pair["temperature"]
    policy = AdaptiveTemperatureLogitsProcessor(made, preset="pass1", temperature=0.1).policy
    assert (policy.block_temperature, policy.temperature) == (0.2, 0.1)
    default = AdaptiveTemperatureLogitsProcessor(made).policy
    assert (default.block_temperature, default.temperature, default.scope) == (0.8, 0.5, "line")


BAD = [float("nan"), float("inf"), -float("inf"), 0, 0.0, -0.5, "0.5", True]


@pytest.mark.parametrize("name", ["block_temperature", "temperature"])
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", [AdaptiveTemperatureLogitsProcessor, LastTokenTemperatureLogitsProcessor])
def test_bad_temperatures_are_named(made, kind, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be a finite number above 0 .*, got {value!r}"):
        kind(made, **{name: value})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "indent"}, "scope must be one of line, block, reference, line\\+col0, got 'indent'"),
        ({"region": "code"}, "region must be one of all, fenced, got 'code'"),
        ({"language": "lua"}, "language must be one of python, c, .*, got 'lua'"),
        ({"preset": "best"}, "preset must be one of default, .*, got 'best'"),
        ({"max_batch_size": 0}, "max_batch_size must be an integer >= 1 or None, got 0"),
        ({"rule": BlockStart, "scope": "line"}, "leave out scope"),
        ({"rule": BlockStart, "preset": "pass1"}, "leave out preset"),
    ],
)
def test_bad_options_are_named(made, options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveTemperatureLogitsProcessor(made, **options)


def test_a_rule_that_makes_no_policy_is_refused(made):
    with pytest.raises(TypeError, match="rule must return a policy"):
        AdaptiveTemperatureLogitsProcessor(made, rule=len)


def test_a_table_brings_its_language(made):
    table = VocabularyTable.from_tokenizer(made, language="go")
    AdaptiveTemperatureLogitsProcessor(table, language="go")
    with pytest.raises(ValueError, match="language must be that of the table, 'go', or left out, got 'rust'"):
        AdaptiveTemperatureLogitsProcessor(table, language="rust")


@pytest.mark.parametrize("window", [0, 3, -1, True, 2.0])
def test_window_must_be_a_power_of_two(made, window):
    with pytest.raises(ValueError, match="window must be a power of two"):
        BlockStart(VocabularyTable.from_tokenizer(made), window=window)


def test_a_rule_that_could_never_fire_is_refused(made):
    """The reference scope on a vocabulary without the single tokens its authors' code counts on."""
    with pytest.raises(ValueError, match="the rule would never fire"):
        BlockStart(VocabularyTable(["x", "\n  ", "  "]), scope="reference")
    with pytest.raises(ValueError, match="the rule would never fire"):
        LastTokenTemperatureLogitsProcessor(VocabularyTable(["x", "\n", " "]))


def test_a_batch_larger_than_promised_is_refused(made):
    processor = AdaptiveTemperatureLogitsProcessor(made, max_batch_size=2)
    processor(torch.ones(2, 3, dtype=torch.long), torch.ones(2, 5))
    with pytest.raises(ValueError, match="a batch of 3 rows, but max_batch_size=2 was promised"):
        processor(torch.ones(3, 3, dtype=torch.long), torch.ones(3, 5))


@pytest.mark.parametrize("shape", [(4,), (3, 5)])
def test_ids_that_are_not_the_rows_of_the_scores_are_refused(processor, shape):
    with pytest.raises(ValueError, match=r"input_ids must be \[batch, length\] with the 4 rows of scores"):
        processor(torch.ones(shape, dtype=torch.long), torch.ones(4, 5))


def test_work_does_not_grow_with_the_length(made, processor, monkeypatch):
    """Counted, not timed: how many tokens of a row without any end to its indentation are looked at."""
    read = []

    class Counting(dict):
        def get(self, key):
            read[-1] += 1
            return super().get(key)

    automaton = processor.policy.automaton
    monkeypatch.setattr(automaton, "_steps", Counting())
    space = VocabularyTable.from_tokenizer(made).texts.index(" ")
    for length in (32, 4096):
        read.append(0)
        processor(torch.full((1, length), space), torch.ones(1, 4))
    assert read == [automaton.window] * 2
