"""Many side networks on one pass of the base: each computes what it computes alone."""

import copy

import pytest
import torch
from transformers import DynamicCache

from hf_qst.qst import prefill
from tests.architectures import side_config, side_network, side_tuned, tiny, token_batch, wake

# Different in everything that can differ from one side network to the next.
SETTINGS = {
    "default": {},
    "wide": {"r": 2, "downsample": "linear", "side_every": 2, "readout_rank": 0},
    "pools": {"r": 4, "downsample": "avgpool", "readout_every": 1, "side_heads": "keep", "gate_shape": "vector"},
    "paper": {"downsample": "lora", "mix": "sigmoid", "mix_shape": "vector", "tap_storage": "full"},
}
NAMES = ["wide", "__base__", "default", "wide", "paper", "pools"]
LONG = {"max_new_tokens": 8, "min_new_tokens": 8}


def many(name="llama", settings=SETTINGS, **shared):
    """A tiny base with one adapter for each of `settings`, all of them awake and different."""
    base = shared.pop("model", None) or tiny(name)
    model = None
    for seed, (adapter, own) in enumerate(settings.items()):
        torch.manual_seed(seed)
        if model is None:
            model = side_tuned(model=base, **own, **shared)
        else:
            model.add_adapter(adapter, side_config(**own, **shared))
    return wake(model).eval()


@pytest.fixture(scope="module")
def llama():
    return many()


def padded(rows=6, length=9):
    ids = token_batch(rows, length)
    for row in range(rows):
        ids[row, : row % 4] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def alone(model, name, call):
    """`call()` with one adapter for all rows."""
    before = model.active_adapter
    if name == "__base__":
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    try:
        return call()
    finally:
        model.set_adapter(before)


@torch.no_grad()
def logits(model, **inputs):
    return model(**inputs, use_cache=False).logits


def assert_rows_equal(model, names, inputs, atol=1e-6):
    mixed = logits(model, **inputs, adapter_names=names)
    for row, name in enumerate(names):
        own = {key: value[row : row + 1] for key, value in inputs.items()}
        for expected in (
            alone(model, name, lambda: logits(model, **inputs))[row],
            alone(model, name, lambda own=own: logits(model, **own))[0],
        ):
            scale = expected.abs().max().item()
            torch.testing.assert_close(mixed[row], expected, atol=atol * scale, rtol=0)
    return mixed


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2", "opt", "phi"])
def test_each_row_equals_its_adapter_alone(name):
    model = many(name)
    inputs = padded()
    mixed = assert_rows_equal(model, NAMES, inputs)
    assert not torch.allclose(mixed[0], logits(model, **inputs)[0], atol=1e-2)


def test_one_pass_of_the_base_serves_all_rows(llama):
    calls = []
    block = llama.get_decoder().layers[0]
    handle = block.register_forward_hook(lambda *_: calls.append(1))
    try:
        logits(llama, input_ids=token_batch(6), adapter_names=NAMES)
    finally:
        handle.remove()
    assert len(calls) == 1


def test_one_name_for_all_rows_is_that_adapter(llama):
    inputs = padded()
    for name in ("wide", "__base__"):
        expected = alone(llama, name, lambda: logits(llama, **inputs))
        assert torch.equal(logits(llama, **inputs, adapter_names=[name] * 6), expected)


def test_tails_are_mixed_in_a_batch():
    settings = {"default": {"tail_layers": 1, "tail_rank": 2}, "longer": {"tail_layers": 2}, "none": {}}
    model = many(settings=settings)
    with torch.no_grad():
        for name in ("default", "longer"):
            for update in side_network(model, name).tail.updates.values():
                update.up.weight.normal_(std=0.3)
    assert_rows_equal(model, ["longer", "none", "default", "__base__", "longer", "default"], padded())


def test_a_tail_in_layers_without_rows_is_refused():
    model = many(settings={"default": {"tail_layers": 1}, "none": {}})
    ids = token_batch(2)
    block = model.get_decoder().layers[-1]
    handle = block.mlp.up_proj.register_forward_pre_hook(lambda layer, args: (args[0].flatten(0, 1),))
    with pytest.raises(NotImplementedError, match=r"tail of adapter 'default'.*'2_mlp_up_proj'"):
        logits(model, input_ids=ids, adapter_names=["default", "none"])
    handle.remove()


