"""The text of completions: what tokens spell behind a prompt, where it is cut, and how many tokens it took."""

import random
import re
import tokenize
from io import StringIO

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from hf_qst_plugins.code_evaluation import Problem, Sampler, truncate
from hf_qst_plugins.code_evaluation.sampling.completion import parses
from hf_qst_plugins.code_evaluation.sampling.generated_text import GeneratedText
from tests.plugins.code_tokenizers import KINDS, tokenizer

SEPARATORS = ["\u2028", "\u2029", "\x85", "\x1c", "\x1d", "\x1e", "\x0b", "\x0c"]
"""All at which `str.splitlines` splits and Python's tokenizer does not end a line."""


# --- where it is cut --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
@pytest.mark.parametrize("place", ['    return "a{}b"\n', "    # a{}b\n    return 1\n", '    x = """a\n    c{}b"""\n'])
def test_characters_that_end_no_line_cut_nothing(separator, place):
    body = "\n" + place.format(separator)
    assert truncate(body + "def g():\n") == body
    assert truncate(body, on_new_line=True) == body
    if separator != "\x0c":
        assert len(tokenize_lines("def f():" + body)) == len(re.findall("\n", body)) + 1


def tokenize_lines(source):
    return {token.start[0] for token in tokenize.generate_tokens(StringIO(source).readline) if token.type > 0}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_every_line_end_of_python_is_one(end):
    body = f"{end}    x = 1{end}{end}    return x{end}"
    assert truncate(f"{body}def g():{end}    pass{end}") == body
    assert parses("def f():" + body)
    kept = truncate(f"def f(): return 1{end}class A: pass", ["\nclass "], body=False)
    assert kept.rstrip("\r") == "def f(): return 1"


@pytest.mark.parametrize(
    ("line", "at_column_0"),
    [
        ("x", True),
        ("\x0cx", True),  # a form feed takes the column back to 0
        ("  \x0cx", True),
        ("\x0c  x", False),
        ("\t\x0c\tx", False),
        (" x", False),
        ("\tx", False),
        ("\xa0x", True),  # no indentation to Python
        ("\u2003x", True),
        ("\x1cx", True),
        ("", False),
        ("  \t\x0c", False),
        ("#", True),
    ],
    ids=ascii,
)
def test_column_0_is_where_python_has_it(line, at_column_0):
    body = "\n    return 1\n"
    assert truncate(body + line + "\n    y\n") == (body if at_column_0 else body + line + "\n    y\n")


def test_only_pythons_whitespace_is_left_to_the_model():
    sampler = Sampler(model("gpt2"), tokenizer("gpt2"))
    for end in SEPARATORS[:-1]:
        prompt = f'def f(x):\n    """A. {end}'
        assert sampler.prompt(Problem("a", prompt + " \t\x0c\r\n ", "", "", "f")) == prompt


# --- what tokens spell ------------------------------------------------------------------------------------------------

PIECES = [
    "def f(x):",
    "\n",
    "    return",
    " x",
    "\u2264",
    "\u4e2d",
    "\U0001f600",
    "\t",
    '"""',
    " ",
    "# \u00e9",
    "\u2028",
    "y",
]


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_generated_text_join_to_the_text_of_all_tokens(kind):
    made, drawn, compared = tokenizer(kind), random.Random(0), 0
    text = GeneratedText(made)
    for _ in range(300):
        whole = "x" + "".join(drawn.choices(PIECES, k=drawn.randrange(1, 12)))
        ids = made(whole, add_special_tokens=False)["input_ids"]
        at = drawn.randrange(len(ids))
        prompt = made.decode(ids[:at], clean_up_tokenization_spaces=False)
        if at and "\ufffd" not in prompt:  # a prompt ends with a whole character
            assert prompt + text(ids[at:]) == whole
            compared += 1
    assert compared > 100


@pytest.mark.parametrize("character", ["\u2264", "\u2260\u2264", "\U0001f600", "\u4e2d\u6587"])
@pytest.mark.parametrize("after", ["\n    return 1\n", "\n\n", "\n\u2264\n"])
def test_a_line_break_behind_a_prompt_spelled_in_bytes_is_kept(character, after):
    made = tokenizer("sentencepiece")
    prompt = made(f"# {character}", add_special_tokens=False)["input_ids"]
    ids = made(f"# {character}{after}", add_special_tokens=False)["input_ids"]
    assert made.convert_ids_to_tokens(prompt[-1]).startswith("<0x") and ids[: len(prompt)] == prompt
    assert GeneratedText(made)(ids[len(prompt) :]) == after


