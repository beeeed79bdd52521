"""Prediction difficulty: the classes of tokens, the losses, the table."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_qst_plugins.adaptive_temperature.rules import line_rule
from hf_qst_plugins.adaptive_temperature.vocabulary import VocabularyTable
from hf_qst_plugins.code_evaluation.difficulty import hot_steps, measure_difficulty, ranks, token_losses
from hf_qst_plugins.code_evaluation.difficulty.__main__ import main
from hf_qst_plugins.code_evaluation.difficulty.source_classes import POSITIONS, SYNTAX, SourceClasses

BASE = Path(__file__).parents[3] / "examples" / "base_model"
SOURCE = '''import os  # paths

def first(x, y=1):
    """One.

    Two.
    """
    if x:
        # why
        z = call(x,
                 y)
        return "a" + z
    return None
'''


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def classes(pieces):
    """(piece, position, syntax) of each, `pieces` being SOURCE cut at will."""
    assert "".join(pieces) == SOURCE
    ends = np.cumsum([len(piece) for piece in pieces])
    spans = [(int(end) - len(piece), int(end)) for piece, end in zip(pieces, ends, strict=True)]
    position, syntax = SourceClasses(SOURCE).classify(spans)
    return [(p, POSITIONS[a], SYNTAX[b]) for p, a, b in zip(pieces, position, syntax, strict=True)]


def test_classes_of_words_on_their_lines():
    found = classes(re.findall(r"\n[ ]*|[ ]+|\w+|\"\"\"|[^\w\s]", SOURCE))
    expected = {
        ("import", "first of a column-0 statement", "keyword"),
        ("os", "later on a line", "identifier"),
        ("#", "later on a line", "comment"),
        ("paths", "later on a line", "later piece"),
        ("def", "first of a column-0 statement", "keyword"),
        ("first", "later on a line", "identifier"),
        ('"""', "first of a block", "string"),
        ("One", "second of a line", "later piece"),
        ("Two", "first of a line in a string", "later piece"),
        ("if", "first of an indented statement", "keyword"),
        ("#", "first of a comment line", "comment"),
        ("z", "first of a block", "identifier"),
        ("y", "first of a continuation line", "identifier"),
        ("return", "first of an indented statement", "keyword"),
        ("1", "later on a line", "number"),
        ("+", "later on a line", "operator"),
        ("None", "later on a line", "keyword"),
        ("\n    ", "newline", "newline/indent"),
    }
    assert expected <= set(found)
    assert [piece for piece, position, _ in found if position == "first of a block"] == ['"""', "z"]
    # The closing quotes of the docstring begin a line inside it.
    assert ('"""', "first of a line in a string", "later piece") in found


def test_blanks_belong_to_the_token_that_brings_the_first_visible_character():
    joined = classes(re.findall(r"\n[ ]*(?=\n)|\n[ ]*\w+|[ ]*\w+|[ ]+|\n[ ]*|[^\w\s]", SOURCE))
    assert ("\n    if", "first of an indented statement", "keyword") in joined
    assert (" os", "second of a line", "identifier") in joined
    separate = classes(re.findall(r"\n|[ ]+|\w+|[^\w\s]", SOURCE))
    assert ("    ", "indentation", "newline/indent") in separate
    assert ("\n", "newline", "newline/indent") in separate
    assert (" ", "second of a line", "newline/indent") not in separate


@pytest.mark.parametrize("character", ["\u2028", "\x85", "\x1c", "\xa0"], ids=ascii)
def test_whitespace_that_is_none_to_python_is_part_of_its_string(character):
    text = f'x = """a\n{character}b"""\ny = 1\n'
    at = text.index(character)
    (position,), (syntax,) = SourceClasses(text).classify([(at, at + 1)])
    assert (POSITIONS[position], SYNTAX[syntax]) == ("first of a line in a string", "later piece")


def test_what_is_not_python_is_refused():
    for text in ("def f(:\n  '", "x = (\n", "if x:\n    y\n  z\n"):
        with pytest.raises((SyntaxError, Exception), match=r".") as error:
            SourceClasses(text)
        assert type(error.value).__name__ in {"TokenError", "IndentationError", "SyntaxError"}


