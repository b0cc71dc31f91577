"""Trees: a coordinator asks about crafted trees, and a peer sends crafted histograms."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from agent.data.settings import DataSettings
from agent.tasks.work import Init, Train
from agent.trainer.in_process import InProcessTrainer
from coordinator.runs import validation
from protocols.errors import BadWeights, TrainerFailed, UpdateRefused
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.tables import preprocessing
from protocols.tables.preprocessing import Feature, Preprocessing, Target
from protocols.tables.trees import layout
from protocols.tables.trees.layout import SLOTS
from tests.support.tables import write_csv
from tests.support.tree_peers import Array, Forest, grow

MIN_COUNT = DataSettings().min_count
ROWS = 60


def patients() -> tuple[Array, Array]:
    """Three numbers: of each, all values differ. Person 0 is the oldest."""
    rng = np.random.default_rng(0)
    z = np.stack([rng.permutation(ROWS) / 20 - 1.5 for _ in range(3)], 1)
    z[0] = 1.5
    return z, rng.integers(0, 2, ROWS)


# --- a coordinator and one owner --------------------------------------------------------------


def single_out(z: Array, feature: int, place: int) -> list[int]:
    """Cuts around the value of one person."""
    near = np.sort(np.unique(z[:, feature]))
    at = int(np.flatnonzero(near == z[place, feature])[0])
    from protocols.tables.trees.histograms import slots_of

    slots = slots_of(near.astype(np.float32)).astype(int)
    below = slots[at] - 1
    return [below, int(slots[at])]


def crafted(forest: Forest, z: Array) -> dict[str, Array]:
    """A version that asks for the node of person 0 alone: its value lies in a bin of its own."""
    version = forest.first()
    cuts = np.full_like(version["cuts"], SLOTS)
    for feature in range(3):
        cuts[feature, :2] = single_out(z, feature, 0)
    version["cuts"] = cuts
    version["at"][:] = 0, 1, 20
    version["feature"][0, 0, 0] = 0
    version["left"][0, 0, 0] = 1 << 2  # the bin of person 0 goes left, all others right
    version["asked"][:] = -1
    version["asked"][0, 0] = 0
    layout.read(version, forest.shape)
    return version


@pytest.mark.attack("20.3")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("side", [0, 1])
def test_a_node_of_one_person_is_empty(masked: bool, side: int) -> None:
    """Attack: craft cuts and a tree in which one person is alone in a node, or missing from its
    sibling; the gradient of that node is the person's label."""
    z, y = patients()
    forest = Forest.of(3, depth=2, bins=8)
    version = crafted(forest, z)
    version["asked"][0, 0] = side
    told = {}
    for least in (1, MIN_COUNT):
        at, numbers = layout.read(version, forest.shape)
        sums = forest.rows(z, y, least).sums(version, at, numbers, masked=masked)
        hessians = sums.reshape(at.sums)[0, 0, :, 1].sum()
        told[least] = round(hessians / (0.25 * 2**20))
    assert told[1] == (1 if side == 0 else ROWS - 1)  # what the attack would get
    assert told[MIN_COUNT] == (0 if side == 0 else ROWS)


@pytest.mark.attack("20.3")
def test_deeper_nodes_of_few_rows_stay_with_their_siblings() -> None:
    """Attack: let a tree of random cuts grow deep, so that nodes and what they lack are a few."""
    z, y = patients()
    forest, rng = Forest.of(3, depth=6, bins=32), np.random.default_rng(1)
    rows = forest.rows(z, y, MIN_COUNT)
    version = grow(forest, [rows], [ROWS], rounds=2)
    seen = []
    version["feature"][0, 0] = rng.integers(0, 3, 63)
    version["left"][0, 0] = rng.integers(0, 1 << 32, 63)
    whole = {(): ROWS}
    for level in range(1, 6):
        for node in range(2**level):
            version["at"][1] = level
            version["asked"][:] = -1
            version["asked"][0, 0] = node
            at, numbers = layout.read(version, forest.shape)
            sums = rows.sums(version, at, numbers, masked=False).reshape(at.sums)
            count = round(sums[0, 0, :, 1].sum() / (0.25 * 2 ** int(version["at"][2])))
            seen.append(count)
            whole[(level, node)] = count
            parent = whole[(level - 1, node >> 1)] if level > 1 else ROWS
            assert count == 0 or count >= MIN_COUNT
            assert parent - count == 0 or parent - count >= MIN_COUNT or parent == 0
    assert 0 in seen


