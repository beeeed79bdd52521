"""Experts of a mixture: each has factors of its own, made from the tokens that were routed to it."""

import numpy as np
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Llama4TextConfig

from hf_qst import quantize_experts, to_dense
from hf_qst.base_model import encoder_blocks
from hf_qst.base_model.experts import SplitExperts, fused_experts, split
from hf_qst.base_model.packed_weights import forbid_packing
from hf_qst.errors import BudgetError
from hf_qst.mixed_rank import LowRankLinear, MixedRankConfig, compress, compress_model
from hf_qst.mixed_rank.calibration_set import CalibrationSet
from tests.architectures import token_batch
from tests.mixtures import CONFIGS, tiny_mixture

EXPERTS = r".*experts\.\d+\.(gate_up|down)"


def data(count=6, rows=4, length=24):
    return [{"input_ids": token_batch(rows, length, seed=seed)} for seed in range(count)]


def settings(**changes):
    return MixedRankConfig(**{"keep_ratio": 0.6, "calibration_data": data(), "progress": False, **changes})


def logits(model):
    with torch.no_grad():
        return model.eval()(token_batch(3, 17, seed=77)).logits


def routed(model, path, batches):
    """Tokens [n, d] of a layer, and the experts [n, k] that each goes to: what transformers' own module is called with."""
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    hidden, index = zip(*seen, strict=True)
    return torch.cat(hidden).double().numpy(), torch.cat(index).numpy()


def shrunk(own, pool):
    """The documented equation, row by row."""
    count, moment = len(own), own.T @ own / max(len(own), 1)
    target = pool.T @ pool / len(pool)
    if count <= 1:
        return target
    spread = sum(np.square(np.outer(row, row) - moment).sum() for row in own) / (count * (count - 1))
    part = min(1.0, spread / np.square(moment - target).sum())
    return (1 - part) * moment + part * target


def whitened(weight, moment, rank):
    """Best rank-r weight for inputs of this second moment, by the Cholesky factor and a plain SVD."""
    lower = np.linalg.cholesky(moment)
    left, values, right = np.linalg.svd(lower.T @ weight, full_matrices=False)
    return np.linalg.solve(lower.T, (left[:, :rank] * values[:rank]) @ right[:rank])


def product(layer):
    return (layer.down.weight.T @ layer.up.weight.T).detach().double().numpy()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_each_expert_is_the_whitened_svd_of_its_own_tokens(name):
    dense = tiny_mixture(name)
    path, fused = next(iter(fused_experts(dense).items()))
    hidden, index = routed(dense, path, data())
    ranks = {"gate_up": 9, "down": 7}
    config = settings(
        target_modules=EXPERTS,
        rank_pattern=ranks,
        compensation="none",
        decomposition={"shrinkage": None},
    )
    found = compress(tiny_mixture(name), config).factors
    for expert in range(4):
        rows = hidden[(index == expert).any(1)]
        assert len(rows) > 48
        weights = {
            "gate_up": fused.gate_up_proj[expert].detach().double().numpy(),
            "down": fused.down_proj[expert].detach().double().numpy(),
        }
        if not fused.is_transposed:
            weights = {part: weight.T for part, weight in weights.items()}
        bias = 0 if not fused.has_bias else fused.gate_up_proj_bias[expert].detach().double().numpy()
        with torch.no_grad():
            middle = fused._apply_gate(torch.tensor(rows @ weights["gate_up"] + bias)).numpy()
        expected = {
            "gate_up": whitened(weights["gate_up"], shrunk(rows, hidden), 9),
            "down": whitened(weights["down"], middle.T @ middle / len(middle), 7),
        }
        for part, weight in expected.items():
            ours = product(found[f"{path}.{expert}.{part}"])
            # float32 activations and factors
            np.testing.assert_allclose(ours, weight, atol=2e-4 * np.abs(weight).max(), rtol=0)


