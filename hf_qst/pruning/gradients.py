"""Pruning scores from the gradients of the model's loss: one forward and backward pass for each batch."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from hf_qst.calibration import calibration_mode, hooks
from hf_qst.calibration.labels import label_count, labelled_batches, own_loss, same_problem
from hf_qst.pruning.points import selection_points
from hf_qst.pruning.scores import PruningTask, Scores, expert_layers, summed_over_weights


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
    taps, handles, gates = _Taps(), [], []
    for i, block in enumerate(task.stack.blocks):
        points = selection_points(block, task.stack)
        places = Counter(point.selection for point in points)
        gates.append({name: _GateSquares(task.layout.size(name, i), count) for name, count in places.items()})
        for point in points:
            handles.append(point.hook(functools.partial(taps.take, gates[i][point.selection].receive)))
    counted = _back_propagate(task, "fisher", taps, handles)
    return [{name: gate.total / (2 * counted) for name, gate in block.items()} for block in gates]


class _GateSquares:
    """The sum over tokens of (x dL/dx)^2 for the gates [size] of a selection.

    Where a selection acts in several `places`, such as before experts and before a shared one, what they give for a token
    is added up first: the gate is the same. The middles of a token's experts count as different tokens'.
    """

    def __init__(self, size: int, places: int):
        self.total, self.places = torch.zeros(size, dtype=torch.float64), places
        self._rows, self._seen = 0.0, 0

    def receive(self, hidden: torch.Tensor, gradient: torch.Tensor) -> None:
        self._rows = self._rows + (hidden.float() * gradient.float()).flatten(0, -2)
        self._seen += 1
        if self._seen == self.places:
            self.total.add_(self._rows.square().sum(0).cpu())
            self._rows, self._seen = 0.0, 0


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
        names = task.stack.projections(block)
        experts = [path for paths in expert_layers(block, names) for path in paths]
        for path in (*names.paths, *experts):
            handles.append(block.get_submodule(path).register_forward_hook(on_forward((i, path))))
    counted = _back_propagate(task, "taylor", taps, handles)
    return summed_over_weights(
        task, lambda weight, i, path: (weight * gradients[i, path] / counted).abs(), middle_by_readers=False
    )
