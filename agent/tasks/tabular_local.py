"""How the task "tabular" trains on one machine alone, and measures models row by row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.data.features import EncodedRows
from agent.tasks import LocalRounds, OnStep
from agent.tasks import Settings as RunSettings
from agent.tasks.tabular_trees import TreeModel
from agent.tasks.training.built_in import BuiltInTask
from agent.tasks.training.local_models import RowMetrics
from agent.tasks.training.seeds import split_aside
from agent.tasks.training.torch_task import LastValue
from protocols.model.weights import Weights
from protocols.tables import class_weights
from protocols.tables.preprocessing import Target, decode
from protocols.tables.trees.histograms import GrowingRows

#: A run over many peers learns in fewer rounds than one machine does.
MIN_LOCAL_ROUNDS = 50


class LocalTables(BuiltInTask):
    """A task on tables, with linear models, perceptrons or trees."""

    _alone: LastValue[GrowingRows]
    _told: LastValue[tuple[npt.NDArray[np.generic], npt.NDArray[np.float64]]]

    def _trees(self, settings: RunSettings) -> TreeModel | None:
        raise NotImplementedError

    def local_rounds(self, settings: RunSettings, rounds: int) -> LocalRounds:
        """As many as the run had, or more, since few rows make few steps; of trees, a round is a
        tree."""
        if self._trees(settings) is None:
            return super().local_rounds(settings, max(rounds, MIN_LOCAL_ROUNDS))
        return LocalRounds(int(self._read(settings).trees), patience=10)

    def continued(self, weights: Weights, settings: RunSettings) -> Weights:
        """Trees have room for as many more as a run has."""
        if (trees := self._trees(settings)) is None:
            return weights
        return trees.continued(weights, trees.shape.trees)

    def train_locally(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> Weights:
        """A round of training, or one more tree."""
        if (trees := self._trees(settings)) is None:
            return super().train_locally(weights, settings, on_step)
        rows = self._sets(settings)[0]
        if self._aside:
            kept, _ = split_aside(len(rows.y), self._data.index, self._aside)
            rows = EncodedRows(rows.x[kept], rows.y[kept])
        key = settings["preprocessing"], trees.objective, self._aside
        growing = self._alone.get(key, lambda: trees.rows(rows, 1))
        grown = trees.of_size(weights).grow_alone(weights, growing, len(rows.y))
        on_step(1, 1, math.nan, len(rows.y))
        return grown

    def _told_weights(self, of: Target, settings: RunSettings) -> npt.NDArray[np.float64]:
        """The weights of the classes in a loss over the held-out rows. They are counted once, and
        not for each batch."""
        held_out = self._sets(settings)[1].y
        told = class_weights.of_told_rows
        key = of.weights, id(held_out)
        # The rows are kept with the weights, so that no others get their id.
        return self._told.get(
            key, lambda: (held_out, told(of.weights, held_out, self._data.min_count))
        )[1]

    def _measure_each(self, output: Any, target: Any, settings: Any) -> RowMetrics:
        of = decode(str(settings["preprocessing"])).target
        if of.classes and of.weights:  # an accuracy would not have them
            found = super()._measure_each(output, target, settings)
            weights = self._told_weights(of, settings)[target.cpu().numpy()]
            del found["accuracy"]
            return {**found, "loss": found["loss"] * weights}
        if of.classes:
            return super()._measure_each(output, target, settings)
        squares = (output - target).double().square().flatten().cpu().numpy()
        return {"loss": squares, "mse": squares * of.scale**2, "mae": np.sqrt(squares) * of.scale}
