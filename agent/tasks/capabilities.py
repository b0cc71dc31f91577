"""What a task may be able to do beyond `Task`: one small protocol for each capability.

A task has a capability if it has the methods; it need not name the protocol. The trainer asks with
`isinstance`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from agent.data.disclosed_sets import Numbers, Use
from agent.data.settings import DataSettings
from agent.tasks import OnStep, Settings, Snapshot, Watch
from protocols.model.setting_specs import SettingSpec
from protocols.model.weights import Array, Schema, Weights
from protocols.privacy.events import Event
from protocols.privacy.private_training import PrivateTraining
from protocols.tables.class_names import ClassCounts
from protocols.tables.model_scores import ModelScores
from protocols.tables.statistics import TableStatistics


@runtime_checkable
class Resumable(Protocol):
    """Optional: resume training after a kill or a power cut.

    The trainer saves the RNG state of Python, numpy and torch; the task saves any other state.
    """

    def snapshot(self) -> Snapshot:
        """The current state of `train`. Called from within `on_step`; arrays may be views."""

    def restore(self, snapshot: Snapshot) -> None:
        """Make the next `train`, with the same weights, settings and data, resume from here."""


@runtime_checkable
class ProvidesStatistics(Protocol):
    """Optional: provide statistics from which the coordinator derives the preprocessing.

    The coordinator merges them. The result (`protocols.tables.preprocessing`, or `class_names` for
    classes) comes with all later settings as "preprocessing". Until then, only `load` and `survey`
    are called.
    """

    def survey(self, settings: Settings) -> TableStatistics | ClassCounts | None:
        """Mergeable statistics, no rows; None if these settings need no preprocessing.

        Called after `load`. Raises DataError.
        """


@runtime_checkable
class ScoresModels(Protocol):
    """Optional: compare the models that a run chooses from before round 1."""

    def score_models(self, settings: Settings, watch: Watch, on_step: OnStep) -> ModelScores | None:
        """Metrics of each model over this peer's training examples; None if the run does not ask.

        It calls `watch` with the places of the examples that the scores depend on, before it uses
        them. Called after `load`. Raises CommonweightError.
        """


@runtime_checkable
class KnowsRows(Protocol):
    """Optional: name the rows of the owner that an answer depends on.

    The trainer records them, and refuses an answer whose rows differ from those of an earlier one
    in fewer than the owner's `data_min_count` (`agent.data.disclosed_sets`).
    """

    def rows_of(self, use: Use, settings: Settings) -> Numbers | None:
        """The numbers of the rows of a use, int64[n]; None if they are no rows of the owner.

        "table": those of the last `survey`. "train" and "held": those of `train`, in the order of
        its examples, and of `evaluate`. The same array means the same rows. Called after `load`.
        """


@runtime_checkable
class CountsExamples(Protocol):
    """Optional: count the examples before round 1. No later claim of this peer may exceed them."""

    def count_examples(self, settings: Settings) -> tuple[int, int]:
        """How many examples `train` and `evaluate` use. Called after `load`."""


@runtime_checkable
class WatchesEpochs(Protocol):
    """Optional, with `KnowsRows`: say which examples an epoch of `train` uses, as one that ends
    early uses a part."""

    def watch_epochs(self, watch: Watch) -> None:
        """Make the next `train` call this before each epoch, with the places of the examples that
        it uses, in `rows_of("train")`. It may raise CommonweightError."""


@runtime_checkable
class HasMetadata(Protocol):
    """Optional: name what else, beside tensors, must be the same on all peers."""

    def traits(self, settings: Settings) -> Mapping[str, Sequence[str] | str]:
        """Lists of words by field: "features", "classes", "preprocessing" and the like.

        Called after `load`. They leave the machine and are compared before round 1. A peer that
        differs gets the name of the field; the others continue.
        """


@runtime_checkable
class SupportsScaffold(Protocol):
    """Optional: let SCAFFOLD correct plain SGD (arXiv 1910.06378).

    Arrays have the names and shapes of the weights.
    """

    def steer(self, correction: Mapping[str, Array]) -> None:
        """Make the next `train` add this to the gradient of each step."""

    def lr_times_steps(self, settings: Settings) -> float:
        """Learning rate times steps of `train` with these settings on this peer's data.

        Raises UsageError if its steps are not plain SGD.
        """

    def gradient(self, weights: Weights, settings: Settings) -> Mapping[str, Array]:
        """The gradient of the mean loss over all of this peer's examples."""