def test_an_expert_that_sees_nothing_takes_the_moment_of_all_tokens():
    def starved():
        model = tiny_mixture("gpt_oss")
        with torch.no_grad():
            model.model.layers[0].mlp.router.bias[2] = -1e4
        return model

    dense = starved()
    path, fused = next(iter(fused_experts(dense).items()))
    hidden, index = routed(dense, path, data())
    assert not (index == 2).any()
    config = settings(
        target_modules=EXPERTS,
        rank_pattern={"gate_up": 9, "down": 7},
        compensation="none",
        decomposition={"shrinkage": None},
    )
    found = compress(starved(), config)
    first = fused.gate_up_proj[2].detach().double().numpy()
    expected = whitened(first, hidden.T @ hidden / len(hidden), 9)
    np.testing.assert_allclose(
        product(found.factors[f"{path}.2.gate_up"]), expected, atol=2e-4 * np.abs(expected).max()
    )
    left, values, right = np.linalg.svd(fused.down_proj[2].detach().double().numpy())
    plain = (left[:, :7] * values[:7]) @ right[:7]
    np.testing.assert_allclose(product(found.factors[f"{path}.2.down"]), plain, atol=1e-5 * np.abs(plain).max())
    assert found.statistics[f"{path}.2.down"]["rows"] == 0
    for method in ("lstsq", "gradient"):
        again = compress(starved(), settings(compensation={"method": method, "steps": 20}))
        assert all(p.isfinite().all() for layer in again.factors.values() for p in layer.parameters())


def test_padding_is_no_token_of_an_expert():
    model = tiny_mixture("mixtral")
    split(model, fused_experts(model))
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "experts" in n]
    plain = data(3)
    padded = [
        {
            "input_ids": nn.functional.pad(batch["input_ids"], (0, 5), value=3),
            "attention_mask": nn.functional.pad(torch.ones_like(batch["input_ids"]), (0, 5)),
        }
        for batch in plain
    ]
    found = []
    for batches in (plain, padded):
        source = CalibrationSet(batches, progress=False)
        groups = source.input_groups(model, names)
        assert sorted(groups) == sorted((name,) for name in names)
        found.append(dict(source.statistics(model, groups, "second_moment")))
    for group, statistic in found[0].items():
        assert statistic.rows == found[1][group].rows > 0
        torch.testing.assert_close(statistic.second_moment(), found[1][group].second_moment(), rtol=1e-4, atol=1e-6)


def test_compensation_takes_the_tokens_that_the_dense_model_sends(monkeypatch):
    """The rows of an expert in the two streams are of the same tokens, although the compressed router chooses others."""
    from hf_qst.mixed_rank.compensation import two_streams

    seen = {}
    for stream in (two_streams._DenseBlocks, two_streams._CompressedBlocks):

        def inputs(self, names, segment, number, capture=stream.inputs):
            found = capture(self, names, segment, number)
            for name, rows in found.items():
                seen.setdefault((name, number), []).append(rows)
            return found

        monkeypatch.setattr(stream, "inputs", inputs)
    compress(tiny_mixture("mixtral"), settings(keep_ratio=0.3, compensation="lstsq"))
    second = [pair for (name, _), pair in seen.items() if "layers.1.mlp.experts.0.gate_up" in name]
    assert second
    for dense, compressed in second:
        assert dense.shape == compressed.shape and not torch.equal(dense, compressed)
        # Rows of the same token are alike, and more so than rows of others.
        near = nn.functional.cosine_similarity(dense, compressed).mean()
        assert near > nn.functional.cosine_similarity(dense, compressed.roll(1, 0)).mean() + 0.2


@pytest.mark.parametrize("name", CONFIGS)
def test_compressed_saved_loaded_merged_and_dense_again(name, tmp_path):
    dense, base = tiny_mixture(name), tiny_mixture(name)
    matrices = lambda model: sum(p.numel() for n, p in model.named_parameters() if "experts." in n and "_bias" not in n)
    tuned = get_peft_model(base, settings())
    compressed = [n for n in tuned.peft_config["default"].rank_pattern if "experts." in n]
    assert len(compressed) > 4 and "shared" not in compressed[0]
    tuned.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(tiny_mixture(name), tmp_path / "adapter")
    expected = logits(tuned)
    assert torch.equal(logits(loaded), expected)
    small = tuned.merge_and_unload()
    assert torch.equal(logits(small), expected) and matrices(small) < 0.75 * matrices(dense)
    # No memory of a fused weight is left.
    sizes = [p.untyped_storage().nbytes() - p.numel() * p.element_size() for p in small.parameters()]
    assert max(sizes) == 0
    small.save_pretrained(tmp_path / "small")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert {n: p.shape for n, p in again.named_parameters()} == {n: p.shape for n, p in small.named_parameters()}
    assert all(torch.equal(p, q) for p, q in zip(small.parameters(), again.parameters(), strict=True))
    torch.testing.assert_close(logits(again), expected, rtol=1e-5, atol=1e-5)
    plain = to_dense(small)
    assert set(plain.state_dict()) == set(dense.state_dict())
    torch.testing.assert_close(logits(plain), expected, rtol=1e-4, atol=1e-4)


