"""What one training step differentiates: all of the side network, nothing of the base."""

import pytest
import torch

from hf_qst.qst.side_network import OutputMix
from tests.architectures import CONFIGS, digest, in_nf4, side_layers, side_network, side_tuned, tiny, token_batch, wake

NAMES = sorted(CONFIGS)
IDS = token_batch()


def step(model, optimizer=None, ids=IDS):
    loss = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return loss


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def adam(model, lr=1e-2):
    return torch.optim.AdamW(trainable(model).values(), lr=lr)


@pytest.mark.parametrize("name", NAMES)
def test_no_state_of_the_base_has_a_graph(name):
    model = side_tuned(name, awake=True)
    layer = side_layers(model)[0]
    seen = []

    def look(module, args, output):
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, torch.Tensor):
                seen.append(tensor.requires_grad or tensor.grad_fn is not None)

    for module in layer.base_layer.modules():
        if module is not layer.base_layer:
            module.register_forward_hook(look)
    step(model)
    assert len(seen) > 10
    assert not any(seen)


@pytest.mark.parametrize("name", NAMES)
def test_base_is_unchanged_and_without_gradients_after_steps(name):
    model = side_tuned(name)
    before = digest(model.get_base_model())
    optimizer = adam(model)
    for _ in range(3):
        step(model, optimizer)
    step(model)
    assert digest(model.get_base_model()) == before
    assert all(p.grad is None for n, p in model.named_parameters() if "qst_net" not in n)


def test_nf4_base_is_unchanged_after_steps(tmp_path):
    base = in_nf4(tmp_path)
    with torch.no_grad():
        base(IDS)
    before = digest(base)
    model = side_tuned(model=base)
    optimizer = adam(model)
    for _ in range(3):
        step(model, optimizer)
        model.state_dict()
    assert digest(model.get_base_model()) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["adapter", "avgpool"])
def test_every_side_parameter_has_a_gradient_from_the_second_step(name, kind):
    model = side_tuned(name, downsample=kind)
    step(model, adam(model))
    step(model)
    silent = [n for n, p in trainable(model).items() if p.grad is None or not p.grad.abs().sum() > 0]
    # A key bias shifts every score of a query alike, which a softmax ignores.
    assert not [n for n in silent if not n.endswith("k_proj.bias")]


def test_first_step_of_the_default_mix_moves_upsampler_and_alpha():
    model = side_tuned("llama")
    step(model)
    moved = {n.split("default.")[1] for n, p in trainable(model).items() if p.grad is not None and p.grad.any()}
    assert moved == {"upsample.weight", "upsample.bias", "readout.up.weight", "mix.alpha.value"}


def test_first_step_of_the_papers_mix_moves_alpha_only():
    model = side_tuned("llama", mix="paper", readout_rank=0)
    step(model)
    moved = {n.split("default.")[1] for n, p in trainable(model).items() if p.grad is not None and p.grad.any()}
    assert moved == {"mix.alpha.value"}
    optimizer = adam(model)
    optimizer.step()
    optimizer.zero_grad()
    step(model)
    assert all(p.grad is not None and p.grad.any() for p in trainable(model).values())


@pytest.mark.parametrize("mix", ["residual", "paper", "sigmoid"])
@pytest.mark.parametrize("shape", ["scalar", "vector"])
@pytest.mark.parametrize("lr_scale", [1.0, 10.0])
def test_gradients_of_the_mix_equal_autograds(mix, shape, lr_scale):
    module = OutputMix(mix, 1 if shape == "scalar" else 8, lr_scale)
    base, side = torch.randn(2, 3, 8), torch.randn(2, 3, 8, requires_grad=True)
    value = module.alpha.value
    with torch.no_grad():
        value.add_(torch.randn_like(value) * 0.3)
    alpha = 1 + lr_scale * value
    if mix == "sigmoid":
        alpha = alpha.sigmoid()
    expected = alpha * base + (side if mix == "residual" else (1 - alpha) * side)
    got = module(base, side)
    torch.testing.assert_close(got, expected)
    direction = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad(got, [side, value], direction),
        torch.autograd.grad(expected, [side, value], direction),
    )


