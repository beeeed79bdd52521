"""Small models with DISP on them, and random masks."""

import torch
from peft import get_peft_model

from hf_qst import DISPConfig
from hf_qst.base_model.decoder_stack import find_decoder_stack
from hf_qst.pruning.layout import SELECTIONS, PruningLayout
from tests.architectures import tiny


def with_disp(name="llama", model=None, awake=False, **settings):
    """A PEFT model with DISP; `awake`: with logits as different as after training."""
    model = get_peft_model(tiny(name) if model is None else model, DISPConfig(**{"task_type": "CAUSAL_LM", **settings}))
    if awake:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in network(model).hypernetwork.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def network(model):
    """The selection network of a model's DISP adapter."""
    return model.base_model.disp_layer.active_network()


def random_masks(model, seed=0):
    """For each block five random selections, of one channel and of all among them."""
    generator = torch.Generator().manual_seed(seed)
    layout = PruningLayout.of(find_decoder_stack(model))
    masks = []
    for layer in range(layout.num_layers):
        chosen = {}
        for i, name in enumerate(SELECTIONS):
            mask = torch.rand(layout.size(name), generator=generator) < 0.3 + 0.12 * i
            mask[layer] = True
            chosen[name] = mask
        masks.append(chosen)
    masks[1]["mlp_in"] = torch.zeros(layout.hidden_size, dtype=torch.bool).index_fill(0, torch.tensor([7]), True)
    masks[2]["attention_out"] = torch.ones(layout.hidden_size, dtype=torch.bool)
    return masks