def test_dense_weights_that_are_kept_come_back_fused():
    dense, model = tiny_mixture("qwen3_moe"), tiny_mixture("qwen3_moe")
    tuned = get_peft_model(model, settings(keep_base_weights=True))
    assert not torch.allclose(logits(tuned), logits(dense))
    with tuned.disable_adapter():
        assert torch.equal(logits(tuned), logits(dense))
    base = tuned.unload()
    assert torch.equal(logits(base), logits(dense)) and not any(isinstance(m, SplitExperts) for m in base.modules())


def test_a_refused_budget_leaves_the_experts_as_they_were():
    model = tiny_mixture("mixtral")
    fused = fused_experts(model)
    with pytest.raises(BudgetError):
        get_peft_model(model, settings(keep_ratio=0.001))
    assert fused_experts(model) == fused


def test_the_budget_holds_over_experts_and_layers_and_spends_more_where_more_tokens_go():
    model = tiny_mixture("mixtral")
    found = compress(model, settings(keep_ratio=0.5, compensation="none"))
    split(model, fused_experts(model))
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    sizes = {n: model.get_submodule(n).weight.numel() for n in names}
    assert sorted([*found.factors, *found.dense]) == sorted(names)
    kept = sum(sizes[n] for n in found.dense) + sum(
        layer.rank * (layer.in_features + layer.out_features) for layer in found.factors.values()
    )
    assert 0.99 * 0.5 <= kept / sum(sizes.values()) <= 0.5


@pytest.mark.parametrize("compensation", ["lstsq", "gradient", "kd"])
def test_every_compensation_reaches_experts(compensation):
    dense = logits(tiny_mixture("qwen3_moe"))
    changes = {"compensation": {"method": compensation, "steps": 30}, "calibration_data": data(4)}
    small = compress_model(tiny_mixture("qwen3_moe"), settings(**changes))
    plain = compress_model(
        tiny_mixture("qwen3_moe"), settings(decomposition="plain", compensation="none", **{"calibration_data": data(4)})
    )
    assert any(isinstance(m, LowRankLinear) and "experts" in n for n, m in small.named_modules())
    assert (logits(small) - dense).norm() < (logits(plain) - dense).norm()


@pytest.mark.parametrize("changes", [{"decomposition": "normalized"}, {"allocation": {"layer_weight": "fisher"}}])
def test_other_metrics_and_weights_take_experts(changes):
    small = compress_model(tiny_mixture("mixtral"), settings(compensation="none", **changes))
    assert logits(small).isfinite().all()


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_factors_of_experts_are_quantised(scheme, tmp_path):
    small = compress_model(tiny_mixture("mixtral"), settings(quantize_factors=scheme))
    small.save_pretrained(tmp_path)
    expected = logits(small)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, rtol=1e-3, atol=1e-2)


def test_experts_that_cannot_be_reached_are_named_unless_the_caller_names_layers(monkeypatch):
    monkeypatch.setitem(encoder_blocks.MODELS, "llama4_text", encoder_blocks.Blocks())
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "intermediate_size_mlp": 64, "num_attention_heads": 2}
    config = Llama4TextConfig(
        vocab_size=96, num_hidden_layers=2, num_key_value_heads=2, head_dim=16, num_local_experts=4, moe_layers=[0, 1],
        pad_token_id=0, attn_temperature_tuning=False, **shape,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(BudgetError, match=r"out of reach.*experts\.gate_up_proj.*target_modules"):
        compress_model(model, settings())
    compress_model(model, settings(target_modules=["q_proj", "o_proj"]))
    assert any(isinstance(module, LowRankLinear) for module in model.modules())


@pytest.mark.parametrize("quantised", [True, False])
def test_residuals_make_up_for_what_experts_have_lost(quantised, tmp_path):
    dense = tiny_mixture("mixtral")

    def base():
        if quantised:
            model = quantize_experts(tiny_mixture("mixtral"))
            # Saving takes weights out of bitsandbytes' packed layout, which is not exact.
            forbid_packing(model)
            return model
        model = tiny_mixture("mixtral")
        with torch.no_grad():
            for experts in fused_experts(model).values():
                experts.down_proj.mul_(1 + 0.3 * torch.randn(experts.down_proj.shape, generator=torch.manual_seed(1)))
        return model

    expected, fused = logits(dense), fused_experts(dense)
    before = (logits(base()) - expected).norm()
    tuned = get_peft_model(base(), settings(residual={"reference_model": dense, "rank": 24}))
    assert any("experts" in name for name in tuned.peft_config["default"].rank_pattern)
    assert (logits(tuned) - expected).norm() < 0.9 * before
    assert fused_experts(dense) == fused
    tuned.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path)), logits(tuned))
