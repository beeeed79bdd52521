"""`generate` through a side network: every way of decoding gives what decoding without a cache gives."""

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig, DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, QuantizedLayer

from tests.architectures import CONFIGS, in_nf4, side_network, side_tuned, tiny, token_batch, wake

NAMES = sorted(CONFIGS)
WINDOWED = ["mistral", "gemma2", "gemma3_text"]
LONG = {"max_new_tokens": 10, "min_new_tokens": 10}


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return side_tuned(request.param, awake=True).eval()


@pytest.fixture(scope="module")
def llama():
    return side_tuned("llama", awake=True).eval()


def left_padded():
    ids = token_batch(2, 9)
    ids[0, :4] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def uncached_greedy(model, ids, mask=None, steps=10):
    """Greedy decoding by calling the model on the whole sequence for every token."""
    mask = torch.ones_like(ids) if mask is None else mask
    with torch.no_grad():
        for _ in range(steps):
            # Positions as `generate` makes them, or a model with learned ones would see the padding.
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            extra = {} if model.config.model_type == "opt" else {"position_ids": positions}
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **extra).logits[:, -1]
            logits[:, 2] = -torch.inf  # min_new_tokens forbids the end token
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids


def both(model, inputs, **kwargs):
    results = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        results.append(model.generate(**inputs, use_cache=use_cache, **{**LONG, **kwargs}))
    return results


def test_side_network_changes_what_is_generated(llama):
    ids = token_batch()
    with llama.disable_adapter():
        base = llama.generate(input_ids=ids, **LONG)
    assert not torch.equal(llama.generate(input_ids=ids, **LONG), base)


def test_greedy_equals_repeated_forwards(model):
    ids = token_batch()
    assert torch.equal(model.generate(input_ids=ids, **LONG), uncached_greedy(model, ids))


def test_left_padded_greedy_equals_repeated_forwards(model):
    inputs = left_padded()
    expected = uncached_greedy(model, inputs["input_ids"], inputs["attention_mask"])
    assert torch.equal(model.generate(**inputs, **LONG), expected)


@pytest.mark.parametrize("prompt", ["full", "left_padded"])
def test_beam_search_with_and_without_cache_agree(model, prompt):
    inputs = left_padded() if prompt == "left_padded" else {"input_ids": token_batch()}
    cached, uncached = both(model, inputs, num_beams=4)
    assert torch.equal(cached, uncached)


def test_beam_search_needs_the_side_cache_reordered(monkeypatch):
    """A control: the comparison above notices a side cache that keeps its rows in place."""
    model = side_tuned("llama", awake=True, readout_rank=0).eval()
    original = DynamicCache.reorder_cache

    def base_only(self, beam_idx):
        layers, self.layers = self.layers, self.layers[: len(self.layers) // 2]
        original(self, beam_idx)
        self.layers = layers

    monkeypatch.setattr(DynamicCache, "reorder_cache", base_only)
    cached, uncached = both(model, {"input_ids": token_batch()}, num_beams=4)
    assert not torch.equal(cached, uncached)


def test_sampling_with_a_seed_agrees(llama):
    cached, uncached = both(llama, {"input_ids": token_batch()}, do_sample=True, temperature=0.7)
    assert torch.equal(cached, uncached)


def test_several_sequences_for_each_prompt_agree(llama):
    settings = {"do_sample": True, "num_return_sequences": 3}
    cached, uncached = both(llama, {"input_ids": token_batch()}, **settings)
    assert cached.shape[0] == 6
    assert torch.equal(cached, uncached)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral"])
def test_inputs_embeds_agree_with_their_tokens(name):
    model = side_tuned(name, awake=True).eval()
    ids = token_batch()
    embedded = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **LONG)
    assert torch.equal(embedded, model.generate(input_ids=ids, **LONG)[:, ids.shape[1] :])


