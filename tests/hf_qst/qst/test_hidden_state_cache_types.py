"""The hidden-state cache over every type of the table: the losses and gradients of a run without it, or a refusal."""

import pytest
import torch
from peft import get_peft_model

from hf_qst.base_model.decoder_stack import ARCHITECTURES
from hf_qst.errors import HiddenStateCacheError
from tests.architectures import side_config, token_batch, wake
from tests.tiny_decoders import tiny_decoder

POPULAR = [
    "llama",
    "qwen3",
    "qwen3_moe",
    "qwen3_5_text",
    "gemma2",
    "gemma3_text",
    "phi3",
    "gpt_oss",
    "gpt2",
    "opt",
    "lfm2",
]
# Language models that are only part of a model of text and images.
INSIDE = {"qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "qwen3_vl_moe_text", "emu3_text_model"}
REFUSED = dict.fromkeys(["gemma3n_text", "deepseek_v4", "hy_v4", "qwen4_exp_text"], "several residual streams")
# With a tail; seen when a block has run.
REFUSED_IN_USE = dict.fromkeys(["glm_moe_dsa", "zaya"], "hands on tensors beside its state")
REFUSED_WITH_TAIL = {
    **REFUSED,
    "gemma4_text": "keys and values of blocks below",
    "gemma4_unified_text": "keys and values",
}
NAMES = sorted(ARCHITECTURES.keys() - INSIDE)
each = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in POPULAR else pytest.mark.all_types) for n in NAMES]
)


def steps():
    """Three batches of the same four rows, of other rows and lengths each; the padding is behind."""
    ids, lengths = token_batch(4, 12), torch.tensor([12, 9, 7, 11])
    mask = (torch.arange(12) < lengths[:, None]).long()
    for rows in ([0, 1], [2, 1], [3, 2, 1, 0]):
        longest = lengths[rows].max()
        yield {
            "input_ids": (ids * mask)[rows, :longest],
            "attention_mask": mask[rows, :longest],
            "labels": ids.masked_fill(mask == 0, -100)[rows, :longest],
        }


def trained(model):
    model.train()
    network = next(m for name, m in model.named_modules() if name.endswith("qst_net.default"))
    losses = []
    for batch in steps():
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@each
@pytest.mark.parametrize("tail", [0, 1])
def test_losses_and_gradients_are_those_of_a_run_without(name, tail, tmp_path):
    def make(folder):
        torch.manual_seed(2)
        # In int8 a rounding error of the state may be a step of what is kept of it for the gradient.
        config = side_config(tail_layers=tail, hidden_state_cache=folder, tap_storage="full")
        return wake(get_peft_model(tiny_decoder(name), config))

    try:
        plain = make(None)
    except ValueError:
        pytest.skip("no tail is possible there")
    refused = REFUSED_WITH_TAIL if tail else REFUSED
    if name in refused:
        with pytest.raises(HiddenStateCacheError, match=refused[name]):
            make(tmp_path)
        return
    if tail and name in REFUSED_IN_USE:
        with pytest.raises(HiddenStateCacheError, match=REFUSED_IN_USE[name]):
            trained(make(tmp_path))
        return
    losses, gradients = trained(plain)
    for _ in range(2):  # the second finds all of it
        cached = make(tmp_path)
        found, of_cached = trained(cached)
        torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-5)
        for key, gradient in of_cached.items():
            scale = gradients[key].abs().max().item()
            torch.testing.assert_close(gradient, gradients[key], rtol=1e-3, atol=1e-3 * scale + 1e-6, msg=key)
        cache = next(m for m in cached.modules() if hasattr(m, "hidden_states")).hidden_states
        missing = cache.counts.missing
        cache.close()
    assert missing == 0


@each
def test_packed_sequences_have_the_losses_of_a_run_without(name, tmp_path):
    """Some types do not keep the sequences of a packed row apart; there the row is one example."""

    def make(folder):
        torch.manual_seed(2)
        return wake(get_peft_model(tiny_decoder(name), side_config(hidden_state_cache=folder))).train()

    first, second = token_batch(2, 12)[0], token_batch(2, 12)[1, :7]
    if name in REFUSED:
        pytest.skip("refused")
    plain, cached = make(None), make(tmp_path)
    for rows in ((first, second), (second, first), (first, second)):
        positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
        batch = {"input_ids": torch.cat(rows)[None], "position_ids": positions, "labels": torch.cat(rows)[None]}
        try:
            expected = plain(**batch, use_cache=False).loss
        except (TypeError, ValueError, IndexError, RuntimeError):
            pytest.skip("takes no such positions")
        torch.testing.assert_close(cached(**batch, use_cache=False).loss, expected, rtol=1e-5, atol=1e-5)
