"""What the benchmarks count as saved for backward, against graphs small enough to count by hand."""

import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.common.measure import peak_rss, settle_rss, write_json
from hf_qst.planning.saved_bytes import SavedForBackward

ROWS, WIDTH = 8, 16
BYTES = ROWS * WIDTH * 4


class Squares(nn.Module):
    """`depth` elementwise products of a state with itself: each saves that state, once, and nothing else."""

    def __init__(self, depth: int, recompute: bool):
        super().__init__()
        self.depth, self.recompute = depth, recompute

    def block(self, x):
        for _ in range(3):
            x = x * x
        return x

    def forward(self, x):
        for _ in range(self.depth):
            x = checkpoint(self.block, x, use_reentrant=False) if self.recompute else self.block(x)
        return x


def count(model, x):
    with SavedForBackward(model) as saved:
        y = model(x + 0)  # a state that nobody but the graph holds
        forward = saved.live
        y.backward(torch.ones_like(y))
        del y
    return forward, saved.peak, saved.live


def test_each_storage_counts_once():
    # x * x saves x twice, through one storage.
    x = torch.rand(ROWS, WIDTH, requires_grad=True)
    forward, peak, after = count(Squares(depth=2, recompute=False), x)
    assert (forward, peak, after) == (6 * BYTES, 6 * BYTES, 0)


def test_recomputed_tensors_count_at_the_peak_only():
    # Kept: the input of each of the 2 blocks. While a block is recomputed: its 3 states, the first of them kept anyway.
    x = torch.rand(ROWS, WIDTH, requires_grad=True)
    forward, peak, after = count(Squares(depth=2, recompute=True), x)
    assert forward == 2 * BYTES
    assert peak == 4 * BYTES
    assert after == 0


def test_views_of_one_storage_count_as_one():
    x = torch.rand(ROWS, WIDTH, requires_grad=True)
    with SavedForBackward(nn.Module()) as saved:
        y = x.exp()  # saves its result
        z = (y.t() * y.t()).sum()  # saves views of the same result
        assert saved.live == BYTES
    del y, z
    assert saved.live == 0


def test_parameters_do_not_count():
    linear = nn.Linear(WIDTH, WIDTH, bias=False)
    x = torch.rand(ROWS, WIDTH, requires_grad=True)
    with SavedForBackward(linear) as saved:
        y = linear(x)
    assert saved.peak == BYTES  # the input, for the weight's gradient; the weight, for the input's, is a parameter
    del y


def test_gradients_are_those_without_counting():
    model, x = Squares(depth=2, recompute=True), torch.rand(ROWS, WIDTH, requires_grad=True)
    model(x).sum().backward()
    expected, x.grad = x.grad, None
    with SavedForBackward(model):
        model(x).sum().backward()
    assert torch.equal(x.grad, expected)


def test_hooks_are_gone_afterwards():
    before = torch.utils.checkpoint._recomputation_hook
    with pytest.raises(RuntimeError, match="stop"), SavedForBackward(nn.Module()):
        raise RuntimeError("stop")
    assert torch.utils.checkpoint._recomputation_hook is before
    x = torch.rand(2, requires_grad=True)
    (x * x).sum().backward()
    assert torch.equal(x.grad, 2 * x)


def test_peak_rss_sees_memory_that_is_gone_again():
    before = settle_rss()
    size = 64 * 2**20
    block = torch.ones(size // 4)
    del block
    assert peak_rss() - before > 0.9 * size


def test_json_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "result.json"
    write_json(path, {"a": 1})
    write_json(path, {"a": [2, None]})
    assert json.loads(path.read_text()) == {"a": [2, None]}
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": [2, None]}
    assert [p.name for p in path.parent.iterdir()] == ["result.json"]
