"""The coordinator's half of trees: a level follows from base, state and updates alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from coordinator import strategies
from coordinator.strategies import trees
from coordinator.strategies.runner import CUSTOM_SLOT, Aggregation, InputUpdate
from coordinator.strategies.state import StateStore
from protocols.errors import BadWeights, CommonweightError
from protocols.model import weights
from protocols.model.weights import Part, Weights
from protocols.tables.trees import layout
from tests.support.tree_peers import Array, Forest

FOREST = Forest.of(4, trees=2, depth=3, bins=8, min_weight=0.2)
PEERS = ("a", "b", "c")


class Coordinator:
    """Commits levels, each several times, as after kills before the ledger names them."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.states = StateStore(folder)
        self.version, self.state = Weights(FOREST.first()), dict[str, str]()
        rng = np.random.default_rng(0)
        x = rng.normal(size=(90, 4))
        y = (x[:, 0] + x[:, 1] > 0).astype(np.int64)
        self.rows = [FOREST.rows(x[n::3], y[n::3]) for n in range(3)]

    def decide(self) -> tuple[Weights, dict[str, str]]:
        at, numbers = layout.read(self.version, FOREST.shape)
        sums = [rows.sums(self.version, at, numbers, masked=False) for rows in self.rows]
        updates = [
            InputUpdate(Weights({"sums": np.asarray(one)}), 1 / 3, 1.0, 30, {}) for one in sums
        ]
        adapter = strategies.find(trees.NAME)
        aggregation = Aggregation(
            adapter, adapter.make({}), {}, 1, self.version, self.version, updates,
            {"num-examples": 90}, self.states, self.state, None, PEERS,
        )  # fmt: skip
        made: dict[str, list[Array]] = {}
        for piece in aggregation.pieces():
            for part, array in piece.items():
                made.setdefault(part.name, []).append(array)
        schema = self.version.schema
        whole = {n: np.concatenate(made[n]).reshape(spec.shape) for n, spec in schema.items()}
        return Weights(whole), aggregation.new_state

    def commit(self, tries: int = 1) -> None:
        found = [self.decide() for _ in range(tries)]
        assert len({weights.digest(version) for version, _ in found}) == 1
        assert all(state == found[0][1] for _, state in found)
        self.version, self.state = found[-1]


def test_a_level_that_is_decided_again_is_the_same(tmp_path: Path) -> None:
    often, once = Coordinator(tmp_path / "often"), Coordinator(tmp_path / "once")
    for _ in range(7):
        often.commit(tries=3)
        once.commit()
        assert weights.digest(often.version) == weights.digest(once.version)
    assert (often.version["feature"][:, 0, 1:3] >= 0).any()
    assert often.version["at"].tolist()[:2] == [2, 0]


def test_a_lost_state_ends_the_tree_and_a_damaged_one_the_run(tmp_path: Path) -> None:
    found = Coordinator(tmp_path)
    for _ in range(2):
        found.commit()
    state = found.state
    found.state = {}
    version, _ = found.decide()
    assert (version["feature"][0, 0, 1:] == -1).all()
    found.state = state
    found.states = StateStore(tmp_path)
    found.states.path(state[CUSTOM_SLOT]).write_bytes(b"")
    with pytest.raises(CommonweightError, match="state own"):
        found.decide()


def test_a_version_without_trees_is_refused() -> None:
    other = Weights({"w": np.zeros(3, np.float32)})
    assert other.read(Part("w", 0, 3)).shape == (3,)
    with pytest.raises(BadWeights, match="no trees"):
        trees.grow(other, {}, [], 1, bytes(32))
