"""Loss curves of the side-tuning benchmark: held-out loss against steps and against training seconds."""

from __future__ import annotations

import time
from itertools import pairwise

import torch
from tqdm.auto import tqdm

from benchmarks.side_tuning.methods import Run

# Checkpointed QLoRA has QLoRA's losses; the demo's setting of QST is shown with the default.
CURVES = ("qst", "qst-r2", "qlora", "shadow")
WARMUP_STEPS = 10
SWEEP = {
    "qst": (2e-3, 4e-3, 8e-3, 1.6e-2),
    "qst-r2": (5e-4, 1e-3, 2e-3, 4e-3),
    "qlora": (1e-3, 2e-3, 4e-3, 8e-3),
    "shadow": (1e-3, 2e-3, 4e-3, 8e-3),
}


class Curve:
    """A method in training: (step, training seconds, held-out loss) as it goes. Seconds are of its own steps alone."""

    def __init__(self, run: Run):
        self.run = run
        self.steps = 0
        self.seconds = 0.0
        self.points: list[tuple[int, float, float]] = []

    def step(self, rows: torch.Tensor, batch: int) -> None:
        start = self.steps * batch % (len(rows) - batch + 1)
        ids = rows[start : start + batch].to(self.run.device)
        begin = time.perf_counter()
        # The rate rises over the first steps and stays: a decay would tie the curve to one length.
        self.run.step(ids, min(1.0, (self.steps + 1) / WARMUP_STEPS))
        self.seconds += time.perf_counter() - begin
        self.steps += 1

    def measure(self, held_out: torch.Tensor) -> None:
        if not self.points or self.points[-1][0] != self.steps:
            self.points.append((self.steps, self.seconds, self.run.held_out_loss(held_out)))


def at_seconds(points: list[tuple[int, float, float]], seconds: float) -> float | None:
    """Loss at `seconds`, on the straight line between the two points measured around it; None outside the curve."""
    for (_, before, first), (_, after, second) in pairwise(points):
        if before <= seconds <= after:
            share = (seconds - before) / (after - before) if after > before else 1.0
            return first + share * (second - first)
    return None


def train_curves(runs: dict[str, Run], text, batch: int, steps: int, every: int) -> dict[str, Curve]:
    """Train every run for `steps` steps on the same batches, one step of each in turn; then those that took less time
    than the slowest go on until they have had as much."""
    curves = {name: Curve(run) for name, run in runs.items()}
    for curve in curves.values():
        curve.measure(text.held_out)
    with tqdm(total=steps * len(runs), desc="loss curves", unit="step") as bar:
        for step in range(1, steps + 1):
            for curve in curves.values():
                curve.step(text.train, batch)
                bar.update()
                if step % every == 0 or step == steps:
                    curve.measure(text.held_out)
        slowest = max(curve.seconds for curve in curves.values())
        for curve in curves.values():
            while curve.seconds < slowest:
                curve.step(text.train, batch)
                bar.update()
                bar.total = max(bar.total, bar.n)
                if curve.steps % every == 0:
                    curve.measure(text.held_out)
            curve.measure(text.held_out)
    return curves


def loss_results(curves: dict[str, Curve], steps: int) -> dict:
    """Loss at equal steps, and at equal seconds for two budgets: what the first and the last method needed for them."""
    at_steps = {
        name: next((seconds, loss) for step, seconds, loss in curve.points if step == steps)
        for name, curve in curves.items()
    }
    budgets = {name: seconds for name, (seconds, _) in at_steps.items()}
    fastest, slowest = min(budgets, key=budgets.get), max(budgets, key=budgets.get)
    return {
        "rule": "straight line over training seconds between the measured points; evaluation not counted",
        "steps": steps,
        "start": {name: curve.points[0][2] for name, curve in curves.items()},
        "at_equal_steps": {name: loss for name, (_, loss) in at_steps.items()},
        "seconds_for_steps": budgets,
        "at_equal_seconds": {
            f"as {who} for {steps} steps": {
                "seconds": budgets[who],
                **{name: at_seconds(curve.points, budgets[who]) for name, curve in curves.items()},
            }
            for who in dict.fromkeys((fastest, "qlora" if "qlora" in budgets else slowest, slowest))
        },
        "points": {name: curve.points for name, curve in curves.items()},
        "learning_rates": {name: curve.run.lr for name, curve in curves.items()},
    }


def sweep(make_run, names: list[str], text, batch: int, steps: int) -> dict:
    """Held-out loss after `steps` steps for each learning rate of `SWEEP`, and the best.

    Args:
        make_run: (method's name, learning rate) -> `Run`.
    """
    results = {}
    for name in names:
        losses = {}
        for lr in tqdm(SWEEP[name], desc=f"learning rates of {name}", unit="run"):
            curve = Curve(make_run(name, lr))
            for _ in range(steps):
                curve.step(text.train, batch)
            losses[lr] = curve.run.held_out_loss(text.held_out)
        finite = {lr: loss for lr, loss in losses.items() if loss == loss}
        results[name] = {"losses": losses, "best": min(finite, key=finite.get) if finite else None}
        tqdm.write(f"{name}: " + ", ".join(f"{lr:g}: {loss:.4f}" for lr, loss in losses.items()))
    return {"steps": steps, "warmup_steps": WARMUP_STEPS, "methods": results}
