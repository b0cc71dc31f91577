"""Divides a data set among peers that share it, as those of a simulation do.

"iid": at random. "shards": sorted by label, cut in 2n shards, two a part (McMahan et al. 2017,
arXiv 1602.05629, section 3). "dirichlet:α": see `split_by_dirichlet`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from agent.data.settings import DataSettings
from agent.tasks.training import rng_state
from agent.tasks.training.seeds import random_state
from protocols.errors import UsageError

#: With less, all draws of a Dirichlet distribution may be 0.
MIN_ALPHA = 0.01
MAX_LABELS = 256

Indices = npt.NDArray[np.intp]
Labels = npt.NDArray[np.uint8]

#: The data sets that were read last for all peers of this process, with what they were read for.
_whole: tuple[object, tuple[Any, Any]] | None = None


class HasData(Protocol):
    """A task of a user's own."""

    def data(self, source: DataSettings, settings: Any) -> tuple[Any, Any]: ...


class Take(Protocol):
    """Gives a peer's part of a data set, by `rows_of`."""

    def __call__(self, found: Any, data: DataSettings, *, held_out: bool = False) -> Any: ...


def read(
    task: HasData, data: DataSettings, settings: Any, key: object, take: Take
) -> tuple[Any, Any]:
    """The training data and the held-out data of a task: all that its `data` gives, or this peer's
    part of it if all peers share it (`is_shared`).

    `key`: equal for equal `settings`. Of a shared data set the process keeps the last one. Raises
    UsageError.
    """
    global _whole
    if not data.is_shared:
        return _read(task, data, settings, data.index)
    asked = inspect.getfile(type(task)), type(task).__qualname__, data.path, key
    if _whole is None or _whole[0] != asked:
        _whole = None  # both may not fit in memory
        _whole = asked, _read(task, data, settings, 0)
    train, held_out = _whole[1]
    return take(train, data), take(held_out, data, held_out=True)


def _read(task: HasData, data: DataSettings, settings: Any, place: int) -> tuple[Any, Any]:
    """`place`: makes its random choices differ from those of other peers."""
    with rng_state.seeded("data", data.seed, place):
        found = task.data(data, settings)
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise UsageError(
            f"data() of {type(task).__name__} returns no pair of data sets",
            "return train_set, test_set; each a Dataset, or a tuple (x, y)",
        )
    return found[0], found[1]


def take_arrays(found: Any, data: DataSettings, *, held_out: bool = False) -> Any:
    """This peer's examples of arrays (x, …, y)."""
    rows = rows_of(len(found[-1]), lambda: found[-1], data, held_out=held_out)
    return tuple(each[rows] for each in found)


def rows_of(
    count: int, labels: Callable[[], Any], data: DataSettings, *, held_out: bool = False
) -> Indices:
    """The numbers of the examples of this peer, sorted; those that are held out are cut at random.

    `labels()`: the classes of all examples, [count]. Raises UsageError.
    """
    if count < data.parts and not held_out:
        raise UsageError(
            f"{count} examples to train on cannot be divided among {data.parts} peers",
            "fewer --peers, or more data",
        )
    order = random_state("split", data.seed).permutation(count)
    if held_out or data.split == "iid":
        return np.sort(part_of(order, data.parts, data.index))
    found = np.asarray(labels())
    if found.shape != (count,) or found.dtype.kind not in "biuUS":
        raise UsageError(
            f"--split {data.split} needs classes, and the targets of these examples are none",
            "--split iid",
        )
    names, codes = np.unique(found, return_inverse=True)
    if len(names) > MAX_LABELS:
        raise UsageError(
            f"--split {data.split} takes up to {MAX_LABELS} classes, not {len(names)}",
            "--split iid",
        )
    return np.sort(choose(order, codes.astype(np.uint8)[order], data))


def choose(order: Indices, labels: Labels, data: DataSettings) -> Indices:
    """Part `data.index` of the examples `order`, whose labels are uint8[n]. Raises UsageError."""
    n = data.parts
    if data.split == "shards":
        by_label = order[np.argsort(labels, kind="stable")]
        dealt = random_state("shards", data.seed).permutation(2 * n)[2 * data.index :][:2]
        return np.concatenate([part_of(by_label, 2 * n, shard) for shard in dealt])
    if data.split.startswith("dirichlet:"):
        alpha = float(data.split.partition(":")[2])
        return order[split_by_dirichlet(labels.tobytes(), n, alpha, data.seed)[data.index]]
    return part_of(order, n, data.index)


def part_of(whole: Indices, parts: int, part: int) -> Indices:
    """`np.array_split(whole, parts)[part]`, without the time that the others take."""
    size, longer = divmod(len(whole), parts)
    start = part * size + min(part, longer)
    return whole[start : start + size + (part < longer)]


@functools.lru_cache(1)
def split_by_dirichlet(labels: bytes, parts: int, alpha: float, seed: int) -> tuple[Indices, ...]:
    """Indices of each part: of equal size, with shares of the labels drawn from Dir(alpha, …).

    `labels`: uint8[n]. A label that is used up is replaced by the others of the part (Hsu et al.
    2019, arXiv 1909.06335). Raises UsageError.
    """
    if not alpha >= MIN_ALPHA:
        raise UsageError(f"dirichlet:{alpha:g} is too small", f"dirichlet:{MIN_ALPHA:g} or more")
    draw, of = random_state("dirichlet", seed), np.frombuffer(labels, np.uint8)
    pools = [list(draw.permutation(np.flatnonzero(of == label))) for label in np.unique(of)]
    made = []
    for part in np.array_split(of, parts):
        shares, mine = draw.dirichlet([alpha] * len(pools)), list[int]()
        while len(mine) < len(part):
            left = np.array([bool(pool) for pool in pools])
            odds = np.where(left, shares + 1e-12, 0)
            wanted = draw.multinomial(len(part) - len(mine), odds / odds.sum())
            for pool, count in zip(pools, wanted, strict=True):
                mine += pool[:count]
                del pool[:count]
        made.append(np.array(mine, np.intp))
    return tuple(made)
