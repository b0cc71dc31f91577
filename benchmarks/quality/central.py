"""XGBoost on all rows of all peers: what a fleet's trees are compared with."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from agent.data.features import EncodedRows
from agent.tasks.tabular_trees import TreeModel
from benchmarks.quality.real_tables import Array
from benchmarks.quality.table_models import Peers, join
from protocols.tables.trees import growth, layout
from protocols.tables.trees.histograms import bins_of

#: Trees without a better one after which XGBoost ends, as many as in a run.
EARLY_STOPPING = 40


class Central(NamedTuple):
    """XGBoost on all rows of all peers, with the settings of our trees.

    `held_out` chooses how many trees count, as in a run. With `cuts` it has those of our trees.
    """

    peers: Peers
    cuts: tuple[Array, Array] | None = None

    def score(self) -> float:
        """On the test."""
        import xgboost

        model = self.peers.model()
        params = {
            "objective": _objective(self.peers),
            "base_score": 0.5 if self.peers.is_class else 0.0,
            "tree_method": "hist",
            "max_depth": model.shape.depth,
            "eta": model.numbers.eta,
            "lambda": model.numbers.l2,
            "min_child_weight": model.numbers.min_weight,
            "nthread": 1,
        }
        if self.cuts is not None:
            params["max_cat_to_onehot"] = 1
        train, held_out, test = (
            self._matrix(rows)
            for rows in (join(self.peers.train), self.peers.held_out, self.peers.test)
        )
        booster = xgboost.train(
            params, train, model.shape.trees, evals=[(held_out, "held_out")],
            early_stopping_rounds=EARLY_STOPPING, verbose_eval=False,
        )  # fmt: skip
        best = 0, booster.best_iteration + 1
        return self._score(booster.predict(test, output_margin=True, iteration_range=best))

    def score_of_defaults(self) -> float:
        """On the test, with XGBoost's defaults: 100 trees on all rows, with a larger step."""
        import xgboost

        peers = self.peers
        params = {"objective": _objective(peers), "tree_method": "hist", "nthread": 1}
        rows = self._matrix(join([*peers.train, peers.held_out]))
        booster = xgboost.train(params, rows, 100)
        return self._score(booster.predict(self._matrix(peers.test), output_margin=True))

    def _score(self, margins: Array) -> float:
        outputs = np.asarray(margins, np.float64)[:, None]
        return self.peers.score(self.peers.model().objective.outputs_of(outputs), self.peers.test)

    def _matrix(self, rows: EncodedRows) -> Any:
        import xgboost

        model = self.peers.model()
        kinds = ["c" if feature.categories else "float" for feature in model.features]
        if self.cuts is None:
            x = _with_gaps(model, rows.x)
        else:
            x = bins_of(model.slots(rows.x), *self.cuts).astype(np.float32)
            numbers = [kind == "float" for kind in kinds]
            x[:, numbers] = np.where(x[:, numbers] == 0, np.nan, x[:, numbers])
        return xgboost.DMatrix(x, rows.y.reshape(-1), feature_types=kinds, enable_categorical=True)


def _objective(peers: Peers) -> str:
    return "binary:logistic" if peers.is_class else "reg:squarederror"


def _with_gaps(model: TreeModel, x: Array) -> Array:
    """The inputs with NaN for missing numbers, in place of the flags."""
    count = len(model.gaps)
    numbers, gap = np.array(x[:, :count]), count
    for place, has_gaps in enumerate(model.gaps):
        if has_gaps:
            numbers[x[:, gap] == 1, place] = np.nan
            gap += 1
    return np.concatenate([numbers, x[:, gap:]], 1)


def cuts_of(peers: Peers) -> tuple[Array, Array]:
    """The cuts of our trees over these rows, and which features are categories."""
    model, version = peers.model(), dict(peers.model().first())
    at, numbers = layout.read(version, model.shape)
    sums = sum(model.rows(rows, 1).sums(version, at, numbers, masked=True) for rows in peers.train)
    rows = sum(len(rows.y) for rows in peers.train)
    grown = growth.grow(version, (at, numbers), {}, np.asarray(sums), rows, bytes(32)).version
    return grown["cuts"], grown["kinds"]
