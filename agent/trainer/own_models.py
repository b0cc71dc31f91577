"""Compares models on one peer's own held-out rows: alone, shared, and personal.

The model *alone* begins at the first weights of the run, *personal* at its best version; both train
on this peer's rows. How many rounds they get is chosen on a part of the training rows that is set
aside. Then they train again for that many rounds, on all training rows. Held-out rows choose
nothing, so their metrics favor no model. Of the *blend* they choose the weights; its metric on a
row is that of a blend whose weights come from other rows.

The work is done in slices, and the next slice continues from the files in its folder.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from agent.data.disclosed_sets import Use
from agent.tasks import OnStep, Setting, Task
from agent.tasks.capabilities import (
    BlendsModels,
    ComparesModels,
    LocalRounds,
    Member,
    TrainsPrivately,
)
from agent.tasks.work import Done, Measure
from agent.trainer import row_bootstrap
from agent.trainer.row_bootstrap import RowMetrics
from protocols.errors import BadWeights, DataError, UsageError
from protocols.local.atomic_files import write_private
from protocols.messages import comparisons
from protocols.messages.comparisons import Comparison, Model
from protocols.model import weights
from protocols.model.personalization import PERSONAL_LAYERS
from protocols.model.weights import Weights

#: Every fifth training row is set aside to choose the number of rounds.
SET_ASIDE = 5
#: The uses of rows that a comparison depends on (`disclosed_sets`).
USES: tuple[Use, ...] = ("train", "held")
#: Of held-out rows, whatever the owner's `data_min_count` is.
MIN_ROWS = 5
#: Each of two models is trained twice, the second time on all rows: the part of the time in which
#: one may be chosen.
_SHARES = 5
_PROGRESS = "progress.json"
_SUFFIX = ".safetensors"
#: Settings of local training that tie it to a version of the run.
_TIES = ("proximal_mu",)


class Fit(Struct, frozen=True):
    """How far a model is: it chooses the number of rounds, then trains for `best` rounds.

    `round`: those done in this phase. `loss`: the lowest on the rows set aside, after `best`.
    `spent_s`: seconds of training. `is_cut`: the choice ended because of them.
    """

    phase: Literal["choose", "train", "done"] = "choose"
    round: int = 0
    best: int = 0
    loss: float | None = None
    spent_s: float = 0.0
    is_cut: bool = False


def begin(loss: float) -> Fit:
    """Before the first round. A loss that is not finite is worse than any other."""
    return Fit(loss=loss if math.isfinite(loss) else None)


def after_round(
    fit: Fit, loss: float, rounds: LocalRounds, seconds: float = 0.0, most_s: float = math.inf
) -> Fit:
    """After a round that took `seconds`. `loss` counts in the phase "choose" alone, which ends
    after `most_s` at the latest."""
    fit = replace(fit, spent_s=fit.spent_s + seconds)
    number = fit.round + 1
    if fit.phase == "train":
        return replace(fit, round=number, phase="done" if number >= fit.best else "train")
    if math.isfinite(loss) and (fit.loss is None or loss < fit.loss):
        fit = replace(fit, best=number, loss=loss)
    fit = replace(fit, round=number)
    if number < rounds.most and number - fit.best < rounds.patience:
        if fit.spent_s < most_s:
            return fit
        fit = replace(fit, is_cut=True)
    return replace(fit, round=0, phase="train" if fit.best else "done")


def compare(
    work: Measure,
    task: Task,
    settings: dict[str, Setting],
    shared: tuple[Weights, Weights],
    first: Callable[[int], Weights],
    on_step: OnStep,
    clock: Callable[[], float] = time.monotonic,
) -> Done:
    """The comparison, as the description in `Done`; none if more slices are to come.

    `shared`: the run's best version, with the layers of a newcomer, and with those that this peer
    has kept, if some stay on each machine. `first(seed)` makes first weights. `clock` has the
    seconds of work. Raises UsageError for a task that cannot compare models, DataError for too few
    held-out rows.
    """
    if not isinstance(task, ComparesModels):
        raise UsageError(f"the task {work.task} cannot measure models row by row")
    if isinstance(task, TrainsPrivately):
        task.protect(None)  # nothing leaves, so there is no noise
    chosen = {name: value for name, value in settings.items() if name not in _TIES}
    if hasattr(task, "defaults"):
        chosen["min_batch"] = work.data.floors.min_batch
    seed = int(settings.get("seed", 0))
    try:
        found = _compare(work, task, chosen, (*shared, lambda: first(seed)), on_step, clock)
    finally:
        task.set_aside(0)
        task.pull_to(None, 0.0)
    return Done(id=work.id, description=b"" if found is None else msgspec.json.encode(found))


def _compare(
    work: Measure,
    task: ComparesModels,
    settings: dict[str, Setting],
    of: tuple[Weights, Weights, Callable[[], Weights]],
    on_step: OnStep,
    clock: Callable[[], float],
) -> Comparison | None:
    shared, own, first = of
    least, until = max(MIN_ROWS, work.data.floors.min_count), time.monotonic() + work.slice_s
    folder = Path(work.folder)
    rows: dict[Model, RowMetrics] = {
        "shared": task.measure_rows(shared, settings, on_step, aside=False)
    }
    if (count := len(rows["shared"].get("loss", ()))) < least:
        raise DataError(f"a comparison needs {least} held-out rows, and there are {count}")
    rounds = task.local_rounds(settings, work.rounds)
    starts: dict[Model, Callable[[], Weights]] = {
        "alone": first,
        "personal": lambda: task.continued(own, settings),
    }
    used: dict[Model, int] = {}
    models: dict[Model, Weights] = {"shared": shared}
    cut: list[Model] = []
    for model, start in starts.items():
        trained = _Training(task, settings, on_step, folder, model, work.most_s, clock)
        task.pull_to(own if model == "personal" and work.mu else None, work.mu)
        if not trained.advance(start, rounds, until):
            return None
        used[model] = trained.fit.best
        cut += [model] if trained.fit.is_cut else []
        rows[model] = task.measure_rows(trained.weights, settings, on_step, aside=False)
        models[model] = trained.weights
    # As in an evaluation, no figure tells of the few rows of a class.
    counts = np.unique(rows["shared"].get("class", ()), return_counts=True)[1]
    metric = "" if (counts < work.data.floors.min_count).any() else work.metric

    def measured(rows: Mapping[Model, RowMetrics]) -> Comparison | None:
        better = work.lower_is_better
        return row_bootstrap.compare(work.run, rows, used, metric, lower_is_better=better)

    if (found := measured(rows)) is None:
        raise DataError(
            "a model gives numbers on the held-out rows that are too large or no numbers"
        )
    found = replace(found, cut=tuple(cut))
    kind = str(settings.get("model", ""))
    ours = [Member(kind, models[model]) for model in ("shared", "alone")]
    if (made := _blend(work, task, settings, ours, on_step)) is None:
        return found
    # Of the blend's other models no evaluation was told, so what leaves does not depend on them.
    blended = measured({"shared": rows["shared"], "blend": made[1]})
    if blended is None or blended.metric != found.metric:
        return found
    weights.save(made[0], folder / f"blend{_SUFFIX}")
    return comparisons.with_blend(found, blended)


def _blend(
    work: Measure,
    task: object,
    settings: dict[str, Setting],
    members: list[Member],
    on_step: OnStep,
) -> tuple[Weights, RowMetrics] | None:
    """Blend these models and the other ones of the run; None if the task cannot, or if each peer
    has layers of its own. A version that is damaged on this disk is left out."""
    if not isinstance(task, BlendsModels) or work.settings.get(PERSONAL_LAYERS):
        return None
    for path, kind in work.others:
        try:
            members.append(Member(kind, weights.load(Path(path))))
        except (OSError, BadWeights):
            continue
    return task.blend_models(members, settings, on_step)


class _Training:
    """The training of one model, whose state is in the folder between slices."""

    def __init__(
        self,
        task: ComparesModels,
        settings: dict[str, Setting],
        on_step: OnStep,
        folder: Path,
        model: Model,
        most_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._task, self._settings, self._on_step = task, settings, on_step
        self._most_s, self._clock = most_s / _SHARES if most_s else math.inf, clock
        self._folder, self._model = folder, model
        self._progress = folder / f"{model}-{_PROGRESS}"
        self.weights = Weights({})
        self.fit = Fit()

    def advance(self, start: Callable[[], Weights], rounds: LocalRounds, until: float) -> bool:
        """Train until it is done (True), or for at least a round until `until` (monotonic s)."""
        self._task.set_aside(SET_ASIDE)
        if not self._read():
            self.weights = start()
            self.fit = begin(self._loss())
        while self.fit.phase != "done":
            choosing = self.fit.phase == "choose"
            self._task.set_aside(SET_ASIDE if choosing else 0)
            named: dict[str, Setting] = {**self._settings, "round": self.fit.round + 1}
            before = self._clock()
            self.weights = self._task.train_locally(self.weights, named, self._on_step)
            seconds = self._clock() - before
            loss = self._loss() if choosing else 0.0
            self.fit = after_round(self.fit, loss, rounds, seconds, self._most_s)
            if choosing and self.fit.phase != "choose":
                self.weights = start()
            if self.fit.phase != "done" and time.monotonic() >= until:
                self._save()
                return False
        self._save()
        return True

    def _loss(self) -> float:
        found = self._task.measure_rows(self.weights, self._settings, self._on_step, aside=True)
        return float(found["loss"].mean())

    def _file(self, fit: Fit) -> Path:
        # A crash between the two files leaves the old pair.
        at = "" if fit.phase == "done" else f"-{fit.phase}-{fit.round}"
        return self._folder / f"{self._model}{at}{_SUFFIX}"

    def _read(self) -> bool:
        try:
            self.fit = msgspec.json.decode(self._progress.read_bytes(), type=Fit)
            self.weights = weights.load(self._file(self.fit))
        except (OSError, msgspec.DecodeError):
            return False
        return True

    def _save(self) -> None:
        file = self._file(self.fit)
        weights.save(self.weights, file)
        write_private(self._progress, msgspec.json.encode(self.fit))
        for old in self._folder.glob(f"{self._model}*{_SUFFIX}"):
            if old != file:
                old.unlink()
