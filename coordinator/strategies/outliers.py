"""Limits how far the updates of one peer pull a version away from those of the others. Pure.

The center of a round is the geometric median of its updates (Pillutla et al. 2022, Robust
Aggregation for Federated Learning, arXiv 1912.13445), in which each voter has one vote whatever its
examples. An update pulls the version by its share times its distance from the center. A voter whose
updates pull further than `limit` times the median share at the median distance counts with a part
of its share, and the rest of it goes to the center, as in centered clipping (Karimireddy, He and
Jaggi 2021, arXiv 2012.10333). So a large share with an ordinary update costs little, and neither a
false number of examples nor an enlarged update moves the version far.

A voter is a peer, or all peers of one ticket. Two voters cannot outvote each other: nothing is
limited then. Where nothing exceeds the limit, the shares are returned as they were, to the bit.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from protocols.model.bfloat16 import widened
from protocols.model.weights import FLOAT_DTYPES, Array, Part, WeightReader

Floats = npt.NDArray[np.float64]

MIN_VOTERS = 3
#: With fewer voters, a larger pull is usual: a median of three shares and distances says little.
_MANY_VOTERS = 6
#: Numbers of all updates together that are multiplied at a time: 4 MB, which caches hold.
_BLOCK_VALUES = 1 << 19
#: OpenBLAS multiplies matrices with one thread if the product of their three sizes is this or less.
_SMALL_PRODUCT = 1 << 18
#: Multiplications for one matrix of products, about 10 s. Larger fleets with larger models take
#: a sample of the blocks.
_MAX_PRODUCTS = 4e11
_ROUNDS_OF_WEISZFELD = 16
#: Weiszfeld: distances below this part of the median distance count as this.
_SMOOTHING = 0.1
#: Distances below this part of the median norm count as this. With a limit of 3, a peer that has
#: not moved is no outlier, and two peers that agree by chance make none of the third.
_LEAST_DISTANCE = 1 / 3


class Limited(NamedTuple):
    """New shares, in the order of the updates, and by voter how many times the usual it pulls.

    `pulls` has those above the limit only.
    """

    shares: list[float]
    pulls: dict[str, float]


def voters(peers: Sequence[str], ticket_of: Callable[[str], str]) -> list[str]:
    """The voter of each update: its ticket if there are enough tickets, else its peer."""
    tickets = [f"ticket {ticket_of(peer)}" for peer in peers]
    return tickets if len(set(tickets)) >= MIN_VOTERS else list(peers)


def median_by_voter(values: Sequence[float], voter_of: Sequence[str]) -> float:
    """The median over the voters; each has the median of its own values."""
    return _median(_own_medians(values, voter_of).values())


def values_in_the_middle(values: Sequence[float], voter_of: Sequence[str]) -> list[float]:
    """The voters' values, sorted, without a quarter of them at each end, but one at least.

    Empty with fewer than three voters.
    """
    own = sorted(_own_medians(values, voter_of).values())
    cut = max(1, len(own) // 4)
    return own[cut : len(own) - cut] if len(own) >= MIN_VOTERS else []


def cap_counts(
    counts: Mapping[str, int], ticket_of: Callable[[str], str], limit: float
) -> Mapping[str, float]:
    """Each peer's count, with no voter above `limit` times the median voter."""
    voter_of = dict(zip(counts, voters(list(counts), ticket_of), strict=True))
    totals: dict[str, float] = {}
    for peer, count in counts.items():
        totals[voter_of[peer]] = totals.get(voter_of[peer], 0.0) + count
    most = limit * _median(totals.values())
    if len(totals) < MIN_VOTERS or max(totals.values()) <= most:
        return counts
    factor = {voter: min(1.0, most / total) for voter, total in totals.items()}
    return {peer: count * factor[voter_of[peer]] for peer, count in counts.items()}


def _own_medians(values: Sequence[float], voter_of: Sequence[str]) -> dict[str, float]:
    own: dict[str, list[float]] = {}
    for voter, value in zip(voter_of, values, strict=True):
        own.setdefault(voter, []).append(value)
    return {voter: _median(each) for voter, each in own.items()}


def _median(values: Collection[float]) -> float:
    """To the bit that of NumPy, which takes 20 µs for a few values; NaN if one is NaN."""
    return math.nan if any(map(math.isnan, values)) else statistics.median(values)


def norm_factors(norms: Sequence[float], voter_of: Sequence[str], limit: float) -> list[float]:
    """The factor of each update that brings its norm to `limit` times the median norm; else 1."""
    most = limit * median_by_voter(norms, voter_of)
    return [most / norm if norm > most else 1.0 for norm in norms]


