"""Sequences of 32,768 tokens: a training step takes memory that grows with their length, and not with its square."""

import pytest
import torch
from peft import get_peft_model

from benchmarks.common.measure import peak_rss, settle_rss
from hf_qst import AdaptiveTemperatureLogitsProcessor, DISPConfig, MixedRankConfig, QSTConfig
from tests.architectures import tiny, token_batch
from tests.plugins.code_tokenizers import tokenizer

TOKENS = 32_768
# A mask of the square of that length takes 1,074 MB in bytes; what is kept of a model 16 wide takes less than this.
MOST = 400 * 10**6

CONFIGS = {
    "qst": lambda ids: QSTConfig(task_type="CAUSAL_LM", r=2, downsample_rank=4, side_every=1),
    "disp": lambda ids: DISPConfig(task_type="CAUSAL_LM", keep_ratio=0.5, start_scores="none"),
    "mixed_rank": lambda ids: MixedRankConfig(
        task_type="CAUSAL_LM", keep_ratio=0.6, calibration_data=[{"input_ids": ids[:, :2048]}], progress=False
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("method", CONFIGS)
def test_a_step_on_a_long_sequence(method):
    ids = token_batch(1, TOKENS)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1 if method != "qst" else 2,
        "head_dim": 16,
    }
    base = tiny("llama", num_attention_heads=1, num_key_value_heads=1, max_position_embeddings=TOKENS, **sizes)
    model = get_peft_model(base, CONFIGS[method](ids)).train()
    before = settle_rss()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert peak_rss() - before < MOST
    assert loss.isfinite()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert gradients and all(g is not None and g.isfinite().all() for g in gradients)


def test_the_processor_reads_a_long_prompt_once_and_then_each_new_token():
    made = tokenizer("newline_merging")
    processor = AdaptiveTemperatureLogitsProcessor(made, block_temperature=0.8, temperature=0.5)
    lines = made.encode("def f(x):\n    if x:\n        return 1\n    return 2\n\n", add_special_tokens=False)
    ids = torch.tensor([(lines * (TOKENS // len(lines) + 1))[:TOKENS]])
    scores = torch.randn(1, 2048)
    for token in lines:
        expected = AdaptiveTemperatureLogitsProcessor(made, block_temperature=0.8, temperature=0.5)(
            ids[:, -600:], scores
        )
        assert torch.equal(processor(ids, scores), expected)
        ids = torch.cat([ids, torch.tensor([[token]])], 1)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_the_processor_takes_a_batch_without_tokens(shape):
    processor = AdaptiveTemperatureLogitsProcessor(tokenizer("newline_merging"), block_temperature=0.8, temperature=0.5)
    scores = torch.randn(shape[0], 2048)
    assert processor(torch.zeros(shape, dtype=torch.long), scores).shape == scores.shape