def test_an_unfinished_character_takes_no_line_break_with_it():
    made = tokenizer("sentencepiece")
    ids = made.convert_tokens_to_ids(["<0x0A>", "<0x0A>", "<0xE2>", "<0x89>"])
    assert GeneratedText(made)(ids) == "\n\n\ufffd"
    assert GeneratedText(made)([*ids, made.convert_tokens_to_ids("<0xA4>")]) == "\n\n\u2264"


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_are_left_out(kind):
    made = tokenizer(kind)
    ids = made("x = 1", add_special_tokens=False)["input_ids"]
    text = GeneratedText(made)
    assert text([made.eos_token_id, *ids, made.eos_token_id]) == text(ids)


# --- how many tokens --------------------------------------------------------------------------------------------------


def model(kind, **changes):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer(kind)),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        **{"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **changes},
    )
    return LlamaForCausalLM(config).eval()


class Dictated:
    """Makes `generate` draw these ids, one list a row."""

    def __init__(self, rows, start):
        self.rows, self.start = rows, start

    def __call__(self, input_ids, scores):
        at = input_ids.shape[1] - self.start
        forced = torch.full_like(scores, -torch.inf)
        for row, ids in enumerate(self.rows):
            forced[row, ids[min(at, len(ids) - 1)]] = 0.0
        return forced


PROMPT = Problem("a", "def f(x):", "", "", "f")


def drawn(texts, kind="gpt2", tail="", changes=None, end_of_model=None, **kwargs):
    """What `Sampler.draw` makes of rows that spell `texts`, and the tokens of each."""
    made, network = tokenizer(kind), model(kind, **(changes or {}))
    network.generation_config.eos_token_id = end_of_model
    rows = [made(text, add_special_tokens=False)["input_ids"] for text in texts]
    if kind == "sentencepiece":
        rows = [ids[1:] for ids in rows]  # the space that it puts before a text
    longest = max(map(len, rows)) + 4
    more = made(tail, add_special_tokens=False)["input_ids"] if tail else [made.eos_token_id]
    sampler = Sampler(network, made, {"max_new_tokens": longest, **kwargs})
    start = sampler.encode(PROMPT)["input_ids"].shape[1]
    forced = Dictated([[*ids, *more] for ids in rows], start)
    sampler.generate_kwargs["logits_processor"] = [forced]
    return sampler.draw(PROMPT, len(texts), 0), rows


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pad", ["own", "end-of-text"])
def test_end_of_text_is_counted_and_padding_is_not(kind, pad):
    texts = ["\n    return x\n", "\n    y = x + 1\n    return y * 2 + x\n"]
    made = tokenizer(kind)
    token = made.eos_token_id if pad == "end-of-text" else made.pad_token_id
    samples, rows = drawn(texts, kind, pad_token_id=token)
    assert samples == [(text, len(ids) + 1) for text, ids in zip(texts, rows, strict=True)]


@pytest.mark.parametrize("pad", ["own", "end-of-text"])
@pytest.mark.parametrize("last", [0, 1])
def test_rows_that_stop_early_count_the_tokens_they_have(pad, last):
    """The first token of another function ends a row; the other row goes on, so that the first is padded, or not."""
    made = tokenizer("gpt2")
    token = made.eos_token_id if pad == "end-of-text" else made.pad_token_id
    body, longer = "\n    return x\n", "\n    y = x + 1\n    y = y * 2\n    return y * 2 + x\n"
    texts = [body + "def g(", longer][:: -1 if last else 1]
    samples, rows = drawn(texts, pad_token_id=token)
    short, long = (0, 1) if not last else (1, 0)
    alone = [made.decode(rows[short][:count]) for count in range(1, len(rows[short]) + 1)]
    needed = next(count for count, text in enumerate(alone, 1) if truncate(text) < text)
    assert samples[short] == (body, needed)
    assert samples[long] == (longer, len(rows[long]) + 1)


