"""Evaluation of models that predict a number."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from agent.tasks import EvalOutcome, OnStep
from agent.tasks.training import evaluation
from agent.tasks.training.classification import to_tensors
from agent.tasks.training.evaluation import BatchResult
from agent.tasks.training.examples import Batch, BatchesOf, Examples
from protocols.model.weights import Weights
from protocols.tables import evaluation_counts


@torch.inference_mode()
def evaluate_regression(
    forward: Callable[..., Tensor],
    weights: Weights,
    held_out: Examples,
    batch: int,
    scale: float,
    on_step: OnStep,
) -> EvalOutcome:
    """Mean squared error of scaled targets ("loss"), and "mse" and "mae" in the target's units.

    `forward(weights, x)` gives float32[n, 1]; `scale` is that of the targets.
    """
    w = to_tensors(weights, held_out.x.device)

    def measure(rows: Batch) -> BatchResult:
        x, y = rows
        guess = forward(w, x)
        error = (guess - y).double()
        # Without the mean, so that no sum reveals the location of the target.
        in_units = ((t.double().flatten() * scale).tolist() for t in (y, guess))
        told = {"regression": evaluation_counts.sum_regression(*in_units)}
        sums = {"loss": float(error.square().sum()), "mae": float(error.abs().sum())}
        return BatchResult(len(y), sums, told)

    seen, means, told = evaluation.evaluate(BatchesOf(held_out, batch), measure, on_step)
    loss = means["loss"]
    metrics = {"loss": loss, "mse": loss * scale**2, "mae": means["mae"] * scale}
    return EvalOutcome(seen, metrics, told if math.isfinite(loss) else {})
