"""A side network sees no later token, in any type of model."""

import torch
from peft import get_peft_model

from tests.architectures import side_config, token_batch, wake
from tests.hf_qst.qst.test_hidden_state_cache_types import each
from tests.tiny_decoders import tiny_decoder


@each
@torch.no_grad()
def test_a_later_token_changes_no_earlier_logits(name):
    model = wake(get_peft_model(tiny_decoder(name), side_config())).eval()
    ids = token_batch(2, 10)
    other = ids.clone()
    other[:, 7] = (other[:, 7] + 1) % 90 + 3
    got, changed = (model(input_ids=tokens, use_cache=False).logits for tokens in (ids, other))
    torch.testing.assert_close(changed[:, :7], got[:, :7], atol=1e-4 * got.abs().max().item(), rtol=1e-4)
    assert (changed[:, 7] - got[:, 7]).abs().max() > 1e-3
