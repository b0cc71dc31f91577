"""The task "tabular": predicts a class or a number from the other columns of a table, without code.

    commonweight run start tabular --target price [--kind regression] [--features rooms,area]

Before round 1 the peers send statistics of their tables. The coordinator derives one preprocessing
for all (`protocols.tables.preprocessing` has the rules), which comes with the settings. With the
model "trees", an update is the sums of one level (`protocols.tables.trees`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.data import features, open_table
from agent.data import profile as survey
from agent.data.disclosed_sets import Numbers, Use
from agent.data.features import EncodedRows
from agent.data.settings import DataSettings
from agent.tasks import OnStep, TrainOutcome, Watch, table_rows, tabular_choice
from agent.tasks import Settings as RunSettings
from agent.tasks.tabular_blend import Blend, mix, with_kind
from agent.tasks.tabular_local import LocalTables
from agent.tasks.tabular_model import TableModel
from agent.tasks.tabular_trees import TreeModel
from agent.tasks.training import module_losses
from agent.tasks.training.classification import predict_classes
from agent.tasks.training.evaluation import BatchResult
from agent.tasks.training.seeds import random_state
from agent.tasks.training.torch_loop import LossOf, PrivateLoss
from agent.tasks.training.torch_task import LastValue
from protocols.errors import DataError, UsageError
from protocols.model.built_in_settings import TabularSettings
from protocols.model.weights import Schema, Weights
from protocols.tables import evaluation_counts, preprocessing
from protocols.tables.model_scores import AUTO, ModelScores
from protocols.tables.preprocessing import Preprocessing
from protocols.tables.statistics import TableStatistics
from protocols.tables.trees import layout
from protocols.tables.trees.histograms import GrowingRows

EVALUATION_BATCH = 8192
#: The format of exported trees.
XGBOOST = "xgboost"


class Tabular(LocalTables):
    """The task."""

    forms = (XGBOOST,)
    Settings = TabularSettings
    _reads = ("split_by",)
    #: The number of rows is known only in round 1.
    count_examples = None  # type: ignore[assignment]
    #: The numbers of the rows behind each use, if this machine remembers them.
    _numbers: Mapping[Use, Numbers | None] = MappingProxyType({})
    _surveyed: Numbers | None = None
    #: Of the rows to train on, if the latest rows are held out.
    _times: table_rows.Times | None = None

    def load(self, data: DataSettings) -> None:
        super().load(data)
        self._growing, self._alone = LastValue[GrowingRows](), LastValue[GrowingRows]()
        self._told = LastValue()

    # --- what all peers share ---

    def survey(self, settings: RunSettings) -> TableStatistics:
        """Statistics of this peer's table that may leave the machine. Raises DataError."""
        self._read(settings)
        wanted = preprocessing.parse_settings(settings)
        with table_rows.admitted(self._data) as (reader, numbers, _):
            self._surveyed = numbers
            return survey.survey(reader, self._data, wanted)

    def score_models(
        self, settings: RunSettings, watch: Watch, on_step: OnStep
    ) -> ModelScores | None:
        """The scores of the models by a cross-validation over rows that this peer trains on; None
        unless the run asks which is the best. Raises DataError."""
        read = self._read(settings)
        if read.model != AUTO:
            return None
        rows, least = self._sets(settings)[0], self._data.min_count
        make = partial(_Fold, self._data)
        own = {**settings, **read}
        return tabular_choice.score(rows, own, least, make, watch, on_step, self._times)

    def schema(self, settings: RunSettings) -> Schema:
        trees = self._trees(settings)
        return super().schema(settings) if trees is None else trees.schema()

    def traits(self, settings: RunSettings) -> Mapping[str, Sequence[str]]:
        """Reads the table, so that errors in it show early. Raises DataError."""
        made = _preprocessing(settings)
        wanted = preprocessing.parse_settings(settings)
        with table_rows.admitted(self._data) as (reader, _, _):
            survey.check_table(reader, self._data, made, wanted)
        self._sets(settings)
        return {
            "features": [feature.name for feature in made.features],
            "classes": made.target.classes,
            "target": (made.target.name,),
            "preprocessing": (preprocessing.digest(str(settings["preprocessing"])),),
        }

    def init(self, seed: int, settings: RunSettings) -> Weights:
        """Layers uniform in ±1/√fan-in; embeddings and linear models begin at 0."""
        if (trees := self._trees(settings)) is not None:
            return trees.first()
        is_linear, draw = self._read(settings).model == "linear", random_state("init", seed)
        made = {}
        for name, spec in self.schema(settings).items():
            fan_in = spec.shape[-1] if name.endswith("weight") else 0
            zero = is_linear or name.startswith("embedding") or not fan_in
            bound = 0.0 if zero else 1 / math.sqrt(fan_in)
            made[name] = draw.uniform(-bound, bound, spec.shape).astype(np.float32)
        return Weights(made)

    def model(self, settings: Any) -> TableModel:
        sizes = settings.hidden if settings.model == "mlp" else None
        return TableModel(_preprocessing(settings), sizes)

    # --- trees ---

    def _trees(self, settings: RunSettings) -> TreeModel | None:
        """The trees of a run; None for another model. Raises UsageError."""
        read = self._read(settings)
        if read.model == AUTO:
            raise UsageError("the run has not chosen its model yet", "--set model=linear")
        return TreeModel.of(_preprocessing(settings), read) if read.model == "trees" else None

    def train(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> TrainOutcome:
        """On cross-entropy, or on squared error of the scaled target; trees on their objective."""
        if (trees := self._trees(settings)) is None:
            return super().train(weights, settings, on_step)
        rows = self._sets(settings)[0]
        self._local.start_single_step(len(rows.y))
        growing = self._growing.get(
            (self._data_key(settings), trees.objective),
            lambda: trees.rows(rows, self._data.min_count),
        )
        at, numbers = trees.read(weights)
        # Hessians leave only in a secure sum.
        sums = growing.sums(weights, at, numbers, masked=bool(settings.get("masked")))
        on_step(1, 1, 0.0, len(rows.y))
        return TrainOutcome({layout.SUMS: sums}, len(rows.y), {})

    def sums_schema(self, weights: Weights, settings: RunSettings) -> Schema | None:
        """The schema of the sums that an update of trees has; None for other models."""
        trees = self._trees(settings)
        return None if trees is None else trees.sums_schema(weights)

    def _ready(self, weights: Weights, settings: RunSettings) -> Callable[[Any], Any]:
        if (blend := Blend.read(weights)) is not None:
            calls = [self._ready(one.weights, with_kind(settings, one)) for one in blend.members]
            is_class = bool(_preprocessing(settings).target.classes)
            shares = blend.shares.tolist()
            return lambda x: mix([call(x) for call in calls], shares, is_class=is_class)
        trees = self._trees(settings)
        if trees is None:
            return super()._ready(weights, settings)
        return trees.of_size(weights).forward(weights)

    def export(
        self, weights: Weights, settings: RunSettings, form: str, data: DataSettings, out: Path
    ) -> None:
        """Trees as a model of XGBoost (JSON)."""
        if Blend.read(weights) is not None:
            raise UsageError("a blend of several models has no form for XGBoost", "--use shared")
        if (trees := self._trees(settings)) is None:
            raise UsageError("only trees can be written for XGBoost", "--set model=trees")
        out.write_bytes(trees.of_size(weights).to_json(weights))

    # --- data ---

    def rows_of(self, use: Use, settings: RunSettings) -> Numbers | None:
        if use == "table":
            return self._surveyed
        self._sets(settings)
        return self._numbers[use]

    def data(self, source: DataSettings, settings: Any) -> tuple[EncodedRows, EncodedRows]:
        """This peer's rows; read when the preprocessing is known."""
        made = _preprocessing(settings)
        read = table_rows.read(self._data, made, settings.split_by)
        self._numbers = {"train": read.numbers[0], "held": read.numbers[1]}
        self._times = read.times
        return read.trained_on, read.held_out

    # --- losses with weights of classes ---

    def _loss_of(self, model: nn.Module) -> LossOf:
        weights = cast(TableModel, model).class_weights
        if weights is None:
            return super()._loss_of(model)
        loss = partial(_weighted_loss, weights)
        return module_losses.mean_loss(loss, model, compiled=self._data.compile)

    def _private_loss(self, model: nn.Module) -> PrivateLoss:
        weights = cast(TableModel, model).class_weights
        plain = super()._private_loss(model)
        if weights is None:
            return plain
        return plain._replace(losses_of=lambda w, x, y: plain.losses_of(w, x, y) * weights[y])

    # --- evaluations and predictions ---

    def _evaluation_batch(self, settings: RunSettings) -> int:
        return EVALUATION_BATCH

    def _measure(self, output: Any, target: Any, count: int, settings: Any) -> BatchResult:
        """Of numbers: "loss" (of the scaled target), "mse" and "mae" (in the target's units). With
        weights of classes, the loss has them."""
        of = _preprocessing(settings).target
        if of.classes:
            found = super()._measure(output, target, count, settings)
            if not of.weights:
                return found
            weights = torch.tensor(self._told_weights(of, settings), device=output.device)
            loss = float(_weighted_loss(weights, output, target)) * count
            return found._replace(sums={**found.sums, "loss": loss})
        error = (output - target).double()
        # The mean is subtracted, so that no sum reveals the location of the target.
        in_units = ((t.double().flatten() * of.scale).tolist() for t in (target, output))
        told = {"regression": evaluation_counts.sum_regression(*in_units)}
        squares, sizes = float(error.square().sum()), float(error.abs().sum())
        sums = {"loss": squares, "mse": squares * of.scale**2, "mae": sizes * of.scale}
        return BatchResult(count, sums, told if math.isfinite(squares) else {})

    def inputs(self, path: str, settings: Any) -> Iterator[Tensor]:
        """The encoded rows of a table. Raises UsageError, DataError."""
        made = _preprocessing(settings)
        reader = table_rows.as_said(open_table(DataSettings(path=path)), self._data)
        there = set(reader.columns())
        names = [feature.name for feature in made.features if feature.name in there]
        if not names:
            raise UsageError(
                "the table has none of the model's features",
                f"they are {', '.join(feature.name for feature in made.features)}",
            )
        batches = reader.batches(names)
        return (torch.from_numpy(features.encode_inputs(batch, made)) for batch in batches)

    def answers(self, output: Any, settings: Any) -> Mapping[str, Sequence[Any]]:
        """The target, and the probability of a class."""
        target = _preprocessing(settings).target
        if not target.classes:
            return {target.name: (output[:, 0].double() * target.scale + target.mean).tolist()}
        found = predict_classes(output)
        classes = [target.classes[place] for place in found["class"]]
        return {target.name: classes, "probability": found["probability"]}


def _weighted_loss(weights: Tensor, output: Tensor, target: Tensor) -> Tensor:
    """The mean over rows of weight · cross-entropy. The divisor is the number of rows, so that the
    mean over peers is that over all rows."""
    return (F.cross_entropy(output, target, reduction="none") * weights[target]).mean()


class _Fold(Tabular):
    """The task with some of a peer's rows."""

    def __init__(self, data: DataSettings, *parts: EncodedRows) -> None:
        super().__init__()
        self.load(data)
        self._parts = parts[0], parts[1]

    def _sets(self, settings: RunSettings) -> tuple[EncodedRows, EncodedRows]:
        return self._parts


def _preprocessing(settings: RunSettings) -> Preprocessing:
    text = settings.get("preprocessing")
    if not text:
        raise DataError("the peers' tables were not surveyed before the run")
    return preprocessing.decode(str(text))
