"""Plans: parameters, weights, files, what fits, and what is refused."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from hf_qst import DISPConfig, MixedRankConfig, QSTConfig, plan
from hf_qst.planning.chips import USABLE, chip_of
from hf_qst.planning.planner import largest_size
from tests.architectures import NF4, side_config, side_tuned, tiny, token_batch
from tests.tiny_decoders import tiny_config, tiny_decoder

LORA = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear"}
METHODS = {
    "qst": side_config,
    "lora": lambda: LoraConfig(**LORA),
    "disp": lambda: DISPConfig(task_type="CAUSAL_LM", start_scores="none"),
}
LARGE = LlamaConfig(
    vocab_size=32000, hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=11008
)


def stored(model) -> int:
    """Bytes of all tensors of a model, scales and tables of 4-bit weights included, each storage once."""
    tensors = [*model.parameters(), *model.buffers()]
    for parameter in model.parameters():
        if (state := getattr(parameter, "quant_state", None)) is not None:
            second = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
            tensors += [state.absmax, state.code, *second]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("method", METHODS)
def test_weights_and_adapter_files_are_exact(method, tmp_path):
    model = get_peft_model(tiny_decoder("llama"), METHODS[method]())
    found = plan(tiny_config("llama"), METHODS[method](), device="cpu", sequence=16, search=False)
    kinds = ("weights", "buffers", "adapter")
    assert sum(found.bytes.get(kind, 0) for kind in kinds) == stored(model)
    assert sum(n for part, n in found.parameters.items() if part != "trained") == sum(
        p.numel() for p in model.parameters()
    )
    model.save_pretrained(tmp_path)
    assert found.adapter_file == (tmp_path / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize("double", [True, False])
def test_four_bit_weights_are_exact(double, tmp_path):
    settings = BitsAndBytesConfig(**{**NF4, "bnb_4bit_use_double_quant": double})
    tiny("llama").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=settings, device_map={"": "cpu"})
    found = plan(
        str(tmp_path), LoraConfig(**LORA), sequence=16, device="cpu", quantization_config=settings, search=False
    )
    base = ("weights", "buffers", "4-bit weights", "4-bit scales")
    assert sum(found.bytes[kind] for kind in base) == stored(model)
    packed = [p for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    assert found.bytes["4-bit weights"] == sum(p.numel() for p in packed)
    blocks = sum(p.quant_state.shape.numel() for p in packed)
    assert found.parameters["blocks"] == blocks + sum(
        p.numel() for name, p in model.named_parameters() if "layernorm" in name
    )


def test_a_large_model_is_planned_without_weights():
    found = plan(LARGE, QSTConfig.paper(task_type="CAUSAL_LM"), 4, 512, "h100", search=False)
    assert found.parameters["trained"] == 28_610_849
    assert 0 < found.seconds < 10
    assert found.bytes["weights"] == pytest.approx(13.5e9, rel=0.01)
    assert found.fits["80 GB"] and found.fits["24 GB"]
    assert not plan(LARGE, QSTConfig.paper(task_type="CAUSAL_LM"), 4, 512, "12GB", search=False).fits["12GB"]


def test_what_a_plan_says_follows_the_options():
    config = tiny_config("llama")

    def found(method="full", **options):
        return plan(config, method, **{"batch": 4, "sequence": 64, "device": "cpu", "search": False, **options})

    every = found()
    assert every.bytes["optimizer"] == 8 * every.parameters["trained"]
    assert found(optimizer="sgd").bytes.get("optimizer", 0) == 0
    assert found(gradient_checkpointing=True).kept < every.kept / 4
    assert found(side_config(), batch=8).kept == pytest.approx(2 * found(side_config()).kept, rel=0.01)
    cache = plan(config, None, 2, 64, "cpu", inference=True, search=False)
    # keys and values of 4 blocks with 2 heads of 16
    assert cache.bytes["KV cache"] == 2 * 4 * 2 * 64 * 2 * 16 * 4
    with_side = plan(config, side_config(), 2, 64, "cpu", inference=True, search=False)
    assert with_side.bytes["KV cache"] > cache.bytes["KV cache"]


def test_the_search_finds_what_fits():
    found = plan(tiny_config("llama"), "full", 4, 64, "1GB")
    usable = int(USABLE * 2**30)
    batch = found.largest["1GB"]["batch"]
    total = lambda n: plan(tiny_config("llama"), "full", n, 64, "1GB", search=False).total
    assert total(batch) <= usable < total(batch + max(1, batch // 50))
    assert found.fits["1GB"] == (found.total <= usable)
    assert found.savings["gradient_checkpointing=True"] > 0
    assert found.savings["batch=2"] > 0


def test_the_largest_size_is_found_on_lines_and_parabolas():
    assert largest_size(lambda n: 10 + 3 * n, 100, 1) == 30
    assert largest_size(lambda n: 10 + 3 * n, 12, 1) == 0
    calls = []
    found = largest_size(lambda n: calls.append(n) or n + n * n // 1000, 10**6, 2048, 64)
    best = 31104 // 64 * 64  # the root of n + n^2 / 1000 = 10^6 is 31,126
    assert found % 64 == 0 and 0.98 * best <= found <= best
    assert len(calls) <= 12


def test_a_plan_is_data_and_text():
    found = plan(tiny_config("llama"), side_config(), 2, 16, "24GB")
    assert json.loads(json.dumps(found.as_dict()))["total"] == found.total
    text = str(found)
    assert "kept for the backward pass" in text and "24 GB" in text and "largest" not in text


def test_planning_changes_neither_configuration_nor_model_nor_random_numbers():
    config, method = tiny_config("llama"), QSTConfig(task_type="CAUSAL_LM")
    model = side_tuned("llama").train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    plan(config, method, 2, 16, "cpu", search=False)
    plan(model, None, 2, 16, "cpu", search=False)
    assert method.r is None
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
        ({"method": None}, "method must be a PEFT configuration or 'full', got None"),
        ({"method": "lora"}, "method must be a PEFT configuration, 'full' or None, got 'lora'"),
        ({"optimizer": "lion"}, "optimizer must be one of adamw, adamw_8bit, sgd, got 'lion'"),
        ({"device": "abacus"}, "device: expected .*got 'abacus'"),
    ],
)
def test_what_is_refused_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan(tiny_config("llama"), **{"method": "full", "device": "cpu", **arguments})


def test_devices_are_named_by_chip_or_size():
    assert chip_of("24GB").memory == 24 * 2**30
    assert chip_of("h100").products > chip_of("t4").products
    assert chip_of("cpu").kernels == "cpu"


def first_step(model, caplog, level):
    caplog.set_level(level, "hf_qst.planning")
    ids = token_batch()
    losses = [model(input_ids=ids, labels=ids).loss for _ in range(2)]
    losses[0].backward()
    return [record for record in caplog.records if record.name == "hf_qst.planning.announcement"]


@pytest.mark.parametrize("method", ["qst", "disp"])
def test_training_says_once_what_it_is_expected_to_take(method, caplog):
    model = get_peft_model(tiny("llama"), METHODS[method]()).train()
    found = first_step(model, caplog, logging.DEBUG)
    assert [record.levelname for record in found] == ["INFO"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"trains {trained:,} of" in found[0].message and "2 rows of 12 tokens" in found[0].message


def test_training_that_will_not_fit_is_warned_of_and_goes_on(caplog, monkeypatch):
    monkeypatch.setattr("hf_qst.planning.chips._processor", lambda: chip_of("24GB").__class__("small", "cpu", 1000))
    found = first_step(side_tuned("llama").train(), caplog, logging.INFO)
    assert [record.levelname for record in found] == ["WARNING"]
    assert "will probably not fit" in found[0].message


def test_training_without_a_plan_goes_on(caplog):
    found = first_step(side_tuned(model=tiny_decoder("longcat_flash")).train(), caplog, logging.DEBUG)
    assert [record.levelname for record in found] == ["DEBUG"]
    assert "no plan of this training: PlanError" in found[0].message


def test_evaluation_says_nothing(caplog):
    model = side_tuned("llama").eval()
    assert first_step(model, caplog, logging.DEBUG) == []


def test_compression_is_planned_by_its_work():
    config = tiny_config("llama")
    found = plan(config, MixedRankConfig(keep_ratio=0.5), 4, 64, "cpu", search=False)
    # In float64, of one block at a time: q, k and v read one input, as gate and up do, so three of 64 and one of 128.
    assert found.bytes["input statistics"] == 8 * (3 * 64**2 + 128**2)
    assert found.seconds is None and found.kept == 0
    small = plan(config, MixedRankConfig(keep_ratio=0.5, memory_limit=2**16), 4, 64, "cpu", search=False)
    assert small.bytes["input statistics"] == 2**16
    # Without compensation the statistics of all blocks are kept until the ranks are known.
    for settings in ({"compensation": "none"}, {"decomposition": {"metric": "normalized"}}):
        without = plan(config, MixedRankConfig(keep_ratio=0.5, **settings), 4, 64, "cpu", search=False)
        assert without.bytes["input statistics"] == 4 * 8 * (3 * 64**2 + 128**2)


@pytest.mark.parametrize("method", [MixedRankConfig(keep_ratio=0.5), DISPConfig(keep_ratio=0.5)])
def test_inference_with_a_smaller_model_is_planned_at_its_size(method):
    config = tiny_config("llama")
    dense, small = (plan(config, m, 2, 16, "cpu", inference=True, search=False) for m in (None, method))
    assert small.parameters["blocks"] == pytest.approx(0.5 * dense.parameters["blocks"], rel=0.05)
    assert small.bytes["KV cache"] == dense.bytes["KV cache"]


def test_what_is_said_at_the_start_changes_nothing_in_a_training(caplog):
    losses = {}
    for level in (logging.INFO, logging.ERROR):
        caplog.set_level(level, "hf_qst.planning")
        model = side_tuned("llama", downsample_dropout=0.3, side_checkpointing=True).train()
        torch.manual_seed(1)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        losses[level] = []
        for _ in range(2):
            loss = model(input_ids=token_batch(), labels=token_batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[level].append(loss.item())
    assert len([r for r in caplog.records if r.name == "hf_qst.planning.announcement"]) == 1
    assert losses[logging.INFO] == losses[logging.ERROR]


def test_a_model_must_be_in_the_mode_of_its_plan():
    model = side_tuned("llama")
    with pytest.raises(ValueError, match=r"must be in training mode for this plan: call model\.train\(\)"):
        plan(model.eval(), None, 2, 16, "cpu", search=False)
    with pytest.raises(ValueError, match=r"must be in evaluation mode for this plan: call model\.eval\(\)"):
        plan(model.train(), None, 2, 16, "cpu", inference=True, search=False)