def generate(model, inputs, **settings):
    torch.manual_seed(5)
    return model.generate(**inputs, **{**LONG, **settings})


@pytest.mark.parametrize(("name", "settings"), [("llama", {}), ("mistral", {}), ("llama", {"num_beams": 3})])
def test_generated_rows_equal_those_of_their_adapters(name, settings):
    model = many(name)
    inputs = padded()
    mixed = generate(model, inputs, adapter_names=NAMES, **settings)
    expected = {name: alone(model, name, lambda: generate(model, inputs, **settings)) for name in set(NAMES)}
    assert len({tuple(rows[0].tolist()) for rows in expected.values()}) > 2
    for row, name in enumerate(NAMES):
        assert torch.equal(mixed[row], expected[name][row]), name


@pytest.mark.parametrize(
    "settings",
    [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"cache_implementation": "static"}],
    ids=["beams", "samples", "static"],
)
def test_generation_with_and_without_a_cache_agree(llama, settings):
    inputs = padded()
    cached = generate(llama, inputs, adapter_names=NAMES, **settings)
    settings.pop("cache_implementation", None)
    assert torch.equal(cached, generate(llama, inputs, adapter_names=NAMES, use_cache=False, **settings))


def test_a_cache_can_be_selected_from_and_repeated(llama):
    ids = token_batch(6, 10)
    with torch.no_grad():
        cache = llama(input_ids=ids[:, :9], adapter_names=NAMES, use_cache=True).past_key_values
        kept = [5, 3, 0]
        cache.batch_select_indices(torch.tensor(kept))
        cache.batch_repeat_interleave(2)
        rows = [row for row in kept for _ in range(2)]
        names = [NAMES[row] for row in rows]
        last = llama(input_ids=ids[rows, 9:], adapter_names=names, past_key_values=cache).logits[:, -1]
    expected = logits(llama, input_ids=ids, adapter_names=NAMES)[rows, -1]
    torch.testing.assert_close(last, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("other", [["wide"] * 2, ["default", "wide"], ["wide", "__base__"]])
def test_a_cache_of_other_rows_is_refused(llama, other):
    ids = token_batch(2, 6)
    with torch.no_grad():
        cache = llama(input_ids=ids, adapter_names=["wide", "default"], use_cache=True).past_key_values
        for use in (copy.deepcopy(cache), cache):
            with pytest.raises(ValueError, match="holds no keys and values of the side network"):
                llama(input_ids=ids[:, :1], adapter_names=other, past_key_values=use)


def test_a_cache_of_another_adapter_of_the_same_shape_is_refused():
    model = many(settings={"default": {}, "twin": {}})
    with torch.no_grad():
        cache = model(input_ids=token_batch(), use_cache=True).past_key_values
        model.set_adapter("twin")
        with pytest.raises(ValueError, match="without the QST adapter 'twin'"):
            model(input_ids=token_batch(2, 1), past_key_values=cache)


def test_heads_of_their_own_are_mixed_too():
    """`modules_to_save`: rows of an adapter without a head of its own have the base's, whichever adapter is active."""
    model = side_tuned("llama", modules_to_save=["lm_head"])
    model.add_adapter("none", side_config())
    model.add_adapter("second", side_config(modules_to_save=["lm_head"]))
    with torch.no_grad():
        for head in model.get_output_embeddings().modules_to_save.values():
            head.weight.normal_(std=0.1)
    names = ["second", "none", "default", "__base__", "default"]
    for active in ("default", "none"):
        wake(model).eval().set_adapter(active)
        assert_rows_equal(model, names, padded(5))


def test_a_classifiers_rows_have_their_own_heads():
    model = side_tuned("llama", task_type="SEQ_CLS")
    model.add_adapter("second", side_config(task_type="SEQ_CLS"))
    with torch.no_grad():
        for head in model.base_model.model.score.modules_to_save.values():
            head.weight.normal_(std=0.1)
    assert_rows_equal(wake(model).eval(), ["second", "default", "second", "__base__"], {"input_ids": token_batch(4)})


def test_bad_adapter_names_are_refused_in_pefts_words(llama):
    ids = token_batch(2)
    for call in (llama, llama.generate):
        with pytest.raises(ValueError, match=r"non-existing adapter.s.: nobody, nothing"):
            call(input_ids=ids, adapter_names=["nothing", "nobody"])
        with pytest.raises(ValueError, match="should be the same as the number of inputs, but got 1 and 2"):
            call(input_ids=ids, adapter_names=["wide"])
        with pytest.raises(TypeError, match="expected a list of str"):
            call(input_ids=ids, adapter_names="wide")
    llama.train()
    try:
        with pytest.raises(ValueError, match="when the model is in training mode"):
            llama(input_ids=ids, adapter_names=["wide", "wide"])
    finally:
        llama.eval()
    layer = next(m for m in llama.modules() if hasattr(m, "requested"))
    assert layer.requested.current is None and torch.isfinite(logits(llama, input_ids=ids)).all()


def test_a_mask_without_rows_is_refused(llama):
    layer = next(m for m in llama.modules() if hasattr(m, "requested"))
    block = layer.base_layer.layers[0]
    handle = block.register_forward_pre_hook(
        lambda block, args, kwargs: (args, {**kwargs, "position_ids": torch.zeros(3, 2, 4)}), with_kwargs=True
    )
    with pytest.raises(NotImplementedError, match=r"position_ids as \[3, 2, 4\]"):
        logits(llama, input_ids=token_batch(2, 4), adapter_names=["wide", "default"])
    handle.remove()


def test_a_disabled_model_ignores_adapter_names(llama):
    ids = token_batch(2)
    with llama.disable_adapter():
        expected = logits(llama, input_ids=ids)
        assert torch.equal(logits(llama, input_ids=ids, adapter_names=["wide", "default"]), expected)


# A prompt for several adapters


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_a_prompt_is_prefilled_once_and_continued_under_each_adapter(name):
    model = many(name)
    inputs = padded(3, 12)
    start = {key: value[:, :10] for key, value in inputs.items()}
    adapters = ["wide", "default", "pools"]
    prompt = prefill(model, adapters, **start)
    for name in (*adapters, "__base__", "wide"):
        continued = alone(model, name, lambda n=name: generate(model, inputs, past_key_values=prompt.cache(n)))
        assert torch.equal(continued, alone(model, name, lambda: generate(model, inputs))), name
    names = ["pools", "__base__", "wide"]
    mixed = generate(model, inputs, adapter_names=names, past_key_values=prompt.cache(names))
    assert torch.equal(mixed, generate(model, inputs, adapter_names=names))


def test_one_prompt_is_continued_by_rows_of_many_adapters(llama):
    start, ends = token_batch(1, 10), token_batch(6, 3, seed=1)
    ids = torch.cat([start.expand(6, -1), ends], 1)
    prompt = prefill(llama, ["wide", "default", "pools", "paper"], input_ids=start)
    for names in (NAMES, ["wide"] * 6):
        continued = llama.generate(input_ids=ids, adapter_names=names, past_key_values=prompt.cache(names), **LONG)
        assert torch.equal(continued, llama.generate(input_ids=ids, adapter_names=names, **LONG))


def test_prefill_refuses_what_it_cannot_share(llama):
    ids = token_batch(1)
    with pytest.raises(ValueError, match="adapters must be names of the model's, 'default', 'wide'"):
        prefill(llama, ["wide", "nobody"], input_ids=ids)
    with pytest.raises(ValueError, match=r"got \['__base__'\]"):
        prefill(llama, ["__base__"], input_ids=ids)
    with pytest.raises(ValueError, match=r"among those of prefill.., 'wide', '__base__', got 'default'"):
        prefill(llama, ["wide"], input_ids=ids).cache(["wide", "default"])
    with pytest.raises(ValueError, match="got 3 and 2 respectively"):
        prefill(llama, ["wide", "default"], input_ids=token_batch(2)).cache(["wide", "default", "wide"])
    with pytest.raises(ValueError, match="in evaluation mode, got LlamaForCausalLM"):
        prefill(tiny("llama"), ["wide"], input_ids=ids)
    with llama.disable_adapter(), pytest.raises(ValueError, match="not disabled"):
        prefill(llama, ["wide"], input_ids=ids)
    tailed = many(settings={"default": {"tail_layers": 1}, "none": {}})
    with pytest.raises(ValueError, match=r"'default' has a tail .* keys and values in these blocks"):
        prefill(tailed, ["none", "default"], input_ids=ids)


# Ensembles


def test_active_adapters_are_averaged(llama):
    inputs = padded()
    names = ["wide", "default", "paper"]
    expected = torch.stack([alone(llama, name, lambda: logits(llama, **inputs)) for name in names]).mean(0)
    llama.base_model.set_adapter(names)
    try:
        torch.testing.assert_close(logits(llama, **inputs), expected, atol=1e-5, rtol=1e-5)
        cached = generate(llama, inputs)
        assert torch.equal(cached, generate(llama, inputs, use_cache=False))
        assert torch.equal(cached, generate(llama, inputs, past_key_values=DynamicCache()))
        assert not torch.equal(cached, alone(llama, "default", lambda: generate(llama, inputs)))
    finally:
        llama.set_adapter("default")


def test_an_average_trains_all_its_networks():
    model = many()
    model.base_model.set_adapter(["default", "wide"])
    ids = token_batch()
    loss = model.train()(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(loss, model.eval()(input_ids=ids, labels=ids).loss, atol=1e-5, rtol=1e-5)
    loss.backward()
    for name in ("default", "wide"):
        assert all(p.grad is not None for p in side_network(model, name).parameters()), name
    assert all(p.grad is None for p in side_network(model, "pools").parameters())


def test_one_network_of_an_average_may_want_full_logits():
    model = many(settings={"default": {}, "full": {"chunked_loss": False}}).train()
    ids = token_batch()
    assert model(input_ids=ids, labels=ids).logits is None
    model.base_model.set_adapter(["default", "full"])
    assert model(input_ids=ids, labels=ids).logits is not None


def test_a_tail_has_no_part_in_an_average():
    model = many(settings={"default": {}, "tailed": {"tail_layers": 1}})
    model.base_model.set_adapter(["default", "tailed"])
    with pytest.raises(
        ValueError, match=r"'tailed' has a tail .*from number 2 on, so 'default', 'tailed' cannot share"
    ):
        logits(model, input_ids=token_batch())


def test_weights_are_averaged_into_a_new_adapter(tmp_path):
    model = many(settings={"default": {}, "twin": {}, "wide": {"r": 2}})
    model.add_weighted_adapter(["default", "twin"], [0.25, 0.75], "soup")
    state = {name: side_network(model, name).state_dict() for name in ("default", "twin", "soup")}
    for key, value in state["soup"].items():
        expected = 0.25 * state["default"][key] + 0.75 * state["twin"][key]
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-6, msg=key)
    assert model.active_adapters == ["default"]
    model.set_adapter("soup")
    model.save_pretrained(tmp_path, selected_adapters=["soup"])
    assert (tmp_path / "soup" / "adapter_model.safetensors").exists()


def test_averages_of_weights_that_mean_nothing_are_refused():
    settings = {"default": {}, "twin": {}, "wide": {"r": 2}, "p1": {"downsample": "principal"}}
    model = many(settings={**settings, "p2": {"downsample": "principal"}, "head": {"modules_to_save": ["lm_head"]}})
    names = list(model.peft_config)

    def refuse(match, adapters=("default", "twin"), weights=(0.5, 0.5), **more):
        with pytest.raises(ValueError, match=match):
            model.add_weighted_adapter(list(adapters), list(weights), "soup", **more)
        assert list(model.peft_config) == names

    refuse("combination_type must be 'linear' for QST, got 'svd'", combination_type="svd")
    refuse("adapters must be among 'default', .* got 'nobody'", ["default", "nobody"])
    refuse("with a sum of 1, got", weights=[0.5, 0.6])
    refuse("one number for each of 2 adapters", weights=[1.0])
    refuse("'default' and 'wide' differ in shape .*: their weights cannot be averaged", ["default", "wide"])
    refuse("differ in 'downsample.0.directions', which was fitted", ["p1", "p2"])
    refuse("'head' has modules_to_save", ["default", "head"])
