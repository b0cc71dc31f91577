"""Tallies: what all peers count adds up to what one would count, and gives the known metrics."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn

from protocols.tables import evaluation_counts

CLASSES = 4
pairs = st.lists(
    st.tuples(st.integers(0, CLASSES - 1), st.integers(0, CLASSES - 1), st.floats(0, 1)),
    min_size=1,
    max_size=40,
)
numbers = st.floats(-100, 100, width=32)


def told(part: list[tuple[int, int, float]]) -> dict[str, list[float]]:
    truth, guess, sure = (list(column) for column in zip(*part, strict=True))
    return {
        "confusion": evaluation_counts.count_confusion(truth, guess, CLASSES),
        "calibration": evaluation_counts.count_calibration(
            sure, [t == g for t, g in zip(truth, guess, strict=True)]
        ),
    }


@given(pairs, st.integers(0, 40))
def test_parts_add_up_to_the_whole(whole: list[tuple[int, int, float]], cut: int) -> None:
    parts = [part for part in (whole[:cut], whole[cut:]) if part]
    found = evaluation_counts.merge(map(told, parts), [1.0] * len(parts))
    expected = told(whole)
    assert found["confusion"] == expected["confusion"]
    np.testing.assert_allclose(found["calibration"], expected["calibration"], atol=1e-9)
    assert evaluation_counts.validate(found, len(whole)) == ""


@given(pairs)
def test_classification_is_that_of_scikit_learn(whole: list[tuple[int, int, float]]) -> None:
    truth, guess, sure = (np.array(column) for column in zip(*whole, strict=True))
    found = evaluation_counts.compute_metrics(told(whole))
    occur = sorted(set(truth.tolist()))
    recall = sklearn.recall_score(truth, guess, labels=occur, average="macro", zero_division=0)
    f1 = sklearn.f1_score(truth, guess, labels=occur, average="macro", zero_division=0)
    assert found["balanced_accuracy"] == pytest.approx(recall)
    assert found["macro_f1"] == pytest.approx(f1)
    bins = np.minimum((sure * evaluation_counts.BINS).astype(int), evaluation_counts.BINS - 1)
    right = truth == guess
    gaps = [
        (bins == b).mean() * abs(right[bins == b].mean() - sure[bins == b].mean())
        for b in set(bins.tolist())
    ]
    assert found["ece"] == pytest.approx(sum(gaps), abs=1e-9)


@given(
    st.lists(st.tuples(st.booleans(), st.floats(-12, 12)), min_size=2, max_size=60),
    st.integers(0, 60),
)
def test_ranks_are_those_of_scikit_learn_on_the_bins(
    whole: list[tuple[bool, float]], cut: int
) -> None:
    parts = [part for part in (whole[:cut], whole[cut:]) if part]
    told = [
        {"scores": evaluation_counts.count_scores([int(t) for t, _ in part], [s for _, s in part])}
        for part in parts
    ]
    found = evaluation_counts.merge(told, [1.0] * len(told))
    assert evaluation_counts.validate(found, len(whole)) == ""
    truth = np.array([t for t, _ in whole])
    bins = np.clip(((np.array([s for _, s in whole]) / 8 + 1) * 32), 0, 63).astype(int)
    if truth.all() or not truth.any():
        assert evaluation_counts.compute_metrics(found) == {}
        return
    assert evaluation_counts.compute_metrics(found) == {
        "auc": pytest.approx(sklearn.roc_auc_score(truth, bins)),
        "average_precision": pytest.approx(sklearn.average_precision_score(truth, bins)),
    }


@given(st.lists(st.integers(0, 12), min_size=64, max_size=64), st.integers(1, 8))
def test_scores_of_few_examples_join_where_their_mean_is(counts: list[int], least: int) -> None:
    tally = [float(n) for count in counts for n in (20, count)]
    kept = evaluation_counts.suppress_small({"scores": tally}, least)
    if 0 < sum(counts) < least:
        assert kept == {}
        return
    joined = kept["scores"][1::2]
    assert all(count == 0 or count >= least for count in joined)
    assert sum(joined) == sum(counts)
    assert kept["scores"][::2] == [20.0] * 64
    where = range(64)
    assert np.dot(joined, where) == pytest.approx(np.dot(counts, where), abs=0.5 * sum(counts))


def test_ranks_stay_about_the_same_if_few_examples_join() -> None:
    rng = np.random.default_rng(1)
    truth = (rng.random(2000) < 0.05).astype(int)
    scores = rng.normal(size=2000) - 3 + 1.5 * truth
    tally = {"scores": evaluation_counts.count_scores(truth.tolist(), scores.tolist())}
    exact = sklearn.roc_auc_score(truth, scores)
    for least in (1, 10, 20):
        kept = evaluation_counts.suppress_small(tally, least)
        assert abs(evaluation_counts.compute_metrics(kept)["auc"] - exact) < 0.02


@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=30))
def test_regression_is_that_of_scikit_learn(whole: list[tuple[float, float]]) -> None:
    truth, guess = (np.array(column) for column in zip(*whole, strict=True))
    tally = {"regression": evaluation_counts.sum_regression(truth.tolist(), guess.tolist())}
    assert evaluation_counts.validate(tally, len(whole)) == ""
    found = evaluation_counts.compute_metrics(tally)
    assert found["mae"] == pytest.approx(sklearn.mean_absolute_error(truth, guess))
    assert found["rmse"] ** 2 == pytest.approx(sklearn.mean_squared_error(truth, guess))
    if truth.std() > 1:
        assert found["r2"] == pytest.approx(sklearn.r2_score(truth, guess), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"confusion": [1.0, 2.0, 3.0]}, "3 numbers"),
        ({"confusion": []}, "0 numbers"),
        ({"confusion": [4.0, -1.0, 0.0, 0.0]}, "negative number"),
        ({"confusion": [math.nan, 1.0, 1.0, 1.0]}, "not finite"),
        ({"confusion": [1.0, 1.0, 1.0, 1.0]}, "4 examples, not 3"),
        ({"calibration": [3.0, 1.0, 1.0]}, "3 numbers"),
        ({"regression": [3.0, -1.0, 1.0, 1.0, 1.0]}, "negative number"),
        ({"regression": [2.0, 1.0, 1.0, 1.0, 1.0]}, "2 examples, not 3"),
        ({"passwords": [3.0]}, "unknown"),
    ],
)
def test_what_cannot_be_is_told(bad: dict[str, Any], words: str) -> None:
    assert words in evaluation_counts.validate(bad, 3)


def test_a_sum_of_targets_may_be_below_nothing() -> None:
    assert evaluation_counts.validate({"regression": [3.0, 1.0, 1.0, -5.0, 9.0]}, 3) == ""


def test_a_peer_with_other_classes_is_left_out_and_nothing_gives_nothing() -> None:
    two = {"confusion": [1.0, 0.0, 0.0, 1.0]}
    three = {"confusion": [1.0] * 9}
    assert evaluation_counts.merge([two, three, two], [1.0, 1.0, 0.5]) == {
        "confusion": [1.5, 0, 0, 1.5]
    }
    assert evaluation_counts.compute_metrics({"confusion": [0.0] * 4}) == {}
    assert evaluation_counts.compute_metrics({"regression": [0.0] * 5}) == {}
    assert "r2" not in evaluation_counts.compute_metrics({"regression": [2.0, 1.0, 1.0, 6.0, 18.0]})


@given(st.lists(st.integers(0, 12), min_size=10, max_size=10), st.integers(1, 8))
def test_a_bin_of_few_examples_joins_another(counts: list[int], min_count: int) -> None:
    tally = [float(n) for count in counts for n in (count, count / 2, count // 3)]
    joined = evaluation_counts.suppress_small({"calibration": tally}, min_count)["calibration"]
    kept = [count for count in joined[::3] if count]
    assert len(kept) <= 1 or min(kept) >= min_count
    for place in range(3):
        assert sum(joined[place::3]) == sum(tally[place::3])
    if all(count == 0 or count >= min_count for count in counts):
        assert joined == tally


def test_a_class_of_few_examples_is_in_no_confusion() -> None:
    few, enough = [20.0, 1.0, 3.0, 1.0], [20.0, 1.0, 0.0, 5.0]
    assert evaluation_counts.suppress_small({"confusion": few}, 5) == {}
    assert evaluation_counts.suppress_small({"confusion": few}, 4) == {"confusion": few}
    assert evaluation_counts.suppress_small({"confusion": enough}, 5) == {"confusion": enough}


@pytest.mark.attack("3", by="coordinator")
@given(st.lists(st.integers(0, 30), min_size=9, max_size=9), st.integers(1, 12))
def test_of_a_secure_sum_rows_of_a_small_class_count_as_the_most_frequent_one(
    cells: list[int], least: int
) -> None:
    """Attack: learn from the sums of an evaluation how many rows of a rare class there are, or
    what a model says of them."""
    tally = [float(n) for n in cells]
    kept = evaluation_counts.suppress_small({"confusion": tally}, least, is_summed=True)
    before, after = np.reshape(tally, (3, 3)), np.reshape(kept["confusion"], (3, 3))
    assert after.sum() == before.sum(), "the number of rows says nothing of a small class"
    for number, row in enumerate(after):
        assert row.sum() == 0 or row.sum() >= min(least, before.sum())
        if row.sum() and number != before.sum(1).argmax():
            assert (row == before[number]).all()
    # The predictions for rows of a small class change nothing.
    for number in np.flatnonzero(before.sum(1) < least):
        other = before.copy()
        other[number] = np.roll(other[number], 1)
        told = {"confusion": other.reshape(-1).tolist()}
        assert evaluation_counts.suppress_small(told, least, is_summed=True) == kept


@given(st.lists(st.tuples(st.booleans(), st.floats(-12, 12)), min_size=5, max_size=60))
def test_of_a_secure_sum_scores_of_a_small_class_count_as_the_other_one(
    rows: list[tuple[bool, float]],
) -> None:
    tally = evaluation_counts.count_scores([int(c) for c, _ in rows], [odds for _, odds in rows])
    kept = evaluation_counts.suppress_small({"scores": tally}, 5, is_summed=True)["scores"]
    assert sum(kept) == len(rows)
    classes = np.reshape(tally, (-1, 2)).sum(0)
    if 0 < classes.min() < 5:
        assert np.reshape(kept, (-1, 2)).sum(0)[1 - classes.argmax()] == 0
