"""Evaluation and prediction of classifiers in torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.tasks import EvalOutcome, OnStep
from agent.tasks.training import evaluation
from agent.tasks.training.evaluation import BatchResult
from agent.tasks.training.examples import Batch, BatchesOf, Source
from agent.tasks.training.loop_state import Tensors
from protocols.model.weights import Array
from protocols.tables import evaluation_counts


@torch.inference_mode()
def evaluate_classifier(
    logits_of: Callable[[Tensors, Any], Tensor],
    weights: Mapping[str, Array],
    held_out: Source,
    batch: int,
    on_step: OnStep,
) -> EvalOutcome:
    """Mean cross-entropy ("loss") and "accuracy" on held-out examples; confusion and calibration.

    `logits_of(weights, x)` gives float32[n, classes].
    """
    tensors = to_tensors(weights, held_out.device)

    def measure(rows: Batch) -> BatchResult:
        x, y = rows
        logits = logits_of(tensors, x)
        loss = float(F.cross_entropy(logits, y, reduction="sum"))
        right, told = count_answers(logits, y)
        return BatchResult(len(y), {"loss": loss, "accuracy": right}, told)

    return evaluation.evaluate(BatchesOf(held_out, batch), measure, on_step)


def predict_classes(logits: Tensor) -> dict[str, list[Any]]:
    """The class of each row of logits float32[n, classes], and its probability."""
    chances, chosen = logits.softmax(1).max(1)
    return {"class": chosen.tolist(), "probability": chances.tolist()}


def to_tensors(weights: Mapping[str, Array], device: torch.device | None = None) -> Tensors:
    """Copies of the arrays, on the CPU or on `device`."""
    return {name: torch.tensor(array, device=device) for name, array in weights.items()}


def count_answers(logits: Tensor, y: Tensor) -> tuple[int, evaluation_counts.Tallies]:
    """How many of the classes y int64[n] are right by logits float32[n, classes]; confusion and
    calibration, empty after diverged training, which gives no probabilities."""
    sure, guess = logits.float().softmax(1).max(1)
    right = int((guess == y).sum())
    if not bool(sure.isfinite().all()):
        return right, {}
    told = {
        "calibration": evaluation_counts.count_calibration(sure.tolist(), (guess == y).tolist())
    }
    classes = logits.shape[1]
    if classes <= evaluation_counts.MAX_CLASSES:
        told["confusion"] = evaluation_counts.count_confusion(y.tolist(), guess.tolist(), classes)
    return right, told
