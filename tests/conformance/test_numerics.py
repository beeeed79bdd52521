"""Numbers at the edges: three dtypes, rows of padding, one row, none, an odd vocabulary, and what is saved in which dtype."""

import math
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from hf_qst.qst import HiddenStateCacheConfig, hidden_state_cache, set_hidden_state_cache
from hf_qst.tuner import manifest_tuner
from tests.architectures import in_nf4
from tests.conformance.methods import IDS, LINES, logits, small

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Four roundings of a unit in the last place in each of two blocks, of numbers that do not add up in one direction.
NEAR = {"float32": 1e-6, "bfloat16": 8 * 2**-8, "float16": 8 * 2**-11}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def step(model, ids=IDS, lr: float = 1e-3, **inputs) -> float:
    """Loss of one training step, by plain gradient descent: AdamW's epsilon is 0 in float16."""
    trained = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(0)
    loss = model.train()(input_ids=ids, labels=inputs.pop("labels", ids), **inputs).loss
    loss.backward()
    assert all(p.grad.isfinite().all() for p in trained if p.grad is not None)
    torch.optim.SGD(trained, lr=lr).step()
    model.zero_grad()
    assert all(p.isfinite().all() for p in trained)
    return loss.item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_trains_saves_loads_and_generates_near_float32(line, dtype, tmp_path):
    exact = line.random()
    expected = logits(exact), step(exact), logits(exact)
    model = line.random(small(dtype=DTYPES[dtype]))
    assert relative(logits(model), expected[0]) < NEAR[dtype]
    # DISP draws its channels from numbers that were rounded.
    assert step(model) == pytest.approx(expected[1], rel=NEAR[dtype])
    after = logits(model)
    assert relative(after, expected[2]) < 2 * NEAR[dtype]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(small(dtype=DTYPES[dtype]), tmp_path)
    assert torch.equal(logits(loaded), after)
    tokens = loaded.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens, model.eval().generate(IDS, max_new_tokens=4, do_sample=False))


def test_adamw_in_float16_is_named(line, caplog, tmp_path):
    manifest_tuner._warn_of_float16.cache_clear()
    model = get_peft_model(small(dtype=torch.float16), line.config(init_weights=False), autocast_adapter_dtype=False)
    logits(model)
    assert "float16" not in caplog.text
    for _ in range(2):
        model.train()(input_ids=IDS, labels=IDS)
    said = [record.message for record in caplog.records if "AdamW's epsilon" in record.message]
    assert len(said) == 1 and said[0].startswith(line.layer_class.method)
    manifest_tuner._warn_of_float16.cache_clear()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_rows_of_nothing_else_change_no_other_row(line, side):
    model = line.random()
    mask = torch.ones(4, IDS.shape[1], dtype=torch.long)
    mask[0, slice(0, 5) if side == "left" else slice(-5, None)] = 0
    mask[2:] = 0
    ids = torch.cat([IDS, IDS]).masked_fill(mask == 0, 0)
    padded = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        together = model.eval()(**padded, use_cache=False).logits
        alone = model(input_ids=IDS[:1, mask[0].bool()], use_cache=False).logits
        only_padding = model(input_ids=ids[2:], attention_mask=mask[2:], use_cache=False).logits
    assert together.isfinite().all() and only_padding.isfinite().all()
    assert relative(together[:1, mask[0].bool()], alone) < 1e-5
    assert relative(together[1:2], logits(model)[1:]) < 1e-5
    labels = ids.masked_fill(mask == 0, -100)
    loss = step(model, ids, labels=labels, attention_mask=mask, position_ids=padded["position_ids"])
    assert math.isfinite(loss)
    if side == "left":
        new = model.eval().generate(ids[:2], attention_mask=mask[:2], max_new_tokens=4, do_sample=False)[
            :, ids.shape[1] :
        ]
        first = model.generate(IDS[:1, 5:], max_new_tokens=4, do_sample=False)[:, -4:]
        assert torch.equal(new[:1, : first.shape[1]], first)


def test_one_row_and_one_token_are_as_among_others(line):
    model = line.random()
    expected = logits(model)
    with torch.no_grad():
        assert relative(model(input_ids=IDS[:1], use_cache=False).logits, expected[:1]) < 1e-6
        assert relative(model(input_ids=IDS[:1, :1], use_cache=False).logits, expected[:1, :1]) < 1e-6
    assert math.isfinite(step(model, IDS[:1, :2]))


@pytest.mark.parametrize("shape", [(0, 12), (2, 0)])
def test_a_batch_without_tokens_is_an_error_and_leaves_nothing_behind(line, shape):
    """As of the models of transformers themselves; those that wrap the decoder stack say what it is."""
    model = line.random()
    expected = logits(model)
    for training in (False, True):
        with pytest.raises((RuntimeError, ValueError, IndexError)) as error:
            model.train(training)(input_ids=torch.zeros(shape, dtype=torch.long))
        if hasattr(model.base_model, "stack_layer"):
            assert f"needs at least one row and one token, got a batch of shape {list(shape)}" in str(error.value)
    assert torch.equal(logits(model), expected)


