"""ShortGPT for the pruning benchmark: whole blocks are removed, those first that change the residual stream's direction least.

Written from the equations of Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
2024 (arXiv 2403.03853), for Llama. The block influence is one minus the mean over tokens of the cosine between the states
before and after the block (equation 1).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from torch import nn
from transformers import LlamaForCausalLM

from hf_qst.calibration import CalibrationRun, calibration_mode, first_input, hooks


def block_influences(model: LlamaForCausalLM, batches: Sequence[Mapping]) -> list[float]:
    """Block influence of each block, in [0, 2]: low where a block hardly turns the states it passes on."""
    names = [f"model.layers.{i}" for i in range(len(model.model.layers))]
    run = CalibrationRun(model, names)
    run.prepare(batches)
    sums, count = dict.fromkeys(names, 0.0), 0

    def collect(name: str):
        def hook(module, args, kwargs, output):
            before, _, _ = run.rows(name, first_input(args, kwargs))
            after, _, _ = run.rows(name, output)
            sums[name] += nn.functional.cosine_similarity(before.double(), after.double(), dim=-1).sum().item()
            if name == names[0]:
                nonlocal count
                count += len(before)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(collect(name), with_kwargs=True) for name in names]
    with hooks(handles), calibration_mode(model):
        for batch in batches:
            run(batch)
    return [1 - sums[name] / count for name in names]


def shortened(model: LlamaForCausalLM, influences: Sequence[float], keep: float) -> LlamaForCausalLM:
    """A copy of the model without the blocks of the lowest influence.

    Args:
        model: a Llama.
        influences: of `block_influences`.
        keep (`float`): the part of the blocks that stays, rounded down.

    Raises:
        ValueError: no block would stay.
    """
    # A budget of 24 blocks must not become 23 by the last digit of a float.
    count = int(keep * len(influences) + 1e-9)
    if count < 1:
        raise ValueError(f"keep must leave at least one of {len(influences)} blocks, got {keep}")
    stay = sorted(sorted(range(len(influences)), key=lambda i: -influences[i])[:count])
    small = copy.deepcopy(model)
    small.model.layers = nn.ModuleList(small.model.layers[i] for i in stay)
    for i, block in enumerate(small.model.layers):
        block.self_attn.layer_idx = i
    small.config.num_hidden_layers = count
    return small
