"""The hypernetwork: sizes of the paper, a fixed input, a reproducible start."""

import pytest
import torch

from hf_qst import DISPConfig
from hf_qst.disp.hypernetwork import HyperNetwork, make_hypernetwork
from hf_qst.disp.selection import SelectionNetwork
from hf_qst.pruning.layout import PruningLayout

LLAMA_7B = PruningLayout.uniform(32, 4096, 11008, 4096, 4096, 2)
QWEN3_06B = PruningLayout.uniform(28, 1024, 3072, 2048, 1024, 2)
OPT_125M = PruningLayout.uniform(12, 768, 3072, 768, 768, 1)


@pytest.mark.parametrize(
    ("layout", "expected"), [(LLAMA_7B, 112_235_520), (QWEN3_06B, 25_728_000), (OPT_125M, 9_475_072)]
)
def test_trainable_parameters_are_the_papers(layout, expected):
    with torch.device("meta"):
        sizes = [size for row in layout.full_widths for size in row]
        network = HyperNetwork(sizes, input_size=32, hidden_size=64)
    assert sum(p.numel() for p in network.parameters()) == expected


def test_llama_7b_has_the_papers_prunable_parameters():
    assert LLAMA_7B.total == 6_476_005_376


def test_start_depends_on_the_seed_alone():
    layout = PruningLayout.uniform(2, 16, 24, 16, 8, 2)

    def start(seed, before):
        torch.manual_seed(before)
        state = torch.get_rng_state()
        network = SelectionNetwork(DISPConfig(seed=seed), layout, layout.total // 2)
        assert torch.equal(torch.get_rng_state(), state)
        return torch.cat(network.logits())

    assert torch.equal(start(3, 1), start(3, 2))
    assert not torch.equal(start(3, 1), start(4, 1))


def test_input_is_a_buffer():
    network = HyperNetwork([4, 5], 32, 64)
    assert "embeddings" in dict(network.named_buffers())
    assert "embeddings" not in dict(network.named_parameters())


@pytest.mark.parametrize("kind", ["gru", "linear", "none"])
def test_kinds_give_logits_of_every_size_with_gradients(kind):
    network = make_hypernetwork(kind, [4, 7, 5], 8, 6)
    logits = network()
    assert [len(z) for z in logits] == [4, 7, 5]
    sum(z.square().sum() + z.sum() for z in logits).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_gru_lets_every_selection_see_the_others_and_linear_does_not():
    for kind, connected in (("gru", True), ("linear", False)):
        torch.manual_seed(0)
        network = make_hypernetwork(kind, [4] * 6, 8, 6)
        before = network()[0].detach()
        network.embeddings[5] += 1.0
        assert torch.equal(network()[0].detach(), before) is not connected