def test_a_vocabulary_that_nothing_divides(line, tmp_path):
    """97 is prime: the chunked loss, the head and the embeddings have no even part of it."""
    base = small(vocab_size=97, num_hidden_layers=2)
    model = line.random(base)
    ids = IDS.masked_fill(IDS == 5, 96)
    assert step(model, ids) > 0
    plain = torch.nn.functional.cross_entropy(
        model.eval()(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    assert model(input_ids=ids, labels=ids, use_cache=False).loss.item() == pytest.approx(plain.item(), rel=1e-5)
    if line is LINES["qst"]:
        with torch.no_grad():  # in training mode from the chunked loss
            assert model.train()(input_ids=ids, labels=ids).loss.item() == pytest.approx(plain.item(), rel=1e-5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(small(vocab_size=97), tmp_path)), logits(model))
    assert model.generate(ids, max_new_tokens=3).shape == (2, 15)


# The dtypes of what is saved, as docs/saved_files.md has them.
PAGE = Path(__file__).parents[2] / "docs" / "saved_files.md"
_NAMES = {
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "U8": "uint8",
    "I8": "int8",
    "I32": "int32",
    "I64": "int64",
}


def documented() -> dict[str, list[tuple[re.Pattern, str]]]:
    """By the section of the page, a pattern of names and a dtype for each line of its table."""
    found: dict[str, list] = {}
    section = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ")
        elif line.startswith("| `"):
            names, dtype = [cell.strip() for cell in line.strip("|").split("|")][:2]
            for name in re.findall(r"`([^`]+)`", names):
                pattern = re.escape(name).replace(r"\*", ".*")
                found.setdefault(section, []).append((re.compile(rf"(.*\.)?{pattern}"), dtype))
    return found


def check_page(section: str, file: Path, base: str) -> set[str]:
    """Every tensor of a file has the dtype that the page gives it; returns the dtypes that were met."""
    lines, met = documented()[section], set()
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  not a dictionary
            dtype = _NAMES[tensors.get_slice(name).get_dtype()]
            wanted = next((dtype for pattern, dtype in lines if pattern.fullmatch(name)), None)
            assert wanted is not None, f"{name} is not on the page, under {section}"
            allowed = {base if part.startswith("the ") else part for part in wanted.split(" or ")}
            assert dtype in allowed, f"{name} is saved in {dtype}, the page says {wanted}"
            met.add(dtype)
    assert met
    return met


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("autocast", [True, False])
def test_adapters_are_saved_in_the_documented_dtypes(line, dtype, autocast, tmp_path):
    model = get_peft_model(small(dtype=DTYPES[dtype]), line.config(init_weights=False), autocast_adapter_dtype=autocast)
    model.save_pretrained(tmp_path)
    as_base = not autocast or line.dtype_of_base
    met = check_page("Adapters", tmp_path / "adapter_model.safetensors", dtype if as_base else "float32")
    assert (dtype if as_base else "float32") in met


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["disp", "mixed_rank_in_place"])
def test_reshaped_models_are_saved_in_the_documented_dtypes(name, dtype, tmp_path):
    model = LINES[name].random(small(dtype=DTYPES[dtype])).merge_and_unload()
    model.save_pretrained(tmp_path)
    check_page("Reshaped models", tmp_path / "model.safetensors", dtype)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == DTYPES[dtype]


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_quantised_factors_are_saved_in_the_documented_dtypes(scheme, tmp_path):
    line = LINES["mixed_rank_in_place"]
    model = line.model(quantize_factors=scheme)
    model.save_pretrained(tmp_path)
    check_page("Adapters", tmp_path / "adapter_model.safetensors", "float32")
    model.merge_and_unload().save_pretrained(tmp_path / "model")
    check_page("Reshaped models", tmp_path / "model" / "model.safetensors", "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("storage", ["full", "bfloat16", "int8"])
def test_stored_states_have_the_documented_dtypes(storage, dtype, tmp_path):
    model = LINES["qst"].random(small(dtype=DTYPES[dtype])).train()
    set_hidden_state_cache(model, HiddenStateCacheConfig(str(tmp_path), storage))
    model(input_ids=IDS, labels=IDS, use_cache=False)
    hidden_state_cache(model).close()
    (file,) = tmp_path.rglob("*.safetensors")
    check_page(f"Hidden-state cache, {storage}", file, dtype)


def test_an_adapter_of_a_base_in_4_bits_is_saved_in_float32(tmp_path):
    base = in_nf4(tmp_path / "base")
    model = LINES["qst"].random(base)
    model.save_pretrained(tmp_path)
    assert check_page("Adapters", tmp_path / "adapter_model.safetensors", "float32") == {"float32"}