def test_prefill_in_two_chunks_equals_one(model):
    ids = token_batch(2, 14)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=True).logits
        first = model(input_ids=ids[:, :9], use_cache=True)
        second = model(input_ids=ids[:, 9:], past_key_values=first.past_key_values, use_cache=True)
    chunked = torch.cat([first.logits, second.logits], 1)
    torch.testing.assert_close(chunked, whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("with_config", [False, True])
def test_continuing_from_a_cache_of_the_caller(llama, with_config):
    ids = token_batch(2, 10)
    cache = DynamicCache(config=llama.config) if with_config else DynamicCache()
    with torch.no_grad():
        llama(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
    continued = llama.generate(input_ids=ids, past_key_values=cache, **LONG)
    assert torch.equal(continued, llama.generate(input_ids=ids, **LONG))


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gemma3_text", "gpt2", "opt"])
@pytest.mark.parametrize("beams", [1, 3])
def test_static_cache_equals_dynamic(name, beams):
    model = side_tuned(name, awake=True).eval()
    for inputs in ({"input_ids": token_batch()}, left_padded()):
        static = model.generate(**inputs, cache_implementation="static", num_beams=beams, **LONG)
        assert torch.equal(static, model.generate(**inputs, num_beams=beams, **LONG))


def test_static_cache_of_the_caller_can_be_reset_and_used_again(llama):
    cache = StaticCache(config=llama.config, max_cache_len=40)
    for seed in (0, 1):
        ids = token_batch(seed=seed)
        cache.reset()
        assert torch.equal(
            llama.generate(input_ids=ids, past_key_values=cache, **LONG), llama.generate(input_ids=ids, **LONG)
        )


@pytest.mark.parametrize("name", ["llama", "mistral", "opt"])
def test_assisted_decoding_equals_greedy(name):
    model = side_tuned(name, awake=True).eval()
    ids = token_batch(1, 12)
    greedy = model.generate(input_ids=ids, **LONG)
    # One assistant that is often right and one that never is: both the kept and the cropped tokens matter.
    for assistant in (tiny(name), tiny(name, seed=3)):
        assert torch.equal(model.generate(input_ids=ids, assistant_model=assistant, **LONG), greedy)


def test_side_tuned_assistant_equals_greedy(llama):
    base = tiny("llama", seed=9)
    ids = token_batch(1, 12)
    assisted = base.generate(input_ids=ids, assistant_model=llama, **LONG)
    assert torch.equal(assisted, base.generate(input_ids=ids, **LONG))


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_prompt_lookup_equals_greedy(name):
    model = side_tuned(name, awake=True).eval()
    ids = token_batch(1, 6).repeat(1, 3)
    lookup = model.generate(input_ids=ids, prompt_lookup_num_tokens=3, **LONG)
    assert torch.equal(lookup, model.generate(input_ids=ids, **LONG))


@pytest.mark.parametrize("name", WINDOWED)
def test_window_is_run_past(name):
    """The window is 8 tokens and the sequence 32, so a cache that forgets to slide or slides twice shows."""
    model = side_tuned(name, awake=True).eval()
    ids = token_batch(2, 20)
    assert model.config.sliding_window == 8
    assert torch.equal(model.generate(input_ids=ids, **LONG), uncached_greedy(model, ids))


def test_cache_has_side_layers_of_the_side_networks_size(llama):
    with torch.no_grad():
        cache = llama(input_ids=token_batch(2, 7), use_cache=True).past_key_values
    spec = side_network(llama).blocks[0].attention.spec
    assert len(cache.layers) == 2 * llama.config.num_hidden_layers
    assert cache.layers[-1].keys.shape == (2, spec.num_kv_heads, 7, spec.head_dim)


@pytest.mark.parametrize("with_config", [False, True])
def test_cache_filled_without_the_adapter_is_refused(llama, with_config):
    ids = token_batch()
    cache = DynamicCache(config=llama.config) if with_config else DynamicCache()
    with torch.no_grad(), llama.disable_adapter():
        llama(input_ids=ids, past_key_values=cache, use_cache=True)
    with torch.no_grad(), pytest.raises(ValueError, match="holds no keys and values of the side network"):
        llama(input_ids=ids, past_key_values=cache, use_cache=True)


def test_cache_filled_with_the_adapter_serves_the_base_afterwards(llama):
    ids = token_batch(2, 10)
    with torch.no_grad():
        cache = llama(input_ids=ids[:, :-1], use_cache=True).past_key_values
        with llama.disable_adapter():
            plain = llama(input_ids=ids, use_cache=False).logits[:, -1]
            continued = llama(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(continued, plain, atol=1e-5, rtol=1e-5)


def test_offloaded_cache_is_refused(llama):
    with pytest.raises(NotImplementedError, match="offloading"):
        llama.generate(input_ids=token_batch(), cache_implementation="offloaded", **LONG)


def test_training_forward_makes_no_cache(llama):
    ids = token_batch()
    llama.train()
    try:
        assert llama(input_ids=ids, labels=ids).past_key_values is None
        assert llama(input_ids=ids).past_key_values is None
    finally:
        llama.eval()


@pytest.mark.slow
def test_compiled_forward_equals_eager():
    torch.compiler.reset()  # a process compiles a function for a limited number of models
    model = wake(side_tuned("llama")).eval()
    ids = token_batch()
    with torch.no_grad():
        eager = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(compiled, eager, atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_compiled_decoding_with_a_static_cache_equals_greedy(name):
    """What `generate` does by itself on a GPU, in one graph."""
    model = side_tuned(name, awake=True).eval()
    ids = token_batch()
    settings = GenerationConfig(
        **LONG, cache_implementation="static", compile_config=CompileConfig(backend="eager", fullgraph=True)
    )
    settings.compile_config._compile_all_devices = True
    counters.clear()
    compiled = model.generate(input_ids=ids, generation_config=settings)
    assert counters["stats"]["unique_graphs"] > 0
    assert torch.equal(compiled, model.generate(input_ids=ids, **LONG))


def test_hidden_states_and_scores_are_returned(llama):
    out = llama.generate(
        input_ids=token_batch(), **LONG, return_dict_in_generate=True, output_hidden_states=True, output_logits=True
    )
    assert len(out.hidden_states) == 10
    head = llama.get_output_embeddings()
    for states, logits in zip(out.hidden_states, out.logits, strict=True):
        torch.testing.assert_close(head(states[-1])[:, -1], logits, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_bfloat16_base_with_a_float32_side_network(cache):
    # Without the readout, which adds a second sum that is rounded to 16 bits: random logits are often nearly equal.
    model = side_tuned(model=tiny("llama", dtype=torch.bfloat16), awake=True, readout_rank=0).eval()
    ids = token_batch()
    cached = model.generate(input_ids=ids, cache_implementation=cache, **LONG)
    assert torch.equal(cached, model.generate(input_ids=ids, use_cache=False, **LONG))


@pytest.mark.parametrize("beams", [1, 3])
def test_nf4_base(beams, tmp_path):
    model = side_tuned(model=in_nf4(tmp_path), awake=True).eval()
    cached, uncached = both(model, left_padded(), num_beams=beams)
    assert torch.equal(cached, uncached)


class UnquantizedLayer(QuantizedLayer):
    """A quantised cache layer without the optional package that quantises."""

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, q_tensor):
        return q_tensor


def test_quantized_cache_of_the_base_has_plain_side_layers(llama):
    ids = token_batch()
    cache = Cache(layers=[UnquantizedLayer(residual_length=4) for _ in range(3)])
    assert torch.equal(llama.generate(input_ids=ids, past_key_values=cache, **LONG), llama.generate(ids, **LONG))
    assert [type(layer) for layer in cache.layers[3:]] == [DynamicLayer] * 3


def test_unknown_kind_of_cache_is_named(llama):
    class StrangeLayer(CacheLayerMixin):
        is_initialized = False

        def __getattr__(self, name):
            raise AssertionError("not read before it is refused")

    StrangeLayer.__abstractmethods__ = frozenset()
    with pytest.raises(NotImplementedError, match="StrangeLayer"):
        llama(input_ids=token_batch(), past_key_values=Cache(layers=[StrangeLayer() for _ in range(3)]))


def test_bare_dynamic_cache_serves_a_windowed_model():
    model = side_tuned("mistral", awake=True).eval()
    ids = token_batch()
    bare = model.generate(input_ids=ids, past_key_values=DynamicCache(), **LONG)
    assert torch.equal(bare, model.generate(input_ids=ids, **LONG))