def test_difficulty_is_the_rank_within_the_file():
    assert ranks(np.array([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
    assert ranks(np.array([7.0])).tolist() == [0.0]
    assert ranks(np.random.default_rng(0).random(101)).mean() == pytest.approx(0.5)


@pytest.mark.parametrize("length", [3, 15, 16, 17, 24, 25, 70])
@pytest.mark.parametrize("start", [None, 5])
def test_every_token_is_predicted_once_from_a_window_of_context(model, length, start):
    """Against one call a token, on exactly the tokens that its window shows."""
    context = 16
    torch.manual_seed(length)
    ids = torch.randint(0, 6000, (length,)).tolist()
    losses, entropies = token_losses(model, ids, start, context, batch_size=3)
    row = ids if start is None else [start, *ids]
    for index in range(1, len(row)):
        window = 0 if index < context else (index - context) // (context // 2) * (context // 2) + context // 2
        with torch.no_grad():
            logits = model(torch.tensor([row[window:index]])).logits[0, -1].double()
        loss = F.cross_entropy(logits[None], torch.tensor([row[index]])).item()
        entropy = torch.distributions.Categorical(logits=logits).entropy().item()
        at = index - (start is not None)
        # float32 sums over 6,144 tokens in another order.
        assert losses[at] == pytest.approx(loss, rel=1e-4, abs=1e-4)
        assert entropies[at] == pytest.approx(entropy, rel=1e-4, abs=1e-4)
    assert np.isnan(losses).sum() == (start is None)


def test_hot_steps_are_where_an_indented_line_starts(tokenizer):
    ids = tokenizer(SOURCE, add_special_tokens=False)["input_ids"]
    hot = hot_steps(line_rule(), VocabularyTable.from_tokenizer(tokenizer), ids)
    before = [tokenizer.decode(ids[:index]) for index in range(len(ids))]
    assert hot.tolist() == [bool(re.search(r"\n[ \t]+\Z", text)) for text in before]
    assert hot.any()


def test_table_holds_every_token_once_a_split(model, tokenizer, caplog):
    table = measure_difficulty(model, tokenizer, [("a.py", SOURCE), ("b.txt", "x = ("), ("c.py", SOURCE * 3)], 32)
    assert (table.files, table.skipped) == (2, 1) and "b.txt" in caplog.text
    ids = tokenizer(SOURCE, add_special_tokens=False)["input_ids"]
    thrice = tokenizer(SOURCE * 3, add_special_tokens=False)["input_ids"]
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    losses = np.concatenate([token_losses(model, row, start, 32)[0] for row in (ids, thrice)])
    everything = table.rows[-1]
    assert everything.split == "all" and everything.tokens == table.tokens == len(losses)
    assert everything.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert everything.pd == pytest.approx(0.5)
    for split in ("group", "position", "syntax"):
        rows = [row for row in table.rows if row.split == split]
        assert sum(row.tokens for row in rows) == table.tokens
        assert sum(row.share * row.loss for row in rows) == pytest.approx(everything.loss)
        assert sum(row.share * row.pd for row in rows) == pytest.approx(0.5)
    # Four docstrings and four bodies of `if`.
    assert next(row.tokens for row in table.rows if row.name == "first of a block") == 8
    line, block = table.hot_steps
    assert 0 < block.hot < line.hot < 0.5 and line.effective <= line.hot


def test_table_is_written_as_text_json_and_plot(model, tokenizer, tmp_path):
    table = measure_difficulty(model, tokenizer, [("a.py", SOURCE)])
    markdown, data, plot = table.save(tmp_path / "out")
    assert "| first of a block | 2 |" in markdown.read_text()
    assert json.loads(data.read_text())["rows"][0]["name"] == "block start"
    assert plot.read_bytes().startswith(b"\x89PNG") and len(list((tmp_path / "out").iterdir())) == 3


def test_command_line(model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text(SOURCE)
    output = tmp_path / "difficulty"
    main(
        [
            "--model",
            str(tmp_path / "model"),
            "--files",
            str(tmp_path / "code"),
            "--output",
            str(output),
            "--device",
            "cpu",
        ]
    )
    assert "| block start | 2 |" in capsys.readouterr().out and (output / "difficulty.png").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"context": 65}, ["context", "64", "65"]),
        ({"context": 3}, ["context", "3"]),
        ({"files": []}, ["files"]),
        ({"files": [("a", "x = (")]}, ["files", "1"]),
    ],
)
def test_bad_input_is_refused(model, tokenizer, changes, words):
    with pytest.raises(ValueError) as error:
        measure_difficulty(**{"model": model, "tokenizer": tokenizer, "files": [("a", "x = 1\n")], **changes})
    assert all(word in str(error.value) for word in words)
