"""Examples from files, folders and data sets."""

import json

import pytest
from datasets import Dataset, DatasetDict

from hf_qst_plugins.inputs import DataError, read_rows


def test_json_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two\\u2028three"}\n', encoding="utf-8")
    assert read_rows(str(path)) == [{"text": "one"}, {"text": "two\u2028three"}]
    path.write_text(json.dumps({"body": "one"}) + "\n")
    assert read_rows(str(path), text_field="body") == [{"body": "one", "text": "one"}]


def test_text_file_and_folder(tmp_path):
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.md").write_text("one")
    (tmp_path / "a" / "image.bin").write_bytes(b"\xff\x00")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "empty.txt").write_text(" \n")
    assert read_rows(str(tmp_path / "b.txt")) == [{"text": "two"}]
    assert read_rows(str(tmp_path)) == [{"text": "one"}, {"text": "two"}]


def test_saved_data_sets(tmp_path):
    rows = [{"text": "one"}, {"text": "two"}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "plain")
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}).save_to_disk(
        tmp_path / "parts"
    )
    assert read_rows(str(tmp_path / "plain")) == rows
    assert read_rows(str(tmp_path / "parts"), split="test") == rows[:1]
    with pytest.raises(DataError, match="cannot be loaded"):
        read_rows(str(tmp_path / "parts"), split="dev")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text"\n', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", b"[1]\n", r"a\.jsonl, line 1 is a list, not an object"),
        ("a.jsonl", b"", "holds no examples"),
        ("a.txt", b"\xff\xfe\xff", r"a\.txt is not UTF-8 text"),
        ("a.txt", None, "there is no file or folder"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(str(tmp_path / name))


def test_unknown_data_set_is_named():
    with pytest.raises(DataError, match=r"the data set 'nobody/nothing-1\.0' cannot be loaded"):
        read_rows("nobody/nothing-1.0")