def products(
    updates: Sequence[WeightReader],
    scale: Sequence[float],
    base: WeightReader,
    names: Sequence[str],
    seed: int = 0,
) -> Floats:
    """The inner products float64[n, n] of the scaled changes, over the tensors `names`.

    Of a sample of the blocks, chosen by `seed`, if all would take too long.
    """
    count = len(updates)
    size = max(1, _BLOCK_VALUES // count)
    blocks = [
        Part(name, start, min(start + size, elements))
        for name in names
        if base.schema[name].dtype in FLOAT_DTYPES
        for elements in [math.prod(base.schema[name].shape)]
        for start in range(0, elements, size)
    ]
    work = float(count * count) * sum(block.stop - block.start for block in blocks)
    if work > _MAX_PRODUCTS:
        chosen = np.random.default_rng(seed).permutation(len(blocks))
        blocks = [blocks[i] for i in chosen[: max(1, int(len(blocks) * _MAX_PRODUCTS / work))]]
    total = np.zeros((count, count))
    for block in blocks:
        dtype = base.schema[block.name].dtype
        old, *new = [widened(reader.read(block), dtype) for reader in (base, *updates)]
        total += _products_of_block(new, old, scale)
    return total


def _products_of_block(new: Sequence[Array], old: Array, scale: Sequence[float]) -> Floats:
    """Of arrays [n] of one dtype. Those of float32 are multiplied in half the time."""
    shape = len(new), old.size
    if old.dtype == np.float32:
        with np.errstate(over="ignore", invalid="ignore"):
            narrow = np.empty(shape, np.float32)
            for row, values, factor in zip(narrow, new, scale, strict=True):
                np.subtract(values, old, out=row)
                row *= factor
            products = _inner_products(narrow).astype(np.float64)
        if np.isfinite(products).all():
            return products
    wide = np.empty(shape)
    for line, values, factor in zip(wide, new, scale, strict=True):
        # The factor first: a difference of the largest numbers has no float64.
        np.multiply(values.astype(np.float64), factor, out=line)
        line -= old.astype(np.float64) * factor
    return _inner_products(wide)


def _inner_products(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`rows @ rows.T`; of few rows in pieces that OpenBLAS computes in the caller's thread.

    Its other threads would wait for more work in a loop: 80 ms of CPU time for 2 ms of work, where
    other programs use the cores.
    """
    count, length = rows.shape
    if count**3 > _SMALL_PRODUCT:
        return np.asarray(rows @ rows.T)
    width = _SMALL_PRODUCT // count**2
    whole = length // width * width
    pieces = rows[:, :whole].reshape(count, -1, width).transpose(1, 0, 2)
    rest = rows[:, whole:]
    return np.asarray(np.matmul(pieces, pieces.transpose(0, 2, 1)).sum(0) + rest @ rest.T)


def limit_shares(
    shares: Sequence[float], voter_of: Sequence[str], matrices: Sequence[Floats], limit: float
) -> Limited:
    """The shares with which no voter pulls further than `limit` times the usual: the median share
    at the median distance. With three voters, twice as far; with four or five, a little further.

    `matrices`: the products of the updates over each group of tensors; the group in which a voter
    pulls furthest counts.
    """
    most = limit * max(1.0, _MANY_VOTERS / len(set(voter_of)))
    kept = np.ones(len(shares))
    pulls: dict[str, float] = {}
    centers = [_center(matrix, voter_of) for matrix in matrices]
    for matrix, middle in zip(matrices, centers, strict=True):
        distance = _distances(matrix, middle)
        norm = median_by_voter(np.sqrt(np.diag(matrix)).tolist(), voter_of)
        distance = np.maximum(distance, _LEAST_DISTANCE * norm)
        usual_distance = median_by_voter(distance.tolist(), voter_of)
        pull, total = dict.fromkeys(voter_of, 0.0), dict.fromkeys(voter_of, 0.0)
        for voter, share, far in zip(voter_of, shares, distance.tolist(), strict=True):
            pull[voter] += share * far
            total[voter] += share
        # Not the median of the pulls: of three peers, one is near the center or has few examples.
        usual_pull = _median(total.values()) * usual_distance
        for place, voter in enumerate(voter_of):
            times = max(1.0, _ratio(pull[voter], usual_pull) / most)
            # Twice as far away as the limit, an update counts a quarter: it is not one of these.
            beyond = max(1.0, _ratio(float(distance[place]), usual_distance) / limit)
            kept[place] = min(kept[place], 1.0 / (times * beyond**2))
            if max(times, beyond) > 1.0:
                told = max(
                    factor * bound
                    for factor, bound in ((times, most), (beyond, limit))
                    if factor > 1.0
                )
                pulls[voter] = max(pulls.get(voter, 0.0), told)
    if (kept == 1.0).all():
        return Limited(list(shares), {})
    # The first group is the model. An outlier is no part of the center either.
    own, center = np.asarray(shares) * kept, centers[0] * kept
    return Limited((own + (1.0 - own.sum()) * center / center.sum()).tolist(), pulls)


def _ratio(value: float, usual: float) -> float:
    if usual:
        return value / usual
    return math.inf if value else 0.0


def _center(matrix: Floats, voter_of: Sequence[str]) -> Floats:
    """The weight of each update in the geometric median, by Weiszfeld's algorithm."""
    sizes: Mapping[str, int] = {voter: voter_of.count(voter) for voter in voter_of}
    votes = np.array([1.0 / sizes[voter] for voter in voter_of])
    weights = _most_central(matrix, voter_of)
    for _ in range(_ROUNDS_OF_WEISZFELD):
        distance = _distances(matrix, weights)
        least = _SMOOTHING * median_by_voter(distance.tolist(), voter_of)
        weights = votes / np.maximum(distance, max(least, 1e-300))
        weights /= weights.sum()
    return weights


def _most_central(matrix: Floats, voter_of: Sequence[str]) -> Floats:
    """All weight on the update with the least median distance: the algorithm starts among the
    honest, however far away the others are."""
    squares = np.diag(matrix)[:, None] - 2 * matrix + np.diag(matrix)[None, :]
    medians = [median_by_voter(row.tolist(), voter_of) for row in squares]
    start = np.zeros(len(medians))
    start[int(np.argmin(medians))] = 1.0
    return start


def _distances(matrix: Floats, center: Floats) -> Floats:
    """The distance float64[n] of each update from the center of these weights."""
    squares = np.diag(matrix) - 2 * (matrix @ center) + center @ matrix @ center
    result: Floats = np.sqrt(np.maximum(squares, 0.0))
    return result
