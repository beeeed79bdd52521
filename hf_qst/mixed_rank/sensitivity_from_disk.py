"""Fisher weights of a model whose weights are on disk: the backward pass, too, goes block by block.

The states that enter each block are written to files on the way forward. On the way back a block runs again, with gradients,
from the state of its file; the gradient that leaves it is what the block before it needs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from hf_qst.base_model.disk_weights import DiskWeights, present
from hf_qst.calibration import CalibrationError, calibration_mode
from hf_qst.calibration.labels import are_own_labels, label_count, labelled_batches, own_loss, same_problem
from hf_qst.mixed_rank.block_walk import BlockWalk, by_blocks
from hf_qst.mixed_rank.calibration_set import CalibrationSet
from hf_qst.mixed_rank.sensitivity import USER, add_energies, outputs_of, relative_weights

# Of a row, whose scores are in memory at a time.
_TOKENS = 128


def fisher_weights_from_disk(
    on_disk: DiskWeights, energies: Mapping[str, float], calibration: CalibrationSet
) -> dict[str, float]:
    """The weights of `fisher_weights`, with one block in memory at a time.

    Args:
        on_disk: where the weights come from; the states of all tokens are written to its scratch folder once for each block.
        energies: as of `fisher_weights`; all layers lie in the decoder's blocks.
        calibration: as of `fisher_weights`; its runs, which the first stage has prepared, are used again.

    Raises:
        CalibrationError: there are no labels, or the loss is not finite or depends on none of the layers.
    """
    model, gradients, batches = on_disk.model, dict.fromkeys(energies, 0.0), calibration.batches
    if not are_own_labels(model, batches):
        raise CalibrationError(
            f"{USER} from disk needs batches of text, with input_ids, attention_mask and labels at most, got batches of "
            f"{', '.join(sorted(set().union(*batches)))}"
        )
    ((blocks, _),) = by_blocks(model, [(name,) for name in energies])
    labelled = labelled_batches(model, batches, USER)
    with calibration_mode(model), same_problem(model):
        walk = calibration.walk_of(calibration.run_of(model, energies), blocks)
        calls, states = walk.start([batch for _, batch in labelled])
        files = [os.path.join(on_disk.scratch, f"states-{i:05}.safetensors") for i in range(len(walk.layers))]
        bar = tqdm(total=2 * len(files), desc="sensitivity", unit="block", disable=not calibration.progress)
        for i, layer in enumerate(walk.layers):
            save_file({str(number): state.contiguous() for number, state in enumerate(states)}, files[i])
            with present(layer):
                states = [call[i](layer, state) for call, state in zip(calls, states, strict=True)]
            bar.update()
        with torch.enable_grad():
            flowing = [
                _loss_gradient(walk, batch, index, state)
                for (index, batch), state in zip(labelled, states, strict=True)
            ]
            for i, layer in reversed(list(enumerate(walk.layers))):
                own, entering = [name for name in energies if name.startswith(walk.paths[i])], load_file(files[i])
                with present(layer), outputs_of(model, own) as outputs:
                    for number, call in enumerate(calls):
                        outputs.clear()
                        state = entering[str(number)].to(flowing[number].device).requires_grad_()
                        leaving = call[i](layer, state)
                        wanted = [state, *(output for _, output in outputs)]
                        flowing[number], *found = torch.autograd.grad(
                            leaving, wanted, flowing[number], allow_unused=True
                        )
                        add_energies(gradients, outputs, found)
                os.remove(files[i])
                bar.update()
        bar.close()
    return relative_weights(model, gradients, energies)


def _loss_gradient(walk: BlockWalk, batch: Mapping, index: int, state: torch.Tensor) -> torch.Tensor:
    """The gradient of the model's loss at the state [rows, tokens, d] that leaves the last block.

    The loss is the mean over all tokens that are predicted, and is taken of some at a time: the scores of a large vocabulary
    take more memory than a block.
    """
    model, gradient, predicted = walk.run.model, torch.zeros_like(state), label_count(walk.run.model, batch)
    for start in range(0, state.shape[1] - 1, _TOKENS):
        here = slice(start, start + _TOKENS + 1)
        part = {name: value[:, here] for name, value in batch.items()}
        if not (count := label_count(model, part)):
            continue
        own = state[:, here].detach().requires_grad_()
        with walk.ending_in(own):
            loss = own_loss(model, part, index, USER)
        gradient[:, here] += torch.autograd.grad(loss, own)[0] * (count / predicted)
    return gradient
