"""Vocabulary tables: the same from bytes and from decoding, cached, saved, and refused where no rule could fire."""

import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_qst_plugins.adaptive_temperature import TokenizerMismatchError, TokenKind, VocabularyTable
from hf_qst_plugins.adaptive_temperature import vocabulary as vocabulary_module
from hf_qst_plugins.adaptive_temperature.token_text import is_byte_level, token_texts, tokenizer_hash
from tests.plugins.code_tokenizers import KINDS, byte_level, tokenizer


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache on disk, and nothing remembered in memory."""
    monkeypatch.setenv("HF_QST_CACHE", str(tmp_path))
    monkeypatch.setattr(vocabulary_module, "_built", type(vocabulary_module._built)())
    return tmp_path


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sentencepiece"])
def test_bytes_and_decoding_give_the_same_texts(kind):
    made = tokenizer(kind)
    assert is_byte_level(made)
    assert token_texts(made, byte_level=True) == token_texts(made, byte_level=False)


def test_sentencepiece_texts():
    made = tokenizer("sentencepiece")
    table = VocabularyTable.from_tokenizer(made)
    text = {token: table.texts[index] for token, index in made.get_vocab().items()}
    assert text["▁"] == " " and text["▁▁▁"] == "   " and text["<0x0A>"] == "\n" and text["<0x09>"] == "\t"
    assert text["<s>"] is None and text["<pad>"] is None
    assert table.adds_leading_space and not VocabularyTable.from_tokenizer(tokenizer("gpt2")).adds_leading_space


@pytest.mark.parametrize(
    ("text", "kind", "width"),
    [
        ("x", "CONTENT", 0), ("\nx", "CONTENT", 0), ("x ", "CONTENT", 0), ("\ufffd", "CONTENT", 0),
        (" ", "BLANK", 1), ("", "BLANK", 0), ("\t ", "BLANK", 9), ("  \t", "BLANK", 8), ("\r", "BLANK", 0),
        ("\n", "NEWLINE", 0), (":\n", "NEWLINE", 0), ("\r\n", "NEWLINE", 0), ("  \n", "NEWLINE", 0), ("\n\f", "NEWLINE", 0),
        ("\n   ", "INDENTED_NEWLINE", 3), ("):\n\t", "INDENTED_NEWLINE", 8), ("\n\n  ", "INDENTED_NEWLINE", 2),
        (None, "BOUNDARY", 0),
    ],
)  # fmt: skip
def test_kinds_and_widths(text, kind, width):
    table = VocabularyTable([text, "\n", " "])
    assert TokenKind(int(table.kinds[0])).name == kind and int(table.widths[0]) == width


def test_added_whitespace_tokens_are_text_and_markers_are_boundaries():
    made = byte_level("gpt2")
    made.add_tokens(["<ws>", "\n\n\n\n\n"])
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "        "]})
    table = VocabularyTable.from_tokenizer(made, disk_cache=False)
    index = made.convert_tokens_to_ids
    assert table.texts[index("\n\n\n\n\n")] == "\n\n\n\n\n" and table.texts[index("<ws>")] == "<ws>"
    assert table.texts[index("<|im_start|>")] is None
    assert table.texts[index("        ")] == "        "


def test_built_once_a_tokenizer_and_read_from_disk_after(cache, monkeypatch):
    made = byte_level("gpt2")
    first = VocabularyTable.from_tokenizer(made)
    assert [path.name for path in cache.iterdir()] == [f"vocabulary-{tokenizer_hash(made)[:24]}.json"]

    def refuse(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(vocabulary_module, "token_texts", refuse)
    assert VocabularyTable.from_tokenizer(made, language="go").texts == first.texts
    vocabulary_module._built.clear()
    assert VocabularyTable.from_tokenizer(made).texts == first.texts
    made.add_tokens(["\n  \n"])  # another vocabulary: neither memory nor disk knows it
    with pytest.raises(AssertionError, match="built again"):
        VocabularyTable.from_tokenizer(made)


def test_padding_a_call_does_not_change_the_hash():
    made = byte_level("gpt2")
    before = tokenizer_hash(made)
    made(["x", "x y z"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(made) == before != tokenizer_hash(tokenizer("cl100k"))


@pytest.mark.parametrize("content", ["{", "[]", '{"version": 1}'])
def test_a_damaged_cache_file_is_made_again_with_a_warning(cache, content, caplog):
    made = byte_level("gpt2")
    path = cache / f"vocabulary-{tokenizer_hash(made)[:24]}.json"
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        table = VocabularyTable.from_tokenizer(made)
    assert "cannot be read and is made again" in caplog.text
    assert json.loads(path.read_text())["texts"] == table.texts


def test_a_cache_that_cannot_be_written_costs_a_warning(cache, monkeypatch, caplog):
    (cache / "file").write_text("")
    monkeypatch.setenv("HF_QST_CACHE", str(cache / "file"))
    with caplog.at_level(logging.WARNING):
        assert len(VocabularyTable.from_tokenizer(byte_level("gpt2"))) == 2048
    assert "not kept on disk" in caplog.text


def test_saved_and_loaded_table_is_equal(tmp_path):
    made = tokenizer("sentencepiece")
    table = VocabularyTable.from_tokenizer(made, language="rust", tab_width=4)
    table.save(tmp_path / "table.json")
    loaded = VocabularyTable.load(tmp_path / "table.json", made)
    assert vars(loaded) == {name: value for name, value in vars(table).items() if name not in ("kinds", "widths")}
    assert torch.equal(loaded.kinds, table.kinds) and torch.equal(loaded.widths, table.widths)
    with pytest.raises(TokenizerMismatchError, match="belongs to the tokenizer with hash"):
        VocabularyTable.load(tmp_path / "table.json", tokenizer("gpt2"))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": 2, "texts": []}', '{"version": 1, "texts": []}'])
def test_a_file_that_is_no_table_is_named(tmp_path, content):
    path = tmp_path / "table.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"table\.json is not"):
        VocabularyTable.load(path)


@pytest.mark.parametrize(
    ("texts", "cause"),
    [(["x", " "], "no newline token"), (["x", "\n", "\n\n"], "no indentation token"), ([None], "no newline token")],
)
def test_a_vocabulary_without_lines_is_refused(texts, cause):
    with pytest.raises(ValueError, match=cause):
        VocabularyTable(texts)


def words(normalizer=None, **vocabulary):
    made = Tokenizer(models.WordLevel({"[UNK]": 0, "x": 1, **vocabulary}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="isolated")
    if normalizer is not None:
        made.normalizer = normalizer
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")


def test_a_tokenizer_without_newline_is_refused_naming_the_cause():
    with pytest.raises(ValueError, match="no newline token: none of the 1 texts"):
        VocabularyTable.from_tokenizer(words(), disk_cache=False)


def test_a_tokenizer_that_normalises_newlines_away_is_refused():
    made = words(normalizers.Replace("\n", " "), **{"\n": 2, " ": 3})
    with pytest.raises(ValueError, match="the tokenizer drops line breaks"):
        VocabularyTable.from_tokenizer(made, disk_cache=False)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"language": "cobol"}, "language must be one of python, c, cpp, java, javascript, go, rust, got 'cobol'"),
        ({"tab_width": 0}, "tab_width must be an integer >= 1, got 0"),
        ({"overrides": {999_999: " "}}, r"overrides must name ids in \[0, 2048\), got 999999"),
    ],
)
def test_bad_options_are_named(option, message):
    with pytest.raises(ValueError, match=message):
        VocabularyTable.from_tokenizer(tokenizer("gpt2"), **option)
