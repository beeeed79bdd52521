"""Liger's fused cross entropy and ours, both in Triton's interpreter: the same numbers, and memory as it is counted."""

import importlib.util

import pytest

from benchmarks.kernels.liger import counted, counted_bytes, interpreted, liger_chunk_rows, rule_of
from benchmarks.kernels.registry import ModelShape
from hf_qst_kernels.ops import linear_cross_entropy as cross_entropy

SHAPE = (64, 16, 301)

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("liger_kernel", "triton")), reason="needs Liger and Triton"
)


@pytest.fixture(scope="module")
def rows():
    options = [{}, {"label_smoothing": 0.1, "reduction": "sum"}]
    return interpreted([{"shape": SHAPE, "options": option} for option in options])


def test_loss_and_gradient_are_those_of_liger(rows):
    assert [row["variant"].strip() for row in rows] == ["Liger", "linear_cross_entropy", "with Liger's chunks"] * 2
    for row in rows:
        scale = SHAPE[0] if row["options"] else 1
        assert row["loss_difference"] <= 1e-5 * scale and row["gradient_difference"] <= 1e-5, row


def test_memory_is_as_counted(rows):
    tokens, dim, vocab = SHAPE
    chunk = liger_chunk_rows(*SHAPE)
    assert chunk == 4  # 64 tokens over ceil(301 / 16) = 19, rounded up to a power of two
    liger, _, ours = rows[:3]
    # beside what is counted: losses, labels and masks, a few numbers a row, and a row more of logits
    slack = 32 * tokens + 4 * vocab
    for row, scaled in ((liger, False), (ours, True)):
        count = counted_bytes(tokens, dim, vocab, chunk, 4, scaled)
        assert count <= row["peak_bytes"] <= count + slack, row
        assert tokens * dim * 4 <= row["kept_bytes"] <= tokens * dim * 4 + 8


def test_counts_at_real_models_follow_both_rules():
    liger, ours = counted([ModelShape("Llama-3-8B", 4096, 14336, 128256)], 2048)
    assert liger["chunk_rows"] == 64
    assert liger["counted_bytes"] == 2 * (2048 * 4096 + 64 * 128256)
    assert ours["chunk_rows"] == rule_of(cross_entropy, 2048, 4096, 128256)