@runtime_checkable
class SendsSums(Protocol):
    """Optional: send integers or products that are added up, in place of weights."""

    def sums_schema(self, weights: Weights, settings: Settings) -> Schema | None:
        """The tensors that `train` returns for this version; None if it returns weights."""


@runtime_checkable
class TellsSettings(Protocol):
    """Optional: list the settings, so that `run start` can check them."""

    def setting_specs(self) -> Mapping[str, SettingSpec]:
        """All settings of the task by name."""


@runtime_checkable
class KeepsOptimizerState(Protocol):
    """Optional: keep the optimizer state from round to round."""

    def load_optimizer_state(self, state: Mapping[str, Array]) -> None:
        """Start the next `train` with this state; an empty mapping means a new optimizer."""

    def optimizer_state(self) -> Mapping[str, Array]:
        """The state of the optimizer after the last `train`, for `load_optimizer_state`."""


@runtime_checkable
class TrainsPrivately(Protocol):
    """Optional: train with noise, so that no single row shows in an update (DP-SGD).

    Only built-in tasks and a `cw.TorchTask` do: the noise is as good as the code that adds it.
    """

    def protect(self, private: PrivateTraining | None) -> None:
        """Make the next `train` clip the gradient of each row and add noise. It then returns no
        metric, and raises UsageError for a model in which examples depend on each other. None:
        without noise."""

    def spent(self) -> tuple[Event, ...]:
        """The cost of the last `train` in privacy."""


@runtime_checkable
class Predicting(Protocol):
    """Optional: predict with the shared model on this machine."""

    def predict(
        self, weights: Weights, settings: Settings, source: str
    ) -> Iterator[Mapping[str, Sequence[Any] | npt.NDArray[Any]]]:
        """Predictions for the file, folder or text `source`, in batches: columns of equal length.

        `load` was called before if the owner has set data or a folder of base models. Raises
        CommonweightError.
        """


class LocalRounds(NamedTuple):
    """The most rounds of local training, and after how many without a better model it ends."""

    most: int
    patience: int = 5


@runtime_checkable
class ComparesModels(Protocol):
    """Optional: train on this machine alone, and measure models row by row. Nothing leaves."""

    def local_rounds(self, settings: Settings, rounds: int) -> LocalRounds:
        """How many local rounds `train_locally` does for a run with `rounds` rounds."""

    def set_aside(self, share: int) -> None:
        """Leave one in `share` rows out of the next trainings, chosen by the settings; 0: none.

        Raises UsageError if the task cannot.
        """

    def continued(self, weights: Weights, settings: Settings) -> Weights:
        """The shared model as further local rounds begin with it."""

    def pull_to(self, version: Weights | None, mu: float) -> None:
        """Make the next trainings stay near a version, by the gradient of mu/2 |w - version|²;
        None: not any more."""

    def train_locally(self, weights: Weights, settings: Settings, on_step: OnStep) -> Weights:
        """The weights after one more local round."""

    def measure_rows(
        self, weights: Weights, settings: Settings, on_step: OnStep, *, aside: bool
    ) -> Mapping[str, npt.NDArray[np.float64]]:
        """By name float64[n], one number for each held-out row, or for each that is set aside:
        "loss", and perhaps "accuracy" (0 or 1), "mse" and "mae", or "class" with "guess" (classes
        from 0) and, of two classes, "log_odds" of the second."""


class Member(NamedTuple):
    """A model of a blend: its kind, as the setting `model` names it, and its weights."""

    kind: str
    weights: Weights


@runtime_checkable
class BlendsModels(Protocol):
    """Optional: make one model of several, by how good they are on this machine's held-out rows."""

    def blend_models(
        self, members: Sequence[Member], settings: Settings, on_step: OnStep
    ) -> tuple[Weights, Mapping[str, npt.NDArray[np.float64]]] | None:
        """The blend, and its numbers for each held-out row, as `measure_rows` has them. No row has
        a part in the blend that its own numbers are of. None if there are too many rows, or no
        two models whose outputs are finite."""


@runtime_checkable
class Exporting(Protocol):
    """Optional: write a model in a format for other programs."""

    @property
    def forms(self) -> Sequence[str]:
        """The names of the formats, such as "onnx"."""

    def export(
        self, weights: Weights, settings: Settings, form: str, data: DataSettings, out: Path
    ) -> None:
        """Write the model to `out`, a file or a folder that does not exist yet.

        `load` was called before if the owner has set data. Raises CommonweightError.
        """
