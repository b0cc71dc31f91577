"""Classes with their probabilities, confusion and calibration from logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from protocols.tables import evaluation_counts


def predict_classes(logits: Tensor) -> dict[str, list[Any]]:
    """The class of each row of logits float32[n, classes], and its probability."""
    chances, chosen = logits.softmax(1).max(1)
    return {"class": chosen.tolist(), "probability": chances.tolist()}


def count_answers(logits: Tensor, y: Tensor) -> evaluation_counts.Tallies:
    """Confusion, calibration and, of two classes, scores of logits float32[n, classes] for the
    classes y int64[n]; empty after diverged training, which gives no probabilities."""
    sure, guess = logits.float().softmax(1).max(1)
    if not bool(sure.isfinite().all()):
        return {}
    told = {
        "calibration": evaluation_counts.count_calibration(sure.tolist(), (guess == y).tolist())
    }
    classes = logits.shape[1]
    if classes <= evaluation_counts.MAX_CLASSES:
        told["confusion"] = evaluation_counts.count_confusion(y.tolist(), guess.tolist(), classes)
    if classes == 2:
        log_odds = (logits[:, 1] - logits[:, 0]).float()
        told["scores"] = evaluation_counts.count_scores(y.tolist(), log_odds.tolist())
    return told
