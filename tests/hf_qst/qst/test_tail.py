"""The tail of QST: LoRA in the last blocks, against PEFT's own LoRA there, and nothing differentiated below it."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hf_qst import QSTConfig
from hf_qst.planning import SavedForBackward
from hf_qst.qst.tail import SCALE
from tests.architectures import CONFIGS, NF4, in_nf4, tiny, token_batch

IDS = token_batch(rows=2, length=12)


def with_tail(base, layers: int = 2, **changes):
    torch.manual_seed(0)
    return get_peft_model(base, QSTConfig(task_type="CAUSAL_LM", r=4, tail_layers=layers, tail_rank=4, **changes))


def tail_of(model):
    return next(net for name, net in model.named_modules() if name.endswith("qst_net.default")).tail


def path_of(key: str) -> str:
    """The name of the linear layer of a tiny Llama whose update is called `key`."""
    index, _, path = key.partition("_")
    module = "self_attn" if path.startswith("self_attn") else "mlp"
    return f"model.layers.{index}.{module}.{path.removeprefix(module + '_')}"


@pytest.mark.parametrize("layers", [1, 3])
def test_the_tail_has_the_loss_and_the_gradients_of_lora_in_these_blocks(layers):
    base = tiny("llama", num_hidden_layers=4)
    # At the start the side network adds nothing to the output, so the model is the base with the tail.
    model = with_tail(copy.deepcopy(base), layers).train()
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=4,
        lora_alpha=4 * SCALE,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        layers_to_transform=list(range(4 - layers, 4)),
        layers_pattern="layers",
    )
    lora = get_peft_model(base, config).train()
    pairs = []
    for key, update in tail_of(model).updates.items():
        reference = lora.base_model.model.get_submodule(path_of(key))
        torch.nn.init.normal_(update.up.weight, std=0.1)
        for ours, theirs in ((update.down, reference.lora_A), (update.up, reference.lora_B)):
            theirs["default"].weight.data.copy_(ours.weight)
            pairs.append((ours.weight, theirs["default"].weight))
    assert len(pairs) == 2 * 7 * layers == len([p for p in lora.parameters() if p.requires_grad])

    losses = [m(input_ids=IDS, labels=IDS).loss for m in (model, lora)]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.backward()
    for ours, theirs in pairs:
        assert theirs.grad.abs().max() > 0
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("mix", ["residual", "paper"])
def test_the_gradient_of_the_tail_is_that_of_the_loss(mix):
    model = with_tail(tiny("llama", num_hidden_layers=3), 1, mix=mix, init_weights=False, chunked_loss=False)
    model = model.double().train()
    weight = next(iter(tail_of(model).updates.values())).up.weight

    def loss():
        return model(input_ids=IDS, labels=IDS).loss

    loss().backward()
    direction = weight.grad / weight.grad.norm()
    step = 1e-2
    with torch.no_grad():
        weight += step * direction
        above = loss()
        weight -= 2 * step * direction
        slope = (above - loss()) / (2 * step)
    # The output of the stack is mixed in float32.
    torch.testing.assert_close(slope.float(), weight.grad.norm().float(), rtol=2e-3, atol=0)


def test_nothing_below_the_tail_is_differentiated():
    model = with_tail(tiny("llama", num_hidden_layers=4), 2).train()
    # As prepare_model_for_kbit_training does; it would reach through the whole base.
    model.enable_input_require_grads()
    seen = {}
    blocks = model.base_model.model.model.base_layer.layers
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda _, __, out, i=i: seen.update({i: out.requires_grad}))
    loss = model(input_ids=IDS, labels=IDS).loss
    assert seen == {0: False, 1: False, 2: True, 3: True}
    assert torch.is_grad_enabled()
    loss.backward()
    with torch.no_grad():
        model(input_ids=IDS)
    assert not any(seen.values())


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_architecture_trains_its_tail(architecture):
    base = tiny(architecture)
    with torch.no_grad():
        expected = base(input_ids=IDS).logits
    model = with_tail(base, 1, side_every=1).train()
    with torch.no_grad():
        assert torch.equal(model.eval()(input_ids=IDS).logits, expected)
    parameters = {name: p for name, p in model.named_parameters() if ".tail." in name}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=1.0)
    model.train()
    for _ in range(2):  # the first step moves the second factors alone
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert len(before) > 0
    assert [name for name, p in parameters.items() if torch.equal(p, before[name])] == []


def test_a_4_bit_tail_learns_on_after_an_evaluation(tmp_path):
    model = with_tail(in_nf4(tmp_path / "base"), 1)
    with torch.no_grad():
        model.eval()(input_ids=IDS)  # some processors pack 4-bit weights here, for a kernel without backward
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [update.up.weight.grad for update in tail_of(model).updates.values()]
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_the_side_network_and_the_readout_read_below_the_tail():
    model = with_tail(tiny("llama", num_hidden_layers=6), 3, side_every=2, readout_every=1)
    network = model.base_model.model.model.qst_net["default"]
    assert network.places == [0, 2]
    assert list(network.readout.down) == ["0", "1", "2"]


def test_adapters_with_tails_of_other_lengths_share_a_base():
    base = tiny("llama", num_hidden_layers=4)
    alone = {}
    for name, layers in (("short", 1), ("long", 3), ("none", 0)):
        model = with_tail(copy.deepcopy(base), layers, init_weights=False)
        alone[name] = model(input_ids=IDS).logits
        weights = {k: v.clone() for k, v in model.state_dict().items() if "qst_net" in k}
        alone[name] = alone[name], layers, weights
    together = with_tail(base, 1, init_weights=False)
    for name, (_, layers, _) in alone.items():
        config = QSTConfig(task_type="CAUSAL_LM", r=4, tail_layers=layers, tail_rank=4)
        together.add_adapter(name, config)
    for name, (_, _, weights) in alone.items():
        own = {k.replace("qst_net.default.", f"qst_net.{name}."): v for k, v in weights.items()}
        assert together.load_state_dict(own, strict=False).unexpected_keys == []
    for name, (expected, _, _) in alone.items():
        together.set_adapter(name)
        assert torch.equal(together(input_ids=IDS).logits, expected)
    with together.disable_adapter(), torch.no_grad():
        assert torch.equal(together(input_ids=IDS).logits, tiny("llama", num_hidden_layers=4)(input_ids=IDS).logits)
    assert together.unload() is base
    hooked = [m for m in base.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooked == []


def test_too_long_a_tail_is_refused_before_anything_changes():
    base = tiny("llama", num_hidden_layers=2)
    before = str(base)
    with pytest.raises(ValueError, match=r"tail_layers must be less than the number of blocks of the base, 2, got 2"):
        with_tail(base, 2)
    assert str(base) == before
    with pytest.raises(ValueError, match=r"QSTConfig.tail_layers must be an integer >= 0, got -1"):
        QSTConfig(tail_layers=-1)
    with pytest.raises(ValueError, match=r"QSTConfig.tail_rank must be an integer >= 1, got 0"):
        QSTConfig(tail_rank=0)


def kept_and_gradients(model, checkpointed: bool, reentrant: bool = False):
    """Of one step: the loss, the bytes kept for the backward pass, the gradients by name."""
    if checkpointed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.zero_grad()
    torch.manual_seed(1)  # attention dropout of the side blocks
    ids = token_batch(rows=2, length=48)
    with SavedForBackward(model) as saved:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    return loss, saved.peak, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_checkpointed_tail_keeps_less_and_has_the_same_gradients(architecture):
    model = with_tail(tiny(architecture), 1, side_every=1, init_weights=False).train()
    loss, kept, expected = kept_and_gradients(model, False)
    again, less, gradients = kept_and_gradients(model, True)
    assert torch.equal(loss, again) and less < kept
    assert gradients.keys() == expected.keys()
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())


@pytest.mark.parametrize("four_bits", [False, True])
def test_a_checkpointed_tail_keeps_one_block_in_place_of_all(four_bits, tmp_path):
    base = tiny("llama", num_hidden_layers=8)
    if four_bits:
        base.save_pretrained(tmp_path)
        base = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(**NF4))
    model = with_tail(base, 6, init_weights=False, side_every=1).train()
    loss, kept, expected = kept_and_gradients(model, False)
    again, less, gradients = kept_and_gradients(model, True, reentrant=True)  # the tail is not, whatever is asked for
    assert torch.equal(loss, again) and less < 0.5 * kept
    assert all(torch.equal(gradient, expected[name]) for name, gradient in gradients.items())


def test_a_checkpointed_tail_with_a_cache_of_keys_and_values_is_run_once():
    model = with_tail(tiny("llama"), 1, init_weights=False, side_every=1).train()
    model.gradient_checkpointing_enable()
    output = model(input_ids=IDS, labels=IDS, use_cache=True)
    output.loss.backward()
    assert output.past_key_values.get_seq_length() == IDS.shape[1]


def test_the_blocks_have_their_own_forward_back_when_the_adapter_goes(tmp_path):
    model = with_tail(tiny("llama"), 1, side_every=1, hidden_state_cache=str(tmp_path)).train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    blocks = model.base_model.model.model.base_layer.layers
    assert all("forward" in block.__dict__ for block in blocks)
    model.unload()
    assert not any("forward" in block.__dict__ for block in blocks)
