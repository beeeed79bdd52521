"""Factors in NF4 and int8: what they hold, how they are saved in both forms, what trains on them, and refusals."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, BitsAndBytesConfig

from hf_qst.base_model.quantized_layers import stored_bytes
from hf_qst.errors import CheckpointError
from hf_qst.mixed_rank import LowRankLinear, MixedRankConfig, compress_model, rank_report
from hf_qst.mixed_rank.quantization import dequantize_factors, quantize_factors
from tests.architectures import NF4, digest, in_nf4, side_tuned, tiny, token_batch
from tests.reshaped_toys import IDS, PIXELS, VISION

LAYER_TYPE = {"nf4": "Linear4bit", "int8": "Linear8bitLt"}
SCHEMES = sorted(LAYER_TYPE)
# A value in NF4 is off by 9.6 % of its block's root mean square on normal weights, one in int8 by 0.5 to 0.8 %; two
# factors and the inputs, which int8 rounds as well, add up.
ERROR = {"nf4": 0.2, "int8": 0.02}


def build(name):
    if name not in VISION:
        return tiny(name)
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(VISION[name]()).eval()


def inputs(name, seed=50):
    if name in VISION:
        return {"pixel_values": PIXELS + seed}
    return {"input_ids": IDS if seed == 50 else token_batch(4, 12, seed=seed)}


def config(name="llama", **changes):
    data = [inputs(name, seed) for seed in range(3)]
    return MixedRankConfig(**{"keep_ratio": 0.5, "calibration_data": data, "progress": False, **changes})


def logits(model, name="llama"):
    with torch.no_grad():
        return model.eval()(**inputs(name)).logits


def factors(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def layer(scheme=None, sizes=(100, 13, 72), bias=True):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    made = LowRankLinear.from_factors(draw(sizes[0], sizes[1]), draw(*sizes[1:]), draw(sizes[2]) if bias else None)
    return made if scheme is None else quantize_factors(made, scheme)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("sizes", [(100, 13, 72), (64, 1, 30), (128, 64, 96)])
@pytest.mark.parametrize("shape", [(15,), (3, 5), (2, 3, 5)])
def test_quantised_layer_computes_nearly_the_same(scheme, sizes, shape):
    inputs = torch.randn(*shape, sizes[0], generator=torch.Generator().manual_seed(1), requires_grad=True)
    exact, quantised = layer(sizes=sizes), layer(scheme, sizes)
    assert type(quantised.down).__name__ == LAYER_TYPE[scheme]
    for training in (False, True):
        expected, found = exact(inputs), quantised.train(training)(inputs)
        assert found.shape == expected.shape and 0 < (found - expected).norm() < ERROR[scheme] * expected.norm()
        wanted, got = (torch.autograd.grad(y.square().sum(), inputs)[0] for y in (expected, found))
        assert (got - wanted).norm() < 2 * ERROR[scheme] * wanted.norm()


def test_a_single_vector_is_an_input_too():
    rows = torch.randn(3, 100, generator=torch.Generator().manual_seed(1))
    for scheme in SCHEMES:
        torch.testing.assert_close(layer(scheme)(rows[0]), layer(scheme)(rows)[0], atol=1e-4, rtol=1e-4)


def test_one_column_stays_in_floating_point_where_int8_would_only_cost():
    """The product over one column is also wrong in torch on a CPU, at 2.13."""
    made = layer("int8", sizes=(64, 1, 30))
    assert type(made.up) is nn.Linear and type(made.down).__name__ == LAYER_TYPE["int8"]
    assert stored_bytes(made) == 64 + 4 + 4 * 60


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("ran", [False, True])
def test_weight_and_dequantised_layer_are_what_it_computes(scheme, ran):
    quantised = layer(scheme, bias=False)
    rows = torch.eye(100)
    if ran:  # bitsandbytes moves scales at the first forward
        quantised(rows)
    torch.testing.assert_close(quantised.weight, quantised.to_dense().weight)
    dense = dequantize_factors(copy.deepcopy(quantised))
    assert type(dense.down) is type(dense.up) is nn.Linear and dense.down.weight.dtype == torch.float32
    torch.testing.assert_close(dense.weight, quantised.weight)
    expected = dense(rows)
    # int8 rounds the inputs of each product as well, to 127 steps of their largest value.
    bound = 1e-5 if scheme == "nf4" else 0.01
    assert (quantised.eval()(rows) - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict_brings_a_layer_back_exactly(scheme):
    saved, other = layer(scheme), layer(scheme)
    with torch.no_grad():
        other = quantize_factors(
            LowRankLinear.from_factors(torch.ones(100, 13), torch.ones(13, 72), torch.ones(72)), scheme
        )
    rows = torch.randn(4, 100)
    expected = saved(rows)
    for _ in range(2):  # into a layer that has run, too
        result = other.load_state_dict(saved.state_dict())
        assert not result.missing_keys and not result.unexpected_keys
        assert torch.equal(other(rows), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_bytes_are_those_of_all_tensors(scheme):
    model = compress_model(tiny("llama"), config(quantize_factors=scheme))
    rows = {row["name"]: row for row in rank_report(model)}
    plain = {row["name"]: row for row in rank_report(compress_model(tiny("llama"), config(rank_pattern=ranks(model))))}
    for name, module in factors(model).items():
        tensors = [t for key, t in module.state_dict().items() if not key.endswith("weight_format")]
        assert rows[name]["bytes"] == sum(t.numel() * t.element_size() for t in tensors)
        assert rows[name]["parameters"] == plain[name]["parameters"] == module.rank * (sum(rows[name]["shape"]))
    ours, floats = (sum(row["bytes"] for row in one.values() if row["rank"]) for one in (rows, plain))
    # Tiny tensors: NF4's tables of 1.3 KB a tensor weigh more than its values.
    assert ours < (0.3 if scheme == "int8" else 0.7) * floats


def ranks(model):
    return {name: module.rank for name, module in factors(model).items()}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "vit", "swin"])
def test_both_saved_forms_give_the_same_logits(name, scheme, tmp_path):
    model = get_peft_model(build(name), config(name, quantize_factors=scheme))
    expected = logits(model, name)
    model.save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    quantised = {torch.int8 if scheme == "int8" else torch.uint8}
    assert {t.dtype for key, t in tensors.items() if key.endswith("down.weight")} == quantised
    loaded = PeftModel.from_pretrained(build(name), tmp_path / "adapter")
    assert torch.equal(logits(loaded, name), expected)
    loaded.load_adapter(tmp_path / "adapter", "default")  # as Trainer does when it resumes
    assert torch.equal(logits(loaded, name), expected)

    small = model.merge_and_unload()
    assert torch.equal(logits(small, name), expected)
    small.save_pretrained(tmp_path / "folder")
    auto = AutoModelForImageClassification if name in VISION else AutoModelForCausalLM
    again = auto.from_pretrained(tmp_path / "folder", device_map={"": "cpu"})
    assert [type(m) for m in again.modules()] == [type(m) for m in small.modules()]
    torch.testing.assert_close(logits(again, name), expected, atol=2e-2, rtol=2e-2)
    saved = json.loads((tmp_path / "folder" / "config.json").read_text())["quantization_config"]
    assert saved["load_in_4bit"] == (scheme == "nf4") and saved["load_in_8bit"] == (scheme == "int8")


def test_configuration_the_model_was_made_from_stays_as_it_was():
    model = tiny("llama")
    mine = model.config
    small = compress_model(model, config(quantize_factors="nf4"))
    assert not hasattr(mine, "quantization_config") and small.config.quantization_config.load_in_4bit


@pytest.mark.parametrize("scheme", SCHEMES)
def test_to_dense_is_a_plain_model_in_floating_point(scheme):
    base = tiny("opt")
    model = get_peft_model(tiny("opt"), config(quantize_factors=scheme))
    expected = logits(model)
    dense = model.to_dense()
    assert type(dense) is type(base) and getattr(dense, "hf_quantizer", None) is None
    assert {k: v.shape for k, v in dense.state_dict().items()} == {k: v.shape for k, v in base.state_dict().items()}
    assert (logits(dense) - expected).norm() < ERROR["int8"] * expected.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lora_trains_on_quantised_factors_and_they_stay(scheme):
    small = compress_model(tiny("llama"), config(quantize_factors=scheme))
    tuned = get_peft_model(small, LoraConfig(target_modules=["down", "up"])).train()
    before = digest(tuned, skip="lora_")
    optimizer = torch.optim.Adam((p for p in tuned.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert digest(tuned, skip="lora_") == before
    assert sum("lora_A" in n for n, _ in tuned.named_parameters()) == 2 * len(factors(tuned))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_side_tuning_trains_beside_quantised_factors(scheme):
    tuned = side_tuned(model=compress_model(tiny("llama"), config(quantize_factors=scheme)), awake=True).train()
    tuned(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for n, p in tuned.named_parameters() if "qst_net" in n and p.requires_grad]
    assert gradients and all(g is not None and torch.isfinite(g).all() for g in gradients)


def test_only_the_biases_train():
    model = get_peft_model(tiny("opt"), config(quantize_factors="nf4"))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained and all(n.endswith("up.bias") for n in trained)
    model.set_adapter("default", inference_mode=True)
    assert not any(p.requires_grad for p in model.parameters())
    model.base_model.set_requires_grad("default")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_later_layers_make_up_for_the_rounding():
    """The closed form is given what the quantised layers before it produce."""
    dense = logits(tiny("llama"))
    distance = lambda model: (logits(model) - dense).norm().item()
    after = compress_model(tiny("llama"), config(keep_ratio=0.9))
    for module in factors(after).values():
        quantize_factors(module, "nf4")
    assert distance(compress_model(tiny("llama"), config(keep_ratio=0.9, quantize_factors="nf4"))) < distance(after)


def test_a_base_in_nf4_gets_factors_in_nf4_or_in_floating_point(tmp_path):
    for scheme in ("nf4", None):
        base = in_nf4(tmp_path / "base")
        skipped = base.config.quantization_config.llm_int8_skip_modules
        small = compress_model(base, config(quantize_factors=scheme, rank_pattern={"mlp.up_proj": 0}))
        assert type(small.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
        small.save_pretrained(tmp_path / "small")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "small", device_map={"": "cpu"})
        assert {type(m.down).__name__ for m in factors(again).values()} == {
            "Linear" if scheme is None else "Linear4bit"
        }
        # The dense layers that stayed in 4 bits run in bitsandbytes' packed kernel, in bfloat16, on some processors.
        torch.testing.assert_close(logits(again), logits(small), atol=0.05, rtol=0.05)
        assert base.config.quantization_config.llm_int8_skip_modules != skipped


def test_residuals_can_be_quantised(tmp_path):
    dense, base = tiny("llama"), tiny("llama")
    with torch.no_grad():
        for name, module in base.named_modules():
            if ".layers." in name and isinstance(module, nn.Linear):
                module.weight.mul_(module.weight.abs() > 0.03)
    settings = config(residual={"rank": 8, "reference_model": dense}, quantize_factors="int8")
    before = (logits(base) - logits(dense)).norm()
    model = get_peft_model(copy.deepcopy(base), settings)
    assert (logits(model) - logits(dense)).norm() < before
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)), logits(model))


@pytest.mark.parametrize(
    "scheme, loading", [("int8", NF4), ("nf4", {"load_in_8bit": True}), ("nf4", {**NF4, "bnb_4bit_quant_type": "fp4"})]
)
def test_two_quantisations_in_one_model_are_refused(scheme, loading, tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**loading), device_map={"": "cpu"}
    )
    before = str(base)
    with pytest.raises(ValueError, match=rf"quantize_factors.*{scheme}"):
        compress_model(base, config(quantize_factors=scheme))
    assert str(base) == before


def test_missing_library_is_named_before_any_work(monkeypatch):
    monkeypatch.setattr("hf_qst.extras.find_spec", lambda name: None)
    data = iter([{"input_ids": IDS}])
    with pytest.raises(ImportError, match=r"quantize_factors='nf4' needs bitsandbytes: pip install"):
        compress_model(tiny("llama"), config(quantize_factors="nf4", calibration_data=data))
    assert next(data)  # nothing was read


@pytest.mark.parametrize("scheme", SCHEMES)
def test_factors_that_were_never_loaded_show(scheme, tmp_path):
    get_peft_model(tiny("llama"), config(quantize_factors=scheme)).save_pretrained(tmp_path)
    assert logits(get_peft_model(tiny("llama"), PeftConfig.from_pretrained(tmp_path))).isnan().all()


def test_transformers_own_loader_says_what_to_use(tmp_path):
    get_peft_model(tiny("llama"), config(quantize_factors="nf4")).save_pretrained(tmp_path)
    model = tiny("llama")
    before = str(model)
    with pytest.raises(NotImplementedError, match=r"does not read factors in nf4; use PeftModel\.from_pretrained"):
        model.load_adapter(tmp_path)
    assert str(model) == before


def test_factors_out_of_the_range_of_int8_scales_are_refused():
    made = layer()
    with torch.no_grad():
        made.down.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="above 65504"):
        quantize_factors(made, "int8")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("damage", ["rank", "scale", "missing"])
def test_damaged_adapters_are_named(scheme, damage, tmp_path):
    from tests.hf_qst.mixed_rank.test_peft import NAME, edited

    get_peft_model(tiny("llama"), config(quantize_factors=scheme, allocation={"allow_dense": False})).save_pretrained(
        tmp_path
    )
    scale = f"base_model.model.{NAME}.mixed_rank_factors.down." + (
        "SCB" if scheme == "int8" else "weight.nested_absmax"
    )
    change = {
        "rank": (lambda c: c["rank_pattern"].update({NAME: 3}), None, f"factors of '{NAME}' have rank .* says 3"),
        "scale": (None, lambda t: t[scale].view(-1)[:1].add_(1.0), "checksum"),
        "missing": (None, lambda t: t.pop(scale), "is missing"),
    }[damage]
    edited(tmp_path, *change[:2])
    with pytest.raises(CheckpointError, match=change[2]):
        PeftModel.from_pretrained(tiny("llama"), tmp_path)


@pytest.mark.parametrize(
    "scheme, narrowest, expected",
    [("nf4", 1024, 64), ("nf4", 512, 8), ("nf4", 64, 1), ("int8", 1024, 8), (None, 1024, 8)],
)
def test_ranks_suit_the_kernels(scheme, narrowest, expected):
    found = MixedRankConfig(quantize_factors=scheme).resolved(True, narrowest)
    assert found.allocation.rank_multiple == expected
    given = MixedRankConfig(quantize_factors=scheme, allocation={"rank_multiple": 4})
    assert given.resolved(True, narrowest).allocation.rank_multiple == 4
