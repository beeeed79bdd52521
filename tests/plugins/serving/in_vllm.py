"""Engines of vLLM on tiny models, and what they say beside transformers."""

import gc

import pytest
import torch
import vllm

HEADS = {"head_dim": 32, "hidden_size": 128}  # vLLM's attention on a CPU has heads of 32 channels and more
PROMPTS = [[5, 6, 7], [9, 8] * 6, list(range(3, 40)), [90, 3], [17] * 5]


def engine(folder, **options):
    """vLLM in this process, with fewer rows than there are prompts."""
    settings = {"dtype": "float32", "max_model_len": 64, "enforce_eager": True, "kv_cache_memory_bytes": 2**26}
    return vllm.LLM(str(folder), skip_tokenizer_init=True, max_num_seqs=3, **{**settings, **options})


def require_same(folder, model, **options):
    """Greedy requests draw the tokens of `model` with the same probabilities; returns the class of vLLM's model."""
    served = engine(folder, **options)
    (kind,) = served.apply_model(type)
    parameters = vllm.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, detokenize=False, logprobs=5)
    outputs = served.generate([{"prompt_token_ids": ids} for ids in PROMPTS], parameters, use_tqdm=False)
    different = set()
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        drawn = output.outputs[0]
        ids = torch.tensor([[*prompt, *drawn.token_ids]])
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        assert list(drawn.token_ids) == expected.argmax(-1).tolist()
        different.update(drawn.token_ids)
        for row, found in zip(expected, drawn.logprobs, strict=True):
            for token, entry in found.items():
                # Sums in another order: 2e-6 was seen.
                assert entry.logprob == pytest.approx(row[token].item(), abs=1e-4)
    assert len(different) > 2
    del served
    gc.collect()
    return kind
