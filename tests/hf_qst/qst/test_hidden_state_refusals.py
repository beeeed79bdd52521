"""Where stored states would be wrong, the error says why."""

import pytest
import torch
from transformers import BitsAndBytesConfig

from hf_qst import QSTConfig
from hf_qst.errors import HiddenStateCacheError
from hf_qst.qst import HiddenStateCacheConfig, fill_hidden_state_cache, hidden_state_cache, set_hidden_state_cache
from tests.architectures import side_tuned, tiny, token_batch

IDS = token_batch(rows=2, length=12)


def refuses(match):
    return pytest.raises(HiddenStateCacheError, match=match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, r"'dynamic' .* longest row"),
        ({"rope_parameters": {"global": {"rope_type": "longrope"}}}, r"'longrope' .* longest row"),
        ({"expert_capacity": 8}, r"limited capacity \(expert_capacity\)"),
        ({"capacity_factor": 1.25}, r"limited capacity \(capacity_factor\)"),
    ],
)
def test_a_base_whose_rows_depend_on_each_other(tmp_path, changes, match):
    base = tiny("llama")
    for name, value in changes.items():
        setattr(base.config, name, value)
    with refuses(match):
        side_tuned(model=base, hidden_state_cache=str(tmp_path))
    assert not any("qst" in name for name, _ in base.named_parameters())
    model = side_tuned(model=base)
    with refuses(match):
        set_hidden_state_cache(model, tmp_path)


def test_8_bit_weights_with_outliers_of_a_batch(tmp_path):
    base = tiny("llama")
    base.config.quantization_config = BitsAndBytesConfig(load_in_8bit=True)
    with refuses("outlier channels over a whole batch"):
        side_tuned(model=base, hidden_state_cache=str(tmp_path))


@pytest.fixture
def model(tmp_path):
    return side_tuned("llama", hidden_state_cache=str(tmp_path)).train()


def test_noise_on_the_embeddings(model):
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    with refuses(r"NEFTune \(neftune_noise_alpha=5.0\)"):
        model(input_ids=IDS, labels=IDS)
    model.eval()(input_ids=IDS, use_cache=False)  # without noise


def test_dropout_in_the_base(model):
    model.get_base_model().model.base_layer.layers[1].self_attn.train()
    with refuses(r"layers\.1\.self_attn of the base is in training mode"):
        model(input_ids=IDS, labels=IDS)


def test_a_base_that_is_trained(model):
    model(input_ids=IDS, labels=IDS)
    model.get_base_model().model.base_layer.layers[1].mlp.up_proj.weight.requires_grad_()
    with refuses(r"the base is trained: 'layers.1.mlp.up_proj.weight'"):
        model(input_ids=IDS, labels=IDS)


def test_embeddings_in_the_place_of_tokens(model):
    with refuses("inputs_embeds"):
        model(inputs_embeds=torch.randn(2, 12, 64))


@pytest.mark.parametrize(
    ("inputs", "match"),
    [
        (
            {"attention_mask": torch.ones(2, 1, 12, 12, dtype=torch.bool)},
            r"attention_mask as a tensor \[batch, seq\], got shape",
        ),
        ({"attention_mask": torch.ones(2, 13)}, r"attention_mask of the shape of input_ids \[2, 12\], got \[2, 13\]"),
        ({"position_ids": torch.arange(12)}, r"position_ids as a tensor \[batch, seq\], got shape \[12\]"),
        ({"token_type_ids": torch.zeros(2, 12)}, r"argument 'token_type_ids' \(Tensor\)"),
    ],
)
def test_inputs_that_no_key_describes(model, inputs, match):
    with refuses(match):
        model(input_ids=IDS, **inputs)


@pytest.mark.parametrize("chunked", [True, False])
def test_labels_of_padding(tmp_path, chunked):
    model = side_tuned("llama", hidden_state_cache=str(tmp_path), chunked_loss=chunked).train()
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    expected = side_tuned("llama")(input_ids=IDS, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(model(input_ids=IDS, attention_mask=mask, labels=labels).loss, expected)
    labels[1, 9] = 2  # predicted at the last token
    model(input_ids=IDS, attention_mask=mask, labels=labels)
    labels[1, 10] = 2
    with refuses("labels at padded positions"):
        model(input_ids=IDS, attention_mask=mask, labels=labels)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    with refuses("labels at padded positions"):
        model(input_ids=IDS, attention_mask=mask, labels=labels.clamp(max=-100), shift_labels=shifted)
    set_hidden_state_cache(model, None)
    model(input_ids=IDS, attention_mask=mask, labels=labels)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"folder": 3}, r"HiddenStateCacheConfig.folder must be the path of a folder, got 3"),
        ({"folder": ""}, r"folder must be the path of a folder, got ''"),
        ({"folder": "f", "storage": "int4"}, r"storage must be one of full, bfloat16, int8, got 'int4'"),
        ({"folder": "f", "size_limit": 0}, r"size_limit must be a number of bytes >= 1 or None, got 0"),
        ({"folder": "f", "size_limit": "8GB"}, r"size_limit must be .* got '8GB'"),
    ],
)
def test_configurations(arguments, match):
    with pytest.raises(ValueError, match=match):
        HiddenStateCacheConfig(**arguments)
    if "storage" not in arguments and "size_limit" not in arguments:
        with pytest.raises(
            ValueError, match=r"QSTConfig.hidden_state_cache must be the path of a folder, .* got (3|'')"
        ):
            QSTConfig(hidden_state_cache=arguments["folder"])


def test_filling_a_model_without_a_cache(tmp_path):
    with refuses("has no cache"):
        fill_hidden_state_cache(side_tuned("llama"), [{"input_ids": IDS}])
    with pytest.raises(ValueError, match="belongs to a model with a QST adapter, got LlamaForCausalLM"):
        hidden_state_cache(tiny("llama"))
    model = side_tuned("llama")
    with model.disable_adapter(), pytest.raises(ValueError, match="no active side network"):
        set_hidden_state_cache(model, tmp_path)
    with refuses("inputs_embeds"):
        fill_hidden_state_cache(
            side_tuned("llama", hidden_state_cache=str(tmp_path)), [{"inputs_embeds": torch.randn(2, 12, 64)}]
        )