@pytest.mark.parametrize("ending", ["model", "several of the model's", "asked for"])
def test_the_models_own_end_tokens_are_ends(ending):
    made = tokenizer("gpt2")
    own = made.convert_tokens_to_ids("<s>")
    options = {
        "model": {"end_of_model": own},
        "several of the model's": {"end_of_model": [made.eos_token_id, own]},
        "asked for": {"end_of_model": made.eos_token_id, "eos_token_id": own},
    }[ending]
    texts = ["\n    return x\n", "\n    y = x + 1\n    return y * 2 + x\n"]
    samples, rows = drawn(texts, tail="<s>", **options)
    assert samples == [(text, len(ids) + 1) for text, ids in zip(texts, rows, strict=True)]


def test_rows_that_reach_the_length_count_all_of_it():
    texts = ["\n    return x", "\n    return y"]
    samples, _ = drawn(texts, max_new_tokens=2)
    assert [tokens for _, tokens in samples] == [2, 2]


class AfterTokens:
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        done = input_ids.shape[1] >= self.length
        return torch.tensor([done, False])


def test_ends_that_the_caller_asks_for_are_counted_too():
    made = tokenizer("gpt2")
    texts = ["\n    return x + 1 # END here\n", "\n    y = x + 1\n    y = y * 2\n    return y * 2 + x - 3\n"]
    samples, rows = drawn(texts, stop_strings=["END"], pad_token_id=made.eos_token_id)
    needed = next(n for n in range(len(rows[0])) if "END" in made.decode(rows[0][:n]))
    assert samples[0] == (made.decode(rows[0][:needed]), needed) and samples[1] == (texts[1], len(rows[1]) + 1)
    prompt = len(made(PROMPT.prompt)["input_ids"])
    samples, rows = drawn(texts, stopping_criteria=[AfterTokens(prompt + 3)], pad_token_id=made.eos_token_id)
    assert samples[0] == (made.decode(rows[0][:3]), 3) and samples[1] == (texts[1], len(rows[1]) + 1)


def test_beams_are_counted_as_well():
    made = tokenizer("gpt2")
    sampler = Sampler(model("gpt2"), made, {"max_new_tokens": 8, "num_beams": 4, "do_sample": False})
    for text, tokens in sampler.draw(PROMPT, 3, 0):
        assert 1 <= tokens <= 8 and truncate(text) == text


# --- arguments of generate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_return_sequences": 2}, ["num_return_sequences", "2", "samples"]),
        ({"input_ids": torch.ones(1, 1)}, ["input_ids", "problems"]),
        ({"attention_mask": [1]}, ["attention_mask", "problems"]),
        ({"return_dict_in_generate": True}, ["return_dict_in_generate"]),
        ({"max_length": 20}, ["max_new_tokens", "max_length=20"]),
        ({"max_new_tokens": None}, ["max_new_tokens", "None"]),
        ({"max_new_tokens": 0}, ["max_new_tokens", "0"]),
        ({"max_new_tokens": 2.5}, ["max_new_tokens", "2.5"]),
        ({"generation_config": GenerationConfig(max_length=20)}, ["max_new_tokens", "max_length=20"]),
        ([("temperature", 1.0)], ["generate_kwargs", "list"]),
    ],
)
def test_arguments_that_are_set_by_the_evaluation_are_refused_by_name(given, words):
    with pytest.raises(ValueError) as error:
        Sampler(model("gpt2"), tokenizer("gpt2"), given)
    assert all(word in str(error.value) for word in words)


def test_a_generation_configs_values_go_between_the_arguments_and_the_defaults():
    config = GenerationConfig(temperature=0.3, top_p=0.5, max_new_tokens=7, max_length=99, repetition_penalty=1.5)
    given = {"generation_config": config, "top_p": 0.6}
    kwargs = Sampler(model("gpt2"), tokenizer("gpt2"), given).generate_kwargs
    assert kwargs == {
        "do_sample": True,
        "temperature": 0.3,
        "top_p": 0.6,
        "top_k": 0,
        "max_new_tokens": 7,
        "repetition_penalty": 1.5,
    }
    assert given == {"generation_config": config, "top_p": 0.6}
