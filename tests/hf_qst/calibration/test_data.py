"""Forms of calibration data: what is taken, and one message for what is not."""

import logging

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from hf_qst.calibration import CalibrationError, as_batches
from hf_qst.mixed_rank import MixedRankConfig, compress
from hf_qst.pruning import prune_model
from tests.architectures import side_tuned, tiny, token_batch

IDS = token_batch(16, 12)
ROWS = {
    "input_ids": IDS.tolist(),
    "attention_mask": torch.ones_like(IDS).tolist(),
    "label": [1] * 16,
    "idx": [*range(16)],
}


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "rows",
    [
        Dataset.from_dict({"input_ids": IDS.tolist()}),
        Dataset.from_dict({"input_ids": IDS.tolist()}).with_format("torch"),
        Dataset.from_dict({"input_ids": IDS.tolist()}).with_format("numpy"),
        [{"input_ids": row} for row in IDS],
        [{"input_ids": row.numpy().astype(np.int32)} for row in IDS],
    ],
)
def test_rows_of_a_data_set_are_put_together(rows):
    assert_same(as_batches(rows), [{"input_ids": IDS[:8]}, {"input_ids": IDS[8:]}])


@pytest.mark.parametrize(
    "batches",
    [
        [{"input_ids": IDS.numpy()}],
        [{"input_ids": IDS.numpy().astype(np.int16)}],
        [{"input_ids": IDS.tolist()}],
        [{"input_ids": list(IDS)}],
        [{"input_ids": [row.numpy() for row in IDS]}],
        [BatchEncoding({"input_ids": IDS})],
        {"input_ids": IDS},
        [{"input_ids": IDS, "text": ["a"] * 16, "attention_mask": None}],
        [{"input_ids": IDS, "text": np.array(["a"] * 16)}],
        DataLoader(Dataset.from_dict({"input_ids": IDS.tolist()}).with_format("torch"), batch_size=16),
        Dataset.from_dict({"input_ids": IDS.tolist()}).iter(16),
    ],
)
def test_batches_come_as_they_come(batches):
    assert_same(as_batches(batches), [{"input_ids": IDS}])


def test_rows_of_other_lengths_begin_another_batch():
    rows = [{"input_ids": list(range(3, 3 + n))} for n in (4, 4, 6, 4)]
    assert [list(b["input_ids"].shape) for b in as_batches(rows)] == [[2, 4], [1, 6], [1, 4]]
    assert len(as_batches(rows, 2)) == 2


def test_images_without_a_batch_dimension_are_rows():
    pictures = np.random.default_rng(0).random((3, 3, 8, 8))
    found = as_batches([{"pixel_values": one, "label": i} for i, one in enumerate(pictures)])
    assert_same(found, [{"pixel_values": torch.tensor(pictures).float(), "labels": torch.arange(3)}])


def test_columns_that_the_model_does_not_take_are_left_out():
    found = as_batches(Dataset.from_dict(ROWS), model=tiny("llama", classifier=True))
    assert {key for batch in found for key in batch} == {"input_ids", "attention_mask", "labels"}


def test_an_unknown_input_of_a_batch_is_named():
    model = torch.nn.Linear(4, 4)
    with pytest.raises(
        CalibrationError, match=r"batch 1 has 'inputs', which Linear.forward does not take; it takes input"
    ):
        as_batches([{"input": torch.ones(2, 4)}, {"inputs": torch.ones(2, 4)}], model=model)


@pytest.mark.parametrize(
    "data, message",
    [
        ([{"input_ids": [[1, 2, 3], [1, 2]]}], r"batch 0: 'input_ids' has rows of unequal shapes \(\[2\], \[3\]\)"),
        ([{"input_ids": [torch.ones(3), torch.ones(2)]}], "batch 0: 'input_ids' has rows of unequal shapes"),
        ([{"input_ids": np.array([[1, 2], [1]], dtype=object)}], "batch 0: 'input_ids' has rows of unequal shapes"),
        ([{"input_ids": IDS}, {"input_ids": [[1], 2]}], "batch 1: 'input_ids'"),
        ([{"text": ["a", "b"]}], "batch 0 holds text under 'text' and no model input: tokenise it first"),
        ([{"text": "a"}], "batch 0 holds text under 'text'"),
        ([{"input_ids": IDS, "x": np.array([object()])}], "batch 0: 'x' is a list of object"),
        ([{"input_ids": []}], "batch 0: 'input_ids' is an empty list"),
        (["a text"], "batch 0 is str"),
        ([(IDS, IDS)], "batch 0 is tuple"),
        (DatasetDict({"train": Dataset.from_dict(ROWS)}), "got DatasetDict"),
        ("texts.json", "got str"),
        (7, "got int"),
    ],
)
def test_what_is_not_taken_is_named(data, message):
    with pytest.raises(CalibrationError, match=message) as caught:
        as_batches(data)
    assert "calibration_data" in str(caught.value)


def test_batches_of_padding_are_left_out_and_counted(caplog):
    data = [{"input_ids": IDS, "attention_mask": torch.full_like(IDS, value)} for value in (1, 0, 1)]
    with caplog.at_level(logging.WARNING):
        assert len(as_batches(data)) == 2
    assert "1 of 3 batches hold nothing but padding" in caplog.text
    with pytest.raises(CalibrationError, match="sees no rows of calibration_data"):
        as_batches(data[1:2])


@pytest.mark.parametrize("form", ["rows", "numpy"])
def test_every_method_takes_them(form):
    data = Dataset.from_dict({"input_ids": IDS.tolist()}) if form == "rows" else [{"input_ids": IDS.numpy()}]
    batches = as_batches(data)

    def results(given):
        small = prune_model(tiny("llama"), "wanda", 0.5, calibration_data=given)
        factors = compress(
            tiny("llama"), MixedRankConfig(keep_ratio=0.5, calibration_data=given, progress=False)
        ).factors
        side = side_tuned("llama", downsample="principal", calibration_data=given)
        buffers = [b for n, b in side.named_buffers() if "directions" in n or n.endswith(".mean")]
        return [*small.parameters(), *(layer.weight for layer in factors.values()), *buffers]

    for one, other in zip(results(data), results(batches), strict=True):
        assert torch.equal(one, other)


def test_principal_directions_name_what_is_wrong():
    with pytest.raises(CalibrationError, match=r"QSTConfig.calibration_data: batch 0: 'input_ids' has rows of unequal"):
        side_tuned("llama", downsample="principal", calibration_data=[{"input_ids": [[5, 6], [7]]}])
