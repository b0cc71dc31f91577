"""How the task "tabular" trains on one machine alone, and measures models row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from agent.data.features import EncodedRows
from agent.tasks import OnStep, tabular_blend
from agent.tasks import Settings as RunSettings
from agent.tasks.capabilities import LocalRounds, Member
from agent.tasks.tabular_blend import Blend
from agent.tasks.tabular_trees import TreeModel
from agent.tasks.training.built_in import BuiltInTask
from agent.tasks.training.local_models import RowMetrics
from agent.tasks.training.seeds import split_aside
from agent.tasks.training.torch_task import LastValue
from protocols.errors import BadWeights, UsageError
from protocols.model.weights import Weights, check_schema
from protocols.tables import class_weights
from protocols.tables.preprocessing import Target, decode
from protocols.tables.trees.histograms import GrowingRows

#: A run over many peers learns in fewer rounds than one machine does.
MIN_LOCAL_ROUNDS = 50
#: Rows whose outputs are computed at once.
_BLOCK = 1 << 13


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

    @torch.inference_mode()
    def blend_models(
        self, members: Sequence[Member], settings: RunSettings, on_step: OnStep
    ) -> tuple[Weights, RowMetrics] | None:
        """See `tabular_blend`."""
        rows, of = self._sets(settings)[1], decode(str(settings["preprocessing"])).target
        if not tabular_blend.fits(len(rows.y), max(1, len(of.classes)), len(members)):
            return None
        used, found = list[Member](), list[torch.Tensor]()
        for number, member in enumerate(members, 1):
            outputs = self._outputs(member, settings, rows.x)
            if outputs is not None and outputs.isfinite().all():
                used.append(member)
                found.append(outputs)
            on_step(number, len(members), math.nan, 0)
        if len(used) < 2:
            return None
        counted = self._told_weights(of, settings)[rows.y] if of.weights else None
        truth = np.asarray(rows.y)
        shares, mean = tabular_blend.weigh(found, truth, counted)
        blend = Blend(tuple(used), shares).to_weights()
        return blend, dict(self._measure_each(mean, torch.from_numpy(truth), settings))

    def _outputs(
        self, member: Member, settings: RunSettings, x: npt.NDArray[np.float32]
    ) -> torch.Tensor | None:
        """The outputs of a model; None if its weights are not those of such a model, or if no such
        model can be for this target."""
        of = tabular_blend.with_kind(settings, member)
        try:
            if (trees := self._trees(of)) is None:
                check_schema(member.weights.schema, self.schema(of))
            else:
                trees.check_tensors(member.weights)
            call = self._ready(member.weights, of)
            blocks = (
                torch.from_numpy(np.array(x[at : at + _BLOCK])) for at in range(0, len(x), _BLOCK)
            )
            return torch.cat([call(block.to(self._device)).cpu() for block in blocks])
        except (BadWeights, UsageError):
            return None

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
