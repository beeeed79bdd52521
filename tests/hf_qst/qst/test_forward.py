"""The forward pass against a second implementation, written from the paper's equations alone."""

import math

import pytest
import torch
from torch.nn import functional as F

from hf_qst.qst.downsample import PoolDownsample
from tests.architectures import side_layers, side_network, side_tuned, tiny, token_batch, wake


def captured_states(base, ids, mask):
    """h_0 .. h_L and the final norm's output of the plain base, through hooks of this test's own."""
    states = []
    handles = [
        base.model.layers[0].register_forward_pre_hook(lambda m, args: states.append(args[0])),
        *(block.register_forward_hook(lambda m, args, out: states.append(out)) for block in base.model.layers),
    ]
    with torch.no_grad():
        last = base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    for handle in handles:
        handle.remove()
    return states, last


def rms(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rotate(x, theta):
    """RoPE at positions 0, 1, .. of x [batch, heads, seq, dim], pairing channel j with j + dim / 2."""
    dim, seq = x.shape[-1], x.shape[-2]
    out = torch.empty_like(x)
    for j in range(dim // 2):
        angle = torch.arange(seq) * theta ** (-2 * j / dim)
        a, b = x[..., j], x[..., j + dim // 2]
        out[..., j] = a * angle.cos() - b * angle.sin()
        out[..., j + dim // 2] = b * angle.cos() + a * angle.sin()
    return out


def attention(w, x, mask, heads, kv_heads, theta):
    batch, seq, _ = x.shape
    q, k, v = (F.linear(x, w[f"{n}_proj.weight"]).view(batch, seq, -1, w["head_dim"]).transpose(1, 2) for n in "qkv")
    q, k = rotate(q, theta), rotate(k, theta)
    k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(w["head_dim"])
    allowed = torch.ones(seq, seq).tril().bool() & mask.bool()[:, None, None, :]
    # A row of padding may look at nothing; whatever it computes is not compared.
    scores = scores.masked_fill(~allowed, -1e9)
    out = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, seq, -1)
    return F.linear(out, w["o_proj.weight"])


def block(weights, prefix, x, mask, spec, theta, eps):
    w = {k.removeprefix(f"{prefix}.attention."): v for k, v in weights.items()} | {"head_dim": spec.head_dim}
    x = x + attention(
        w, rms(x, weights[f"{prefix}.attention_norm.weight"], eps), mask, spec.num_heads, spec.num_kv_heads, theta
    )
    y = rms(x, weights[f"{prefix}.mlp_norm.weight"], eps)
    gate, up, down = (weights[f"{prefix}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
    return x + F.linear(F.silu(F.linear(y, gate)) * F.linear(y, up), down)


def downsample(weights, i, kind, h, width, input_norm=True):
    name = f"downsample.{i}"
    if input_norm and kind in ("linear", "lora", "adapter"):
        h = rms(h, 1, torch.finfo(h.dtype).eps)
    if kind == "linear":
        side = F.linear(h, weights[f"{name}.down.weight"])
    elif kind == "lora":
        side = F.linear(F.linear(h, weights[f"{name}.down.weight"]), weights[f"{name}.up.weight"])
    elif kind == "adapter":
        side = F.linear(F.silu(F.linear(h, weights[f"{name}.down.weight"])), weights[f"{name}.up.weight"])
    elif kind == "principal":
        side = F.linear(h - weights[f"{name}.mean"], weights[f"{name}.directions"])
    else:
        windows = h.unflatten(-1, (width, h.shape[-1] // width))
        side = windows.amax(-1) if kind == "maxpool" else windows.mean(-1)
    return F.layer_norm(side, (width,), weights[f"{name}.norm.weight"], weights[f"{name}.norm.bias"])


def every(step, count):
    return [i for i in range(count) if (count - 1 - i) % step == 0]


def reference(base, network, ids, mask, kind, mix, side_every=1, readout_every=2, input_norm=True):
    weights = {name: p.detach() for name, p in network.state_dict().items()}
    spec = network.blocks[0].attention.spec
    theta, eps = base.config.rope_parameters["rope_theta"], base.config.rms_norm_eps
    states, last = captured_states(base, ids, mask)
    side = downsample(weights, 0, kind, states[0], spec.hidden_size, input_norm)
    count = len(states) - 1
    for i, place in enumerate(every(side_every, count)):
        beta = torch.sigmoid(weights[f"gates.{i}.value"])
        u = (1 - beta) * downsample(weights, i, kind, states[place + 1], spec.hidden_size, input_norm) + beta * side
        side = block(weights, f"blocks.{i}", u, mask, spec, theta, eps)
    up = F.linear(rms(side, weights["norm.weight"], eps), weights["upsample.weight"], weights["upsample.bias"])
    if "readout.up.weight" in weights:
        normed = {i: rms(states[i + 1], 1, torch.finfo(torch.float32).eps) for i in every(readout_every, count)}
        narrow = [F.linear(h, weights[f"readout.down.{i}.weight"]) for i, h in normed.items()]
        up = up + F.linear(torch.cat(narrow, -1), weights["readout.up.weight"])
    alpha = 1 + weights["mix.alpha.value"]
    if mix == "sigmoid":
        alpha = torch.sigmoid(alpha)
    return alpha * last + (up if mix == "residual" else (1 - alpha) * up)


def randomise(network):
    """Norms, gates and mix away from their starting values, so that leaving one out shows."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif "upsample" in name or "readout.up" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("adapter", {}),
        ("adapter", {"r": 8}),  # a side head of half the base's size
        ("adapter", {"r": 2, "side_heads": "keep"}),
        ("linear", {"mix": "paper"}),
        ("lora", {"mix": "sigmoid", "mix_shape": "vector"}),
        ("maxpool", {"gate_shape": "vector"}),
        ("avgpool", {}),
        ("principal", {}),
        ("adapter", {"side_every": 2, "readout_every": 1}),
        ("linear", {"side_every": 5, "readout_every": 5, "downsample_input_norm": False}),
        ("principal", {"side_every": 3, "readout_rank": 0}),
    ],
)
def test_output_equals_the_equations(kind, settings, grad):
    base = tiny("llama", seed=2)
    ids = token_batch(2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    model = side_tuned(model=tiny("llama", seed=2), downsample=kind, **settings)
    randomise(side_network(model))
    model.eval()
    with torch.set_grad_enabled(grad):
        got = model.get_base_model().model(input_ids=ids, attention_mask=mask).last_hidden_state
    names = {"side_every": "side_every", "readout_every": "readout_every", "downsample_input_norm": "input_norm"}
    given = {names[name]: value for name, value in settings.items() if name in names}
    expected = reference(base, side_network(model), ids, mask, kind, settings.get("mix", "residual"), **given)
    kept = mask.bool()
    torch.testing.assert_close(got[kept], expected[kept], atol=1e-5, rtol=1e-5)
    assert got.requires_grad == grad


@pytest.mark.parametrize("kind", ["maxpool", "avgpool"])
def test_pools_are_over_windows_of_neighbouring_channels(kind):
    hidden = torch.randn(2, 5, 12)
    pool = PoolDownsample(3, kind, layernorm=False, dropout=0.0)
    reduce = torch.amax if kind == "maxpool" else torch.mean
    expected = torch.stack([reduce(hidden[..., 4 * j : 4 * j + 4], -1) for j in range(3)], -1)
    torch.testing.assert_close(pool.finish(pool.tap(hidden)), expected, rtol=0, atol=0)


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NEEDS_CUDA])]
EPS = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(2, 5, 192), (192,), (3, 192), (2, 0, 192), (2, 2, 3, 192)], ids=str)
@pytest.mark.parametrize("dtype", EPS, ids=str)
@pytest.mark.parametrize("kind", ["maxpool", "avgpool"])
def test_pools_keep_dtype_and_value_of_the_reduction(kind, dtype, shape, device):
    hidden = torch.randn(shape).to(dtype)
    got = PoolDownsample(12, kind, layernorm=False, dropout=0.0).tap(hidden.to(device)).cpu()
    windows = hidden.double().unflatten(-1, (12, 16))
    assert got.dtype == dtype and got.shape == (*shape[:-1], 12)
    if kind == "maxpool":
        assert torch.equal(got.double(), windows.amax(-1))
        return
    # sums of 16 in float32, rounded once to `dtype`
    bound = 16 * EPS[torch.float32] * windows.abs().mean(-1) + EPS[dtype] / 2 * windows.mean(-1).abs()
    assert ((got.double() - windows.mean(-1)).abs() <= bound).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["maxpool", "avgpool"])
def test_pools_pass_on_what_is_not_finite(kind, device):
    hidden = torch.zeros(1, 4, 12)
    hidden[0, 0, 5], hidden[0, 1, 5], hidden[0, 2, 4:8] = float("nan"), float("inf"), -float("inf")
    got = PoolDownsample(3, kind, layernorm=False, dropout=0.0).tap(hidden.to(device)).cpu()
    expected = torch.zeros(1, 4, 3)
    expected[0, :3, 1] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", EPS, ids=str)
def test_torchs_mean_pooling_rounds_as_its_mean(dtype):
    """On a GPU the mean is by the pooling kernel; here its CPU twin, beside what runs on a CPU."""
    hidden = torch.randn(7, 192).to(dtype)
    means, pooled = hidden.unflatten(-1, (12, 16)).mean(-1), F.avg_pool1d(hidden[:, None], 16)[:, 0]
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled, means, rtol=EPS[dtype], atol=16 * EPS[torch.float32])


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_side_block_reads_the_output_of_its_own_base_block(changed):
    """Changing what leaves base block k leaves the side states before k alone and changes those from k on."""
    model = side_tuned("llama", awake=True).eval()
    layer, network = side_layers(model)[0], side_network(model)
    ids = token_batch()

    def side_states():
        states = []
        handles = [b.register_forward_hook(lambda m, a, out: states.append(out)) for b in network.blocks]
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
        for handle in handles:
            handle.remove()
        return states

    before = side_states()
    recorded = network.record
    indices = []

    def corrupt(taps, index, entering, leaving, context, tapped=None):
        indices.append(index)
        recorded(taps, index, entering, leaving + torch.randn_like(leaving) if index == changed else leaving, context)

    network.record = corrupt
    after = side_states()
    assert indices == list(range(len(layer.base_layer.layers)))
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i < changed for i in range(3)]


def test_states_after_the_first_tap_are_the_bases_own():
    """The taps are of the raw block outputs: the last one comes before the final norm."""
    base = tiny("llama")
    ids = token_batch()
    states, _ = captured_states(base, ids, None)
    model = side_tuned(model=tiny("llama"), awake=True).eval()
    network = side_network(model)
    seen, recorded = [], network.record

    def record(taps, index, entering, leaving, context, tapped=None):
        seen.extend([entering, leaving] if index == 0 else [leaving])
        recorded(taps, index, entering, leaving, context)

    network.record = record
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    assert all(torch.equal(a, b) for a, b in zip(seen, states, strict=True))


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "opt", "phi", "gpt_neox", "qwen3"]
)
def test_side_network_is_causal_and_ignores_padding(name):
    model = side_tuned(name, awake=True).eval()
    ids = token_batch(1, 10)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        other = ids.clone()
        other[:, 7:] = token_batch(1, 3, seed=7)
        torch.testing.assert_close(
            model(input_ids=other, use_cache=False).logits[:, :7], whole[:, :7], atol=1e-5, rtol=1e-5
        )
        padded = torch.cat([torch.full((1, 3), 5), ids], 1)
        mask = torch.cat([torch.zeros(1, 3, dtype=torch.long), torch.ones_like(ids)], 1)
        extra = {} if name == "opt" else {"position_ids": (mask.cumsum(-1) - 1).clamp_min(0)}
        shifted = model(input_ids=padded, attention_mask=mask, use_cache=False, **extra).logits
    torch.testing.assert_close(shifted[:, 3:], whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2", "opt"])
def test_eager_and_sdpa_bases_agree(name):
    outputs = []
    for kind in ("sdpa", "eager"):
        model = side_tuned(model=tiny(name, _attn_implementation=kind))
        torch.manual_seed(0)
        network = side_network(model)
        for parameter in network.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.2)
        wake(model).eval()
        ids = token_batch()
        mask = torch.ones_like(ids)
        mask[1, :4] = 0
        with torch.no_grad():
            outputs.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-4)