def test_mix_learning_rate_scale_multiplies_adams_step():
    moved = []
    for scale in (1.0, 10.0):
        torch.manual_seed(0)
        model = side_tuned("llama", mix_lr_scale=scale)
        step(model, adam(model, lr=1e-3))
        moved.append(scale * side_network(model).mix.alpha.value.item())
    assert moved[1] == pytest.approx(10 * moved[0], rel=1e-3)


def test_head_is_crossed_but_not_trained():
    model = side_tuned("llama")
    logits = model.train()(input_ids=IDS, labels=IDS, logits_to_keep=0).logits
    assert logits.requires_grad
    logits.sum().backward()
    assert model.get_output_embeddings().weight.grad is None


def test_classifier_head_is_trained():
    model = side_tuned(task_type="SEQ_CLS", model=tiny("llama", classifier=True, num_labels=2))
    model.train()(input_ids=IDS, labels=torch.tensor([0, 1])).loss.backward()
    score = model.get_base_model().score.modules_to_save["default"]
    assert score.weight.grad.abs().sum() > 0
    assert side_network(model).upsample.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_gates_stay_in_float32_when_the_model_is_cast(cast):
    model = side_tuned("llama")
    network = side_network(model)
    with torch.no_grad():
        for small in (*network.gates, network.mix.alpha):
            small.value.fill_(0.123456)
    getattr(model, cast)()
    small = [*(gate.value for gate in network.gates), network.mix.alpha.value]
    assert {p.dtype for p in small} == {torch.float32}
    # Exactly, and not by way of 16 bits.
    assert all(p.item() == pytest.approx(0.123456, abs=1e-8) for p in small)
    step(model)
    model.to(torch.float64).to(torch.bfloat16)
    assert {p.grad.dtype for p in small} == {torch.float32}
    assert network.upsample.weight.dtype == torch.bfloat16


def test_gates_cast_by_data_are_float32_again_in_training():
    model = side_tuned("llama")
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model.train()
    network = side_network(model)
    assert {gate.value.dtype for gate in network.gates} == {torch.float32}
    assert network.mix.alpha.value.dtype == torch.float32


@pytest.mark.parametrize("side_dtype", [torch.float32, torch.bfloat16])
def test_gates_move_at_a_small_learning_rate_on_a_bfloat16_base(side_dtype):
    model = wake(side_tuned(model=tiny("llama", dtype=torch.bfloat16)))
    side_network(model).to(side_dtype)
    network = side_network(model)
    before = [gate.value.item() for gate in network.gates] + [network.mix.alpha.value.item()]
    optimizer = adam(model, lr=2e-4)
    for _ in range(5):
        step(model, optimizer)
    after = [gate.value.item() for gate in network.gates] + [network.mix.alpha.value.item()]
    assert all(abs(a - b) > 1e-4 for a, b in zip(after, before, strict=True))
    assert network.upsample.weight.dtype == side_dtype


def test_peft_keeps_the_side_network_in_float32_on_a_bfloat16_base():
    model = side_tuned(model=tiny("llama", dtype=torch.bfloat16))
    assert {p.dtype for p in side_network(model).parameters()} == {torch.float32}
    step(model)


def test_autocast_training_step_is_near_float32():
    torch.manual_seed(0)
    model = side_tuned("llama", awake=True)
    plain = step(model)
    grads = {n: p.grad.clone() for n, p in trainable(model).items()}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.train()(input_ids=IDS, labels=IDS).loss
    mixed.backward()
    torch.testing.assert_close(mixed, plain, atol=0.05, rtol=0.02)
    for name, p in trainable(model).items():
        assert p.grad.dtype == torch.float32
        error = (p.grad - grads[name]).norm() / (grads[name].norm() + 1e-6)
        assert error < 0.3, name


def test_dropout_of_the_downsampler_acts_in_training_only():
    model = side_tuned("llama", downsample_dropout=0.5, awake=True)
    model.train()
    first, second = (model(input_ids=IDS, labels=IDS).loss for _ in range(2))
    assert not torch.equal(first, second)
    model.eval()
    with torch.no_grad():
        first, second = (model(input_ids=IDS, labels=IDS).loss for _ in range(2))
    assert torch.equal(first, second)