@pytest.mark.attack("20.3")
def test_slots_and_bins_of_few_rows_count_with_their_neighbors() -> None:
    """Attack: ask a plain run for the fine grid, or for a bin of one person's value."""
    z, y = patients()
    forest = Forest.of(3, bins=32)
    rows = forest.rows(z, y, MIN_COUNT)
    at, numbers = layout.read(forest.first(), forest.shape)
    counts = rows.sums(forest.first(), at, numbers, masked=False).reshape(at.sums)
    assert (counts.sum(1) == ROWS).all()
    assert ((counts == 0) | (counts >= MIN_COUNT)).all()
    version = crafted(forest, z)
    version["at"][1] = 0
    version["asked"][0, 0] = 0
    at, numbers = layout.read(version, forest.shape)
    sums = rows.sums(version, at, numbers, masked=False).reshape(at.sums)[0]
    counted = np.rint(sums[:, :, 1] / (0.25 * 2**20))
    assert ((counted == 0) | (counted >= MIN_COUNT)).all()
    assert (counted.sum(1) == ROWS).all()


@pytest.mark.attack("20.3")
@pytest.mark.parametrize("objective", ["squared", "poisson"])
def test_predictions_far_away_do_not_leave_one_target(objective: str) -> None:
    """Attack: predict so much for all rows but one that their gradients are cut off; what is left
    of the sum is the target of that row."""
    z, _ = patients()
    forest = Forest.of(3, depth=2, bins=8, classes=0, objective=objective, mean=5.0, scale=2.0)
    found = []
    for target in (-2.0, 2.0):
        y = np.zeros((ROWS, 1), np.float32)
        y[0] = target
        for for_him in (0.0, 1e6):
            version = crafted(forest, z)
            version["at"][:] = 1, 0, 10
            version["leaf"][0, 0, 1:3] = for_him, 1e6
            version["asked"][0, 0] = 0
            at, numbers = layout.read(version, forest.shape)
            sums = forest.rows(z, y, MIN_COUNT).sums(version, at, numbers, masked=False)
            found.append(int(sums.reshape(at.sums)[0, 0, :, 0].sum()))
    with_him, without = found[0] - found[2], found[1] - found[3]
    assert with_him == without != 0  # his target counts once, whatever is predicted for him


@pytest.mark.attack("20.3")
def test_a_grid_beyond_the_integers_is_refused() -> None:
    """Attack: name a grid so fine that sums wrap around, and read rows from what is left."""
    z, y = patients()
    forest = Forest.of(3)
    version = grow(forest, [forest.rows(z, y)], [ROWS], rounds=1)
    version["at"][2] = 24
    forest = forest._replace(objective=forest.objective._replace(bound=1e3))
    at, numbers = layout.read(version, forest.shape)
    with pytest.raises(BadWeights, match="do not fit"):
        forest.rows(z, y).sums(version, at, numbers, masked=False)


MADE = Preprocessing(
    features=tuple(Feature(name=name, kind="number") for name in "abc"),
    target=Target(name="ill", kind="text", classes=("no", "yes")),
)
SETTINGS = {
    "target": "ill",
    "model": "trees",
    "trees": 2,
    "depth": 2,
    "preprocessing": preprocessing.encode(MADE),
}


