"""The task "tabular": predicts a class or a number from the other columns of a table, without code.

    commonweight run start tabular --target price [--kind regression] [--features rooms,area]

Before round 1 the peers send statistics of their tables. The coordinator derives one preprocessing
for all (`protocols.tables.preprocessing` has the rules), which comes with the settings. With the
model "trees", an update is the sums of one level (`protocols.tables.trees`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from agent.data import Reader, features, open_table
from agent.data import profile as survey
from agent.data.admission import HELD_OUT_OF, Mask, Split, split_classes
from agent.data.disclosed_sets import Numbers, Use
from agent.data.features import EncodedRows
from agent.data.settings import DataSettings
from agent.data.table_memory import TableMemory
from agent.tasks import EvalOutcome, OnStep, TrainOutcome
from agent.tasks import Settings as RunSettings
from agent.tasks.tabular_model import TableModel
from agent.tasks.tabular_trees import TreeModel
from agent.tasks.training import task_settings
from agent.tasks.training.classification import evaluate_classifier, to_tensors
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.regression import evaluate_regression
from agent.tasks.training.seeds import random_state
from agent.tasks.training.task_settings import TaskSettings
from agent.tasks.training.torch_loop import Examples, PrivateLoss, autograd_step
from agent.tasks.training.torch_task import LastValue, LoopTask
from protocols.errors import DataError, UsageError
from protocols.model.built_in_settings import BY_TASK, TabularSettings
from protocols.model.weights import Schema, Weights
from protocols.tables import preprocessing
from protocols.tables.preprocessing import Preprocessing
from protocols.tables.statistics import TableStatistics
from protocols.tables.trees import layout
from protocols.tables.trees.histograms import GrowingRows

EVALUATION_BATCH = 8192
#: The format of exported trees.
XGBOOST = "xgboost"
#: Fewer rows cannot be split into training and held-out rows.
_MIN_ROWS = HELD_OUT_OF


class _Rows(NamedTuple):
    """As `EncodedTable`, with the numbers of the rows if this machine remembers them."""

    trained_on: EncodedRows
    held_out: EncodedRows
    dropped: int
    train_numbers: Numbers | None
    held_numbers: Numbers | None


class Tabular(LoopTask):
    """The task."""

    Settings = TabularSettings
    forms = (XGBOOST,)

    def __init__(self) -> None:
        super().__init__()
        self._surveyed: Numbers | None = None
        self._growing = LastValue[GrowingRows]()

    def load(self, data: DataSettings) -> None:
        super().load(data)
        self._growing = LastValue()

    # --- what all peers share ---

    def survey(self, settings: RunSettings) -> TableStatistics:
        """Statistics of this peer's table that may leave the machine. Raises DataError."""
        _read(settings)
        wanted = preprocessing.parse_settings(settings)
        with self._admitted() as (reader, numbers, _):
            self._surveyed = numbers
            return survey.survey(reader, self._data, wanted)

    def schema(self, settings: RunSettings) -> Schema:
        return _model(settings).schema()

    def traits(self, settings: RunSettings) -> Mapping[str, Sequence[str]]:
        """Reads the table, so that errors in it show early. Raises DataError."""
        made = _preprocessing(settings)
        wanted = preprocessing.parse_settings(settings)
        with self._admitted() as (reader, _, _):
            survey.check_table(reader, self._data, made, wanted)
        self._rows(settings)
        return {
            "features": [feature.name for feature in made.features],
            "classes": made.target.classes,
            "target": (made.target.name,),
            "preprocessing": (preprocessing.digest(str(settings["preprocessing"])),),
        }

    def init(self, seed: int, settings: RunSettings) -> Weights:
        """Layers uniform in ±1/√fan-in; embeddings and linear models begin at 0."""
        model, draw = _model(settings), random_state("init", seed)
        if isinstance(model, TreeModel):
            return model.first()
        made = {}
        for name, spec in model.schema().items():
            fan_in = spec.shape[-1] if name.endswith("weight") else 0
            zero = model.linear or name.startswith("embedding") or not fan_in
            bound = 0.0 if zero else 1 / math.sqrt(fan_in)
            made[name] = draw.uniform(-bound, bound, spec.shape).astype(np.float32)
        return Weights(made)

    # --- data ---

    @contextmanager
    def _admitted(self) -> Iterator[tuple[Reader, Numbers | None, TableMemory | None]]:
        """The rows that may be used, and their numbers if this machine remembers them."""
        reader = open_table(self._data)
        if not self._data.memory:
            yield reader, None, None
            return
        with closing(TableMemory(Path(self._data.memory))) as memory:
            yield *memory.admit(reader, self._data.min_count), memory

    def rows_of(self, use: Use, settings: RunSettings) -> Numbers | None:
        if use == "table":
            return self._surveyed
        rows = self._rows(settings)
        return rows.train_numbers if use == "train" else rows.held_numbers

    def _rows(self, settings: RunSettings) -> _Rows:
        """This peer's rows; read when the preprocessing is known."""
        rows: _Rows = self._read_data.get(
            str(settings["preprocessing"]), lambda: self._read_rows(_preprocessing(settings))
        )
        return rows

    def _read_rows(self, made: Preprocessing) -> _Rows:
        words = "held out", self._data.seed, self._data.index
        folder, least_count = Path(self._data.cache or "."), self._data.min_alike

        def draw(count: int, group: int) -> Mask:
            chance = random_state(*words, *([group] if group else []))
            return features.draw_held_out(chance, count)

        with self._admitted() as (reader, numbers, memory):
            survey.check_columns(reader.columns(), self._data, made)
            split = None
            parts: tuple[Numbers | None, Numbers | None] = None, None
            if memory is not None and numbers is not None:
                name, known = " ".join(map(str, words)), numbers

                def divide(usable: Mask) -> Split:
                    least = self._data.min_count
                    return memory.admission.split(name, known, usable, least, draw)

                classes = features.read_classes(reader, made)
                split = split_classes(classes, least_count, divide)
                parts = numbers[split.train], numbers[split.held_out]
            table = features.encode_table(
                reader, made, random_state(*words), folder, split, least_count
            )
        rows = _Rows(*table, *parts)
        count = len(rows.trained_on.y) + len(rows.held_out.y)
        least = max(_MIN_ROWS, self._data.min_rows)
        if count < least:
            raise DataError(
                f"fewer than {least} rows have a target that all peers know",
                f"{count} rows have one, {rows.dropped} do not",
            )
        return rows

    # --- loop ---

    def train(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> TrainOutcome:
        """On cross-entropy, or on squared error of the scaled target; trees on their objective."""
        plan, model = self._hyperparameters(settings), _model(settings)
        if isinstance(model, TreeModel):
            return self._grow(model, weights, settings, on_step)
        loss = F.cross_entropy if _preprocessing(settings).target.classes else F.mse_loss

        def loss_of(w: Tensors, x: Tensor, y: Tensor) -> Tensor:
            return loss(model.forward(w, x), y)

        def losses_of(w: Tensors, x: Tensor, y: Tensor) -> Tensor:
            losses = loss(model.forward(w, x), y, reduction="none")
            return losses.flatten(1).mean(1) if losses.dim() > 1 else losses

        examples = self._examples(self._rows(settings).trained_on)
        return self._local.train(
            weights,
            plan,
            examples,
            autograd_step(loss_of),
            on_step,
            private_loss=PrivateLoss(losses_of),
        )

    def sums_schema(self, weights: Weights, settings: RunSettings) -> Schema | None:
        """The schema of the sums that an update of trees has; None for other models."""
        model = _model(settings)
        return model.sums_schema(weights) if isinstance(model, TreeModel) else None

    def _grow(
        self, model: TreeModel, weights: Weights, settings: RunSettings, on_step: OnStep
    ) -> TrainOutcome:
        """The sums that the version asks for. Hessians leave only in a secure sum (`masked`)."""
        rows = self._rows(settings).trained_on
        self._local.start_single_step(len(rows.y))
        growing = self._growing.get(
            (settings["preprocessing"], model.objective),
            lambda: model.rows(rows, self._data.min_count),
        )
        at, numbers = layout.read(weights, model.shape)
        sums = growing.sums(weights, at, numbers, masked=bool(settings.get("masked")))
        on_step(1, 1, 0.0, len(rows.y))
        return TrainOutcome({layout.SUMS: sums}, len(rows.y), {})

    def evaluate(self, weights: Weights, settings: RunSettings, on_step: OnStep) -> EvalOutcome:
        """On held-out rows: "loss" and "accuracy", or "loss" (of the scaled target), "mse" and
        "mae" (in the target's own units)."""
        target = _preprocessing(settings).target
        forward = self._inference(settings, _model(settings).forward)
        examples = self._examples(self._rows(settings).held_out)
        if target.classes:
            return evaluate_classifier(forward, weights, examples, EVALUATION_BATCH, on_step)
        return evaluate_regression(
            forward, weights, examples, EVALUATION_BATCH, target.scale, on_step
        )

    def _examples(self, rows: EncodedRows) -> Examples:
        x, y = (torch.from_numpy(array).to(self._device) for array in rows)
        return Examples(x, y, self._data.index)

    # --- predictions ---

    @torch.inference_mode()
    def predict(
        self, weights: Weights, settings: RunSettings, source: str
    ) -> Iterator[Mapping[str, Sequence[Any]]]:
        """For each row of a table: its number, the target, and the probability of a class."""
        forward, made = (
            self._inference(settings, _model(settings).forward),
            _preprocessing(settings),
        )
        target, device = made.target, self._device
        w = to_tensors(weights, device)
        reader = open_table(DataSettings(path=source))
        there = set(reader.columns())
        names = [feature.name for feature in made.features if feature.name in there]
        if not names:
            raise UsageError(
                "the table has none of the model's features",
                f"they are {', '.join(feature.name for feature in made.features)}",
            )
        first = 0
        for batch in reader.batches(names):
            x = torch.from_numpy(features.encode_inputs(batch, made)).to(device)
            out = forward(w, x)
            rows = {"row": range(first, first + len(batch))}
            first += len(batch)
            if target.classes:
                chances, chosen = out.softmax(1).max(1)
                classes = [target.classes[place] for place in chosen.tolist()]
                yield {**rows, target.name: classes, "probability": chances.tolist()}
            else:
                yield {
                    **rows,
                    target.name: (out[:, 0].double() * target.scale + target.mean).tolist(),
                }

    def export(
        self, weights: Weights, settings: RunSettings, form: str, data: DataSettings, out: Path
    ) -> None:
        """Trees as a model of XGBoost (JSON)."""
        model = _model(settings)
        if not isinstance(model, TreeModel):
            raise UsageError("only trees can be written for XGBoost", "--set model=trees")
        out.write_bytes(model.to_json(weights))


def _preprocessing(settings: RunSettings) -> Preprocessing:
    text = settings.get("preprocessing")
    if not text:
        raise DataError("the peers' tables were not surveyed before the run")
    return preprocessing.decode(str(text))


def _read(settings: RunSettings) -> TaskSettings:
    return task_settings.read(settings, BY_TASK["tabular"], TabularSettings)


def _model(settings: RunSettings) -> TableModel | TreeModel:
    """Raises UnknownName, UsageError, DataError."""
    chosen = _read(settings)
    if chosen.model == "trees":
        return TreeModel.of(_preprocessing(settings), chosen)
    sizes = chosen.hidden if chosen.model == "mlp" else None
    return TableModel.of(_preprocessing(settings), sizes)
