"""What a training step keeps for its backward pass."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.architectures import side_network, side_tuned, tiny, token_batch

ROWS, LENGTH, HIDDEN, LAYERS = 2, 96, 64, 3
WIDE = ROWS * LENGTH * HIDDEN  # elements of one hidden state of the base
IDS = token_batch(ROWS, LENGTH)


def saved_tensors(model, **inputs):
    """The tensors one forward keeps, each storage once, without parameters and buffers."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept = {}

    def pack(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in own:
            kept[pointer] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.train()(**{"input_ids": IDS, "labels": IDS, **inputs}).loss
    # What backward keeps while it recomputes a part is not counted here.
    loss.backward()
    return list(kept.values())


def wide(tensors, dtype=None):
    return [t for t in tensors if t.numel() >= WIDE and (dtype is None or t.dtype == dtype)]


def size(tensors):
    return sum(t.untyped_storage().nbytes() for t in tensors)


@pytest.mark.parametrize("kind", ["adapter", "lora", "linear"])
@pytest.mark.parametrize("checkpointing", [True, "mlp", False])
def test_int8_taps_keep_no_wide_float_of_any_layer(kind, checkpointing):
    model = side_tuned("llama", downsample=kind, tap_storage="int8", side_checkpointing=checkpointing, awake=True)
    kept = saved_tensors(model)
    # One state for each block and the embedding, in 8 bits.
    assert len(wide(kept, torch.int8)) == LAYERS + 1
    # The two wide floats are the mix's base and the gradient of the loss in the stack's output.
    assert len(wide(kept, torch.float32)) <= 2


@pytest.mark.parametrize("kind", ["adapter", "linear"])
def test_full_taps_keep_one_wide_float_for_each_layer(kind):
    """A control: the counting above sees what it should."""
    model = side_tuned("llama", downsample=kind, tap_storage="full", awake=True)
    kept = saved_tensors(model)
    assert not wide(kept, torch.int8)
    assert LAYERS + 1 < len(wide(kept, torch.float32)) <= LAYERS + 3


@pytest.mark.parametrize("kind", ["maxpool", "avgpool", "principal"])
@pytest.mark.parametrize("checkpointing", [True, "mlp", False])
def test_taps_without_parameters_keep_nothing_wide(kind, checkpointing):
    model = side_tuned("llama", downsample=kind, side_checkpointing=checkpointing, readout_rank=0, awake=True)
    kept = saved_tensors(model)
    assert not wide(kept, torch.int8)
    assert len(wide(kept, torch.float32)) <= 2


def test_deeper_model_keeps_no_more_wide_floats():
    kept = [wide(saved_tensors(side_tuned(model=tiny("llama", num_hidden_layers=n))), torch.float32) for n in (2, 6)]
    assert len(kept[0]) == len(kept[1])


@pytest.mark.parametrize("checkpointing", [True, "mlp", False])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_quadratic_in_the_sequence_is_kept(checkpointing, attention):
    base = tiny("llama", _attn_implementation=attention)
    kept = saved_tensors(side_tuned(model=base, side_checkpointing=checkpointing, awake=True))
    # An eager base makes one mask, which all layers share.
    assert len([t for t in kept if t.numel() >= LENGTH**2 and LENGTH in t.shape[-1:]]) <= (attention == "eager")


def test_no_logits_are_kept():
    base = tiny("llama", vocab_size=1024)
    assert not [t for t in saved_tensors(side_tuned(model=base, awake=True)) if t.numel() >= ROWS * LENGTH * 1024]
    full = saved_tensors(side_tuned(model=tiny("llama", vocab_size=1024)), logits_to_keep=0)
    assert [t for t in full if t.numel() >= ROWS * (LENGTH - 1) * 1024]


def gradients(model):
    model.zero_grad()
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "phi"])
def test_side_checkpointing_changes_no_gradient_and_keeps_less(name):
    model = side_tuned(model=tiny(name, attn_pdrop=0.0), awake=True)
    network = side_network(model)
    results = {}
    for what in (True, "mlp", False):
        network.checkpointing = what
        results[what] = gradients(model), size(saved_tensors(model))
    for what in (True, "mlp"):
        for key, gradient in results[what][0].items():
            torch.testing.assert_close(gradient, results[False][0][key], atol=1e-6, rtol=1e-6)
    assert results[True][1] < 0.7 * results[False][1]
    assert results[True][1] < results["mlp"][1] < 0.85 * results[False][1]


def test_side_checkpointing_replays_the_same_dropout():
    model = side_tuned("llama", downsample_dropout=0.3, awake=True)
    network = side_network(model)
    results = []
    for what in (True, "mlp", False):
        network.checkpointing = what
        torch.manual_seed(2)
        results.append(gradients(model))
    for other in results[1:]:
        for key, gradient in results[0].items():
            torch.testing.assert_close(gradient, other[key], atol=1e-6, rtol=1e-6)


def test_int8_taps_give_nearly_the_gradients_of_full_ones():
    results = []
    for storage in ("int8", "full"):
        torch.manual_seed(0)
        results.append(gradients(side_tuned("llama", tap_storage=storage, awake=True)))
    for key, gradient in results[0].items():
        error = (gradient - results[1][key]).norm() / results[1][key].norm()
        # Only the downsamplers' own weights see the rounding to 1/127 of a block's largest entry.
        assert error < (0.02 if "down." in key else 1e-6), key


def test_a_fourth_of_the_memory_of_lora_at_most():
    """The figure of the method, coarse enough to hold on a toy."""
    base = tiny("llama", num_hidden_layers=6)
    lora = get_peft_model(base, LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    expected = size(saved_tensors(lora))
    side = size(saved_tensors(side_tuned(model=tiny("llama", num_hidden_layers=6))))
    assert side < expected / 4


@pytest.mark.parametrize("frozen", [False, True])
def test_recomputed_mlp_under_autocast_and_with_frozen_weights(frozen):
    model = side_tuned("llama", awake=True)
    network = side_network(model)
    if frozen:
        network.blocks[1].mlp.down_proj.weight.requires_grad_(False)
    results = []
    for what in ("mlp", False):
        network.checkpointing = what
        # Left before backward, as Trainer leaves it.
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.train()(input_ids=IDS, labels=IDS).loss
        model.zero_grad()
        loss.backward()
        results.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert results[0].keys() == results[1].keys()
    assert frozen != any("blocks.1.mlp.down_proj" in key for key in results[0])
    for key, gradient in results[0].items():
        # Recomputed in float32 instead, the MLP's gradients would be off by some 1e-3.
        assert (gradient - results[1][key]).norm() <= 1e-4 * results[1][key].norm(), key