@pytest.mark.attack("20.3")
def test_hessians_leave_in_secure_sums_alone(tmp_path: Path) -> None:
    """Attack: tell an agent of a plain run that its sums are masked, and read p(1 - p) of rows."""
    z, y = patients()
    columns = [dict(zip("abc", map(str, row), strict=True)) for row in z]
    rows = [{**row, "ill": ("no", "yes")[label]} for row, label in zip(columns, y, strict=True)]
    data = DataSettings(path=str(write_csv(tmp_path / "a.csv", rows)), device="cpu")
    trainer, base = InProcessTrainer(data), tmp_path / "base.safetensors"
    trainer.run(Init(task="tabular", settings=SETTINGS, seed=0, out=str(base)))
    version = {name: np.array(array) for name, array in weights.load(base).items()}
    version["at"][:] = 1, 0, 20
    version["asked"][0, 0] = 0
    version["cuts"][:, 0] = 1023
    version["feature"][0, 0, 0] = 0
    version["left"][0, 0, 0] = 2
    version["leaf"][0, 0, 1:3] = -1, 1  # predictions that differ
    weights.save(Weights(version), base)
    given = {**SETTINGS, "seed": 0, "round": 1, "masked": True}
    out = tmp_path / "out.safetensors"
    constant = 2**18
    for masked in (False, True):
        trainer.run(
            Train(task="tabular", settings=given, base=str(base), out=str(out), masked=masked)
        )
        hessians = np.asarray(weights.load(out)["sums"]).reshape(-1, 2)[:, 1]
        assert bool((hessians % constant).any()) is masked
    version["numbers"][0] = 0.9
    weights.save(Weights(version), base)
    with pytest.raises(TrainerFailed, match="other settings"):
        trainer.run(Train(task="tabular", settings=given, base=str(base), out=str(out)))
    version["feature"][0, 0, 0] = 3
    weights.save(Weights(version), base)
    with pytest.raises(TrainerFailed, match="not a state"):
        trainer.run(Train(task="tabular", settings=given, base=str(base), out=str(out)))


# --- a peer and the coordinator ---------------------------------------------------------------


def no_change(sums: Array) -> Array:
    return sums


def negative(sums: Array) -> Array:
    sums[..., 1] *= -1
    return sums


def too_many(sums: Array) -> Array:
    return sums * 50


def uneven(sums: Array) -> Array:
    sums[0, 1, 3] += (0, 2**18)
    return sums


def steep(sums: Array) -> Array:
    sums[..., 0] += 2**27
    return sums


def part_of_a_row(sums: Array) -> Array:
    sums[..., 1] += 1
    return sums


@pytest.mark.attack("5")
@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        (no_change, ""),
        (negative, "a negative count"),
        (too_many, "counts of 3000 rows, and there are 60"),
        (uneven, "features that disagree"),
        (steep, "a sum of gradients that is too large"),
        (part_of_a_row, "a count that is not whole"),
        (lambda sums: sums[:, :, :5], "sums"),
        (lambda sums: sums.astype(np.float32) * np.nan, "sums"),
    ],
)
def test_a_crafted_histogram_is_refused_by_name(lie: Callable[[Array], Any], reason: str) -> None:
    """Attack: send sums of another shape, NaN, or counts of rows that cannot be."""
    z, y = patients()
    forest = Forest.of(3)
    rows = forest.rows(z, y)
    version = grow(forest, [rows], [ROWS], rounds=1)
    version["at"][2] = 20
    at, numbers = layout.read(version, forest.shape)
    sums = rows.sums(version, at, numbers, masked=False).reshape(at.sums)
    update = Weights({"sums": np.ascontiguousarray(lie(sums.copy())).reshape(-1)})
    if not reason:
        validation.check_sums(lambda: update, Weights(version), ROWS)
        return
    with pytest.raises(UpdateRefused) as found:
        validation.check_sums(lambda: update, Weights(version), ROWS)
    assert reason in found.value.message
