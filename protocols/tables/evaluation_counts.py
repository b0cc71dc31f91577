"""Tallies: counts and sums of an evaluation, and the metrics of all peers together. Pure.

A loss or an accuracy is a mean over examples, so it can be averaged over peers. An F1 score or a
correlation cannot. So each peer also sends tallies: lists of numbers by name that can be added.

Tally        Numbers
confusion    k² counts: true class by row, predicted class by column
calibration  for each of 10 bins of confidence: examples, sum of confidences, correct predictions
regression   examples; sums of (ŷ - y)², |ŷ - y|, y and y²
scores       of two classes: for each of 64 bins of the log-odds of the second, from -8 to 8, the
             examples of the first class and of the second
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

BINS = 10
#: The number of bins of scores, and the log-odds at which they end. Scores beyond that count in the
#: outer bins.
SCORE_BINS, _FARTHEST = 64, 8.0
#: Most classes of a confusion matrix; a larger one is hard to read and takes many bytes.
MAX_CLASSES = 32
_SIZES = {"calibration": 3 * BINS, "regression": 5, "scores": 2 * SCORE_BINS}

Tally = Sequence[float]
Tallies = Mapping[str, Tally]


def validate(tallies: Tallies, num_examples: int) -> str:
    """The fault in a peer's tallies of `num_examples` examples, as text; empty if there is none."""
    for name, tally in tallies.items():
        size = len(tally)
        if name == "confusion":
            if not 0 < size <= MAX_CLASSES**2 or math.isqrt(size) ** 2 != size:
                return f"a confusion with {size} numbers"
        elif name not in _SIZES:
            return f"an unknown tally {name!r}"
        elif size != _SIZES[name]:
            return f"a {name} with {size} numbers"
        if not all(map(math.isfinite, tally)):
            return f"a {name} that is not finite"
        signed = tally[3:4] if name == "regression" else ()  # the sum of y
        if min(tally) < 0 and min(tally) not in signed:
            return f"a {name} with a negative number"
        examples = {"calibration": tally[::3], "regression": tally[:1]}.get(name, tally)
        if abs(sum(examples) - num_examples) > 0.5:
            return f"a {name} of {sum(examples):g} examples, not {num_examples}"
    return ""


def suppress_small(
    tallies: Tallies, min_count: int, *, is_summed: bool = False
) -> dict[str, list[float]]:
    """The tallies in which each class and each bin has no row or at least `min_count`.

    If a class has fewer rows, the confusion and the scores are left out. A bin of confidence with
    fewer rows joins the next one, so that the sums stay. In scores, bins of a class join until they
    have enough rows, which then all count in their mean bin.

    `is_summed`: all peers of a secure sum need the same tallies, so none is left out. Instead, the
    rows of a smaller class count as rows of the most frequent one: as right answers, or in its mean
    bin.
    """
    kept = {name: list(tally) for name, tally in tallies.items()}
    if confusion := kept.get("confusion"):
        table = np.reshape(confusion, (math.isqrt(len(confusion)), -1))
        totals = table.sum(1)
        few = (totals > 0) & (totals < min_count)
        if few.any() and not is_summed:
            del kept["confusion"]
        elif few.any():
            table[few], most = 0.0, int(totals.argmax())
            table[most, most] += totals[few].sum()
            kept["confusion"] = [float(n) for n in table.reshape(-1)]
    if calibration := kept.get("calibration"):
        kept["calibration"] = _join_small(np.reshape(calibration, (-1, 3)), min_count)
    if scores := kept.get("scores"):
        classes = np.reshape(scores, (-1, 2)).T
        if is_few := any(0 < counts.sum() < min_count for counts in classes):
            classes = _as_one_class(classes)
        if is_few and not is_summed:
            del kept["scores"]
        else:
            joined = np.stack([_join_at_mean(counts, min_count) for counts in classes], 1)
            kept["scores"] = [float(n) for n in joined.reshape(-1)]
    return kept


