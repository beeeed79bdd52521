"""The fixed projection onto principal directions, against numpy's PCA."""

import logging

import numpy as np
import pytest
import torch
from peft import PeftModel

from hf_qst import QSTConfig
from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.errors import CalibrationError
from tests.architectures import digest, side_config, side_network, side_tuned, tiny, token_batch, wake
from tests.tiny_decoders import tiny_decoder


def states_of(base, batches):
    """Rows [tokens, hidden] that each downsampler reads: the first gets the embedding's too."""
    rows = [[] for _ in range(len(base.model.layers))]
    for batch in batches:
        ids = batch["input_ids"]
        keep = batch.get("attention_mask", torch.ones_like(ids)).bool()
        handles = [
            base.model.layers[0].register_forward_pre_hook(lambda m, args, keep=keep: rows[0].append(args[0][keep]))
        ]
        for i, block in enumerate(base.model.layers):
            handles.append(block.register_forward_hook(lambda m, a, out, i=i, keep=keep: rows[i].append(out[keep])))
        with torch.no_grad():
            base.model(**batch)
        for handle in handles:
            handle.remove()
    return [torch.cat(r).double().numpy() for r in rows]


def batches(count=4, padded=False):
    result = []
    for seed in range(count):
        ids = token_batch(4, 16, seed=seed)
        batch = {"input_ids": ids}
        if padded:
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][:2, :6] = 0
        result.append(batch)
    return result


@pytest.mark.parametrize("padded", [False, True])
def test_directions_are_numpys(padded):
    data = batches(padded=padded)
    model = side_tuned("llama", downsample="principal", calibration_data=data)
    for part, rows in zip(side_network(model).downsample, states_of(tiny("llama"), data), strict=True):
        mean = rows.mean(0)
        values, vectors = np.linalg.eigh(np.cov(rows.T, bias=True))
        expected = (vectors[:, ::-1][:, :16] / np.sqrt(values[::-1][:16])).T
        got = part.directions.double().numpy()
        np.testing.assert_allclose(part.mean.double().numpy(), mean, atol=1e-5)
        # A direction's sign is arbitrary, and so is the choice within nearly equal variances.
        for ours, theirs in zip(got, expected, strict=True):
            sign = np.sign(ours @ theirs)
            np.testing.assert_allclose(sign * ours, theirs, atol=0.02 * np.abs(theirs).max())
        projected = (rows - mean) @ got.T
        np.testing.assert_allclose(np.cov(projected.T, bias=True), np.eye(16), atol=1e-3)


@pytest.mark.parametrize("name", ["gemma3n_text", "deepseek_v4", "qwen4_exp_text"])
def test_of_several_residual_streams_the_state_that_the_side_network_reads_is_fitted(name):
    base = tiny_decoder(name)
    stack, data, rows = find_decoder_stack(base), batches(2), []
    hook = lambda module, args, output: rows.append(stack.state(output).flatten(0, 1))
    handle = stack.blocks[-1].register_forward_hook(hook)
    with torch.no_grad():
        for batch in data:
            base(**batch)
    handle.remove()
    model = side_tuned(model=base, downsample="principal", calibration_data=data)
    torch.testing.assert_close(side_network(model).downsample[-1].mean, torch.cat(rows).mean(0), atol=1e-4, rtol=1e-4)


def test_padding_would_change_the_directions():
    """A control for the test above: the mask matters."""
    data = batches(padded=True)
    masked = side_tuned("llama", downsample="principal", calibration_data=data)
    unmasked = side_tuned(
        "llama", downsample="principal", calibration_data=[{"input_ids": b["input_ids"]} for b in data]
    )
    left, right = (side_network(m).downsample[1].mean for m in (masked, unmasked))
    assert not torch.allclose(left, right, atol=1e-3)


def test_projections_are_saved_and_not_fitted_again(tmp_path, caplog):
    model = wake(side_tuned("llama", downsample="principal", calibration_data=batches())).eval()
    model.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING):
        loaded = PeftModel.from_pretrained(tiny("llama"), tmp_path).eval()
    assert "principal" not in caplog.text
    ids = token_batch()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("change", ["made", "switched", "enabled", "reloaded", "requires_grad"])
def test_fixed_projections_are_parameters_that_are_never_trained(change, tmp_path):
    model = side_tuned("llama", downsample="principal", calibration_data=batches())
    count = sum(p.numel() for p in side_network(model).parameters()) - 3 * (16 * 64 + 64)
    if change == "switched":
        model.add_adapter("other", QSTConfig(task_type="CAUSAL_LM", r=4))
        model.set_adapter("other")
        model.set_adapter("default")
    elif change == "enabled":
        with model.disable_adapter():
            pass
    elif change == "requires_grad":
        model.set_requires_grad("default")
    elif change == "reloaded":
        model.save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(tiny("llama"), tmp_path, is_trainable=True)
    fixed = [p for name, p in model.named_parameters() if name.endswith((".directions", "downsample.0.mean"))]
    assert len(fixed) == 4
    assert not any(p.requires_grad for p in fixed)
    assert model.get_nb_trainable_parameters()[0] == count
    before = [p.clone() for p in fixed]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    ids = token_batch()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert all(torch.equal(old, new) for old, new in zip(before, fixed, strict=True))


def test_a_copy_of_the_parameters_is_the_same_function():
    """As trainers make a frozen reference of an adapter that is trained on."""
    data = iter(batches())
    model = wake(side_tuned("llama", downsample="principal", calibration_data=data)).eval()
    model.add_adapter("reference", model.peft_config["default"])  # the batches have been read
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".reference.")).data.copy_(parameter.data)
    ids = token_batch()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        model.set_adapter("reference")
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_second_adapter_of_a_loaded_configuration_has_its_projections(tmp_path):
    side_tuned("llama", downsample="principal", calibration_data=batches()).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), tmp_path)
    model.add_adapter("second", model.peft_config["default"])
    for part, other in zip(side_network(model).downsample, side_network(model, "second").downsample, strict=True):
        assert torch.equal(part.directions, other.directions)
        assert torch.equal(part.mean, other.mean)


def test_calibration_leaves_mode_and_weights_of_the_base():
    base = tiny("opt").train()
    before = digest(base)
    side_tuned(model=base, downsample="principal", calibration_data=batches())
    assert base.training
    assert digest(base) == before


@pytest.mark.parametrize("data", [[], iter(())])
def test_no_batches_are_refused(data):
    with pytest.raises(ValueError, match="calibration_data must hold at least one batch"):
        side_tuned("llama", downsample="principal", calibration_data=data)


def test_without_data_directions_are_orthonormal_and_said_to_be_random(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_qst.qst.principal_directions"):
        model = side_tuned("llama", downsample="principal")
    assert caplog.text.count("random and orthonormal") == 1
    directions = side_network(model).downsample[0].directions
    torch.testing.assert_close(directions @ directions.T, torch.eye(16), atol=1e-5, rtol=0)


def test_generator_of_batches_is_read_once():
    config = side_config(downsample="principal", calibration_data=(b for b in batches()))
    model = tiny("llama")
    model.add_adapter(config)
    reference = side_tuned("llama", downsample="principal", calibration_data=batches())
    ours, theirs = (side_network(m).downsample[2].directions for m in (model, reference))
    torch.testing.assert_close(ours, theirs)


def test_states_that_are_not_finite_are_refused_and_their_block_is_named():
    base = tiny("llama")
    with torch.no_grad():
        base.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"states of module 'layers\.1' hold NaN"):
        side_tuned(model=base, downsample="principal", calibration_data=batches())
