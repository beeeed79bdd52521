"""Every encoder, encoder-decoder and vision model whose blocks are known: no layer has to be named."""

import pytest
import torch
from torch import nn

from hf_qst import MixedRankConfig, compress_model, to_dense
from hf_qst.base_model.encoder_blocks import MODELS, find_blocks, stays_out
from hf_qst.mixed_rank import LowRankLinear, find_targets
from tests.encoders import ENCODERS, auto_class, encoder_batch, tiny_encoder

KINDS = [(name, bare) for name, one in ENCODERS.items() for bare in ((False, True) if one.head else (False,))]


def settings(name, bare, padded=False, **changes):
    batches = [encoder_batch(name, bare, seed, padded) for seed in range(3)]
    return MixedRankConfig(**{"keep_ratio": 0.6, "calibration_data": batches, "progress": False, **changes})


def outputs(model, batch):
    with torch.no_grad():
        found = model.eval()(**batch)
    return {k: v for k, v in found.items() if torch.is_tensor(v) and v.is_floating_point()}


def inputs_of(model, names, batch):
    """What these layers are given, by name."""
    seen, handles = {}, []
    for name in names:
        hook = lambda module, args, name=name: seen.setdefault(name, args[0].detach())
        handles.append(model.get_submodule(name).register_forward_pre_hook(hook))
    outputs(model, batch)
    for handle in handles:
        handle.remove()
    return seen


def test_every_row_of_the_table_is_tested():
    assert {*MODELS} == {*ENCODERS}


@pytest.mark.parametrize("name, bare", KINDS)
def test_by_default_it_compresses_saves_and_loads(name, bare, tmp_path):
    model, batch = tiny_encoder(name, bare), encoder_batch(name, bare, 9)
    dense, before = outputs(model, batch), {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    targets = find_targets(model, settings(name, bare))
    sizes = {n: before[n].weight.numel() for n in targets}
    small = compress_model(model, settings(name, bare))
    low = {n: m for n, m in small.named_modules() if isinstance(m, LowRankLinear)}
    kept = sum(m.rank * (m.in_features + m.out_features) for m in low.values())
    kept += sum(size for n, size in sizes.items() if n not in low)
    assert low.keys() <= sizes.keys() and 0.98 * 0.6 <= kept / sum(sizes.values()) <= 0.6
    expected = outputs(small, batch)
    for key, value in expected.items():
        assert value.isfinite().all()
        if value.numel() > 1:
            # Random weights have flat spectra, the hardest there are: far from equal, and far from unrelated.
            assert nn.functional.cosine_similarity(value.flatten(), dense[key].flatten(), dim=0) > 0.4
    small.save_pretrained(tmp_path)
    loaded = outputs(auto_class(name, bare).from_pretrained(tmp_path), batch)
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[key], expected[key]) for key in expected)
    plain = outputs(to_dense(small), batch)
    for key, value in expected.items():
        torch.testing.assert_close(plain[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_compressed_reads_hidden_states_and_what_stays_out_does_not(name):
    model = tiny_encoder(name)
    blocks = tuple(f"{path}." for path in find_blocks(model))
    layers = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(blocks)]
    out = [n for n in layers if stays_out(model, n)]
    assert sorted([*find_targets(model, settings(name, False)), *out]) == sorted(layers) and len(out) < len(layers)
    first, second = (inputs_of(model, layers, encoder_batch(name, seed=seed)) for seed in (1, 2))
    assert {*layers} - first.keys() <= {*out}  # Mamba reads a weight past its layer
    reads_hidden_states = {n for n in first if not torch.equal(first[n], second[n])}
    assert {*layers} - {*out} <= reads_hidden_states
    assert not reads_hidden_states & {*out}
    assert bool(out) == bool(MODELS[name].without)


@pytest.mark.parametrize("name", ["bert", "deberta-v2", "modernbert", "bart", "t5", "clip"])
def test_padding_is_left_out(name):
    """The padded positions hold other inputs in the second model's data, and nothing of it is seen."""
    found = []
    for changed in (False, True):
        config = settings(name, False, padded=True, compensation="none")
        if changed:
            for batch in config.calibration_data:
                batch["input_ids"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 5)
        found.append(compress_model(tiny_encoder(name), config))
    ranks = [{n: m.rank for n, m in model.named_modules() if isinstance(m, LowRankLinear)} for model in found]
    assert ranks[0] == ranks[1] and ranks[0]
    for name_, rank in ranks[0].items():
        one, other = (model.get_submodule(name_).weight for model in found)
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4, msg=f"{name_} of rank {rank}")