def _as_one_class(classes: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Counts float64[2, n] of two classes by bin, with all rows in the larger class. The rows of
    the smaller one are in the mean bin of the larger one."""
    most = int(classes.sum(1).argmax())
    larger, rows = classes[most].copy(), float(classes[1 - most].sum())
    larger[round(float(larger @ np.arange(len(larger)) / larger.sum()))] += rows
    found = np.zeros_like(classes)
    found[most] = larger
    return found


def _join_at_mean(counts: npt.NDArray[np.float64], min_count: int) -> npt.NDArray[np.float64]:
    """Counts float64[n] of a class by bin, each 0 or at least `min_count`. Joined bins count in
    their mean bin, so that the mean of the class stays."""
    groups: list[tuple[float, float]] = []  # examples, and the sum of their bins
    rows = places = 0.0
    for place, count in enumerate(counts):
        rows, places = rows + count, places + count * place
        if rows and rows >= min_count:
            groups.append((rows, places))
            rows = places = 0.0
    if rows:
        last = groups.pop()
        groups.append((last[0] + rows, last[1] + places))
    joined = np.zeros_like(counts)
    for rows, places in groups:
        joined[round(places / rows)] += rows
    return joined


def _join_small(bins: npt.NDArray[np.float64], min_count: int) -> list[float]:
    """Bins of confidence float64[n, 3], each without rows or with at least `min_count`."""
    joined, carried, last = np.zeros_like(bins), np.zeros(3), len(bins) - 1
    for place, counts in enumerate(bins):
        carried = carried + counts
        if carried[0] >= min_count:
            joined[place], carried, last = carried, np.zeros(3), place
    joined[last] += carried
    return [float(n) for n in joined.reshape(-1)]


def merge(tallies: Iterable[Tallies], scale: Iterable[float]) -> dict[str, list[float]]:
    """The scaled sum of all tallies. Those of another size than most peers have are skipped."""
    everyone = list(tallies)
    sizes: dict[str, Counter[int]] = {}
    for peer_tallies in everyone:
        for name, tally in peer_tallies.items():
            sizes.setdefault(name, Counter())[len(tally)] += 1
    total = {name: [0.0] * size.most_common(1)[0][0] for name, size in sizes.items()}
    for peer_tallies, factor in zip(everyone, scale, strict=True):
        for name, tally in peer_tallies.items():
            so_far = total[name]
            if len(so_far) == len(tally):
                total[name] = [a + factor * b for a, b in zip(so_far, tally, strict=True)]
    return total


def compute_metrics(tallies: Tallies) -> dict[str, float]:
    """The metrics of some tallies.

    confusion: balanced_accuracy (the mean recall of the classes that occur), macro_f1.
    calibration: ece, the expected calibration error (Guo et al. 2017, arXiv 1706.04599).
    regression: rmse, mae, and r2 where y varies.
    scores: auc, the area under the ROC curve, and average_precision of the second class, both as if
    examples of one bin had the same score.
    """
    found: dict[str, float] = {}
    if "confusion" in tallies:
        found |= _classification_metrics(tallies["confusion"])
    if "calibration" in tallies:
        count, confidence, right = np.reshape(tallies["calibration"], (-1, 3)).T
        found["ece"] = float(np.abs(right - confidence).sum() / max(count.sum(), 1e-12))
    if "regression" in tallies:
        found |= _regression_metrics(tallies["regression"])
    if "scores" in tallies:
        found |= _ranking_metrics(tallies["scores"])
    return found


def _classification_metrics(confusion: Tally) -> dict[str, float]:
    table = np.reshape(confusion, (math.isqrt(len(confusion)), -1))
    correct, true, predicted = table.diagonal(), table.sum(1), table.sum(0)
    occurs = true > 0
    if not occurs.any():
        return {}
    return {
        "balanced_accuracy": float((correct[occurs] / true[occurs]).mean()),
        "macro_f1": float((2 * correct[occurs] / (true + predicted)[occurs]).mean()),
    }


def _regression_metrics(sums: Tally) -> dict[str, float]:
    count, squares, distances, total, total_squares = sums
    if not count:
        return {}
    found = {"rmse": math.sqrt(squares / count), "mae": distances / count}
    variation = total_squares - total * total / count
    if variation > 1e-12 * max(total_squares, 1e-300):
        found["r2"] = 1 - squares / variation
    return found


def _ranking_metrics(scores: Tally) -> dict[str, float]:
    """The examples of both classes above each cut between two bins, from the highest cut."""
    negative, positive = np.reshape(scores, (-1, 2))[::-1].T
    above, wrong = np.cumsum(positive), np.cumsum(negative)
    if not (above[-1] > 0 and wrong[-1] > 0):
        return {}
    auc = (negative * (above - positive / 2)).sum() / (above[-1] * wrong[-1])
    precision = above / np.maximum(above + wrong, 1e-12)
    return {
        "auc": float(auc),
        "average_precision": float((positive * precision).sum() / above[-1]),
    }


def count_scores(truth: Sequence[int], log_odds: Sequence[float]) -> list[float]:
    """A tally of scores from the classes, 0 or 1, and the log-odds of class 1 (not NaN)."""
    place = (np.asarray(log_odds, np.float64) / _FARTHEST + 1) * SCORE_BINS / 2
    bins = np.clip(place, 0, SCORE_BINS - 1).astype(np.int64)
    pairs = bins * 2 + np.asarray(truth, np.int64)
    return [float(n) for n in np.bincount(pairs, minlength=2 * SCORE_BINS)]


def count_confusion(truth: Sequence[int], guess: Sequence[int], classes: int) -> list[float]:
    """A confusion tally from class numbers (from 0)."""
    cells = confusion_cells(truth, guess, classes)
    return [float(n) for n in np.bincount(cells, minlength=classes * classes)]


def confusion_cells(
    truth: npt.ArrayLike, guess: npt.ArrayLike, classes: int
) -> npt.NDArray[np.int64]:
    """Of each example, its place in a confusion."""
    return np.asarray(truth, np.int64) * classes + np.asarray(guess, np.int64)


def count_calibration(confidence: Sequence[float], right: Sequence[bool]) -> list[float]:
    """A calibration tally from the probability of each prediction, and whether it was right."""
    sure = np.asarray(confidence, np.float64)
    bins = np.minimum((sure * BINS).astype(int), BINS - 1)
    sums = [
        np.bincount(bins, w, BINS) for w in (np.ones_like(sure), sure, np.asarray(right, float))
    ]
    return [float(n) for n in np.stack(sums, 1).reshape(-1)]


def sum_regression(truth: Sequence[float], guess: Sequence[float]) -> list[float]:
    """A regression tally."""
    y, error = np.asarray(truth, np.float64), np.subtract(guess, truth, dtype=np.float64)
    return [
        float(len(y)),
        float((error**2).sum()),
        float(np.abs(error).sum()),
        float(y.sum()),
        float((y**2).sum()),
    ]
