"""Pruning scores from the gradients of the model's loss: one forward and backward pass for each batch."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from hf_qst.calibration import calibration_mode, hooks
from hf_qst.calibration.labels import label_count, labelled_batches, own_loss, same_problem
from hf_qst.pruning.points import selection_points
from hf_qst.pruning.scores import PruningTask, Scores, summed_over_weights


class _Taps:
    """Hidden states [batch, ..., channels] in the order of the forward pass, each with who asks for its gradient."""

    def __init__(self):
        self.taken: list[tuple[Callable, torch.Tensor]] = []

    def take(self, receive: Callable, hidden: torch.Tensor) -> torch.Tensor:
        """`hidden` with a graph; `receive(values, gradient)` is called once its gradient is known."""
        # Behind frozen weights it has none; from here on there is one. A view, because parallel branches read one tensor.
        hidden = hidden.view_as(hidden) if hidden.requires_grad else hidden.detach().requires_grad_()
        self.taken.append((receive, hidden))
        return hidden

    def back_propagate(self, loss: torch.Tensor) -> None:
        """Hand out the gradients of the loss; those of parameters are neither computed nor touched."""
        taken, self.taken = self.taken, []
        gradients = torch.autograd.grad(loss, [hidden for _, hidden in taken])
        for (receive, hidden), gradient in zip(taken, gradients, strict=True):
            receive(hidden.detach(), gradient)


def _back_propagate(task: PruningTask, method: str, taps: _Taps, handles: list) -> int:
    """Run every batch forward and backward with these hooks, which call `taps.take`. Returns the number of labels.

    The loss is summed over the labels and not averaged over a batch, so that every token counts the same.
    """
    user, counted = f"method {method!r}", 0
    labelled = labelled_batches(task.model, task.calibration_data, user)
    with hooks(handles), calibration_mode(task.model), torch.enable_grad(), same_problem(task.model):
        for index, batch in tqdm(labelled, desc=f"{method} scores", unit="batch", leave=False):
            loss = own_loss(task.model, batch, index, user)
            labels = label_count(task.model, batch)
            taps.back_propagate(loss * labels)
            counted += labels
    return counted


def fisher_scores(task: PruningTask) -> Scores:
    """The loss that is lost with a channel, to second order, in nats per label.

    A gate s_c multiplies channel c where its selection acts. The loss's curvature in the gate is taken to be its Fisher
    information, the mean over tokens of (x_c dL/dx_c)^2, half of which removing the channel costs: LeCun et al.,
    "Optimal Brain Damage", 1989, for gates as in Molchanov et al., "Importance Estimation for Neural Network Pruning",
    CVPR 2019, equation 10. All selections have one unit, so they compete by loss for each weight.
    """
    taps, handles = _Taps(), []
    sums = [
        {name: torch.zeros(task.layout.size(name, i), dtype=torch.float64) for name in task.layout.blocks[i].prunable}
        for i in range(task.layout.num_layers)
    ]

    def receiver(total: torch.Tensor) -> Callable:
        def receive(hidden: torch.Tensor, gradient: torch.Tensor) -> None:
            total.add_((hidden.float() * gradient.float()).square().flatten(0, -2).sum(0).cpu())

        return receive

    for block, total in zip(task.stack.blocks, sums, strict=True):
        for point in selection_points(block, task.stack):
            handles.append(point.hook(functools.partial(taps.take, receiver(total[point.selection]))))
    counted = _back_propagate(task, "fisher", taps, handles)
    return [{name: total / (2 * counted) for name, total in block.items()} for block in sums]


def taylor_scores(task: PruningTask) -> Scores:
    """|W_ij dL/dW_ij|, summed over the weights that go with a channel.

    Ma, Fang, Wang, "LLM-Pruner: On the Structural Pruning of Large Language Models", NeurIPS 2023, equation 4 without its
    second-order term, with the sum as the aggregation over a group. Their groups of heads are none of the five selections.
    """
    taps, handles, gradients = _Taps(), [], {}

    def on_forward(key: tuple[int, str]) -> Callable:
        def hook(module, args, output):
            rows = args[0].detach().flatten(0, -2)

            def receive(_, gradient: torch.Tensor) -> None:
                product = rows.float().T @ gradient.flatten(0, -2).float()
                gradients[key] = gradients[key].add_(product) if key in gradients else product

            return taps.take(receive, output)

        return hook

    for i, block in enumerate(task.stack.blocks):
        for path in task.stack.projections(block).paths:
            handles.append(block.get_submodule(path).register_forward_hook(on_forward((i, path))))
    counted = _back_propagate(task, "taylor", taps, handles)
    return summed_over_weights(
        task, lambda weight, i, path: (weight * gradients[i, path] / counted).abs(), middle_by_readers=False
    )
