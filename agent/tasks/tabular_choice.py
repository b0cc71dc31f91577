"""Compares the models of the task "tabular" by a cross-validation inside one peer (`model=auto`).

Each model is trained as a run of this peer alone would train it: rounds of local training with the
settings of the run, or levels of trees with the sums of a plain run. Only metrics leave.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from agent.data.features import EncodedRows
from agent.tasks import EvalOutcome, OnStep, Setting, Settings, Task, Watch
from agent.tasks.training.seeds import random_state
from protocols.errors import UsageError
from protocols.model.weights import Weights
from protocols.tables import evaluation_counts
from protocols.tables.model_scores import MAX_ROWS, MODELS, Model, ModelScores
from protocols.tables.trees import growth, layout

FOLDS = 3
#: Fewer rows in a fold give no useful score.
MIN_FOLD = 10
#: Rows times inputs, so that it takes seconds.
_MAX_CELLS = 500_000
#: Of one fold: steps in a pass over the rows, with larger batches if there are more; steps and
#: passes in all; and trees of all outputs together.
_EPOCH_STEPS, _MAX_STEPS, _MAX_EPOCHS, _MAX_TREES = 60, 1_200, 64, 60
#: The least `eta` of fewer trees than the run has. Larger ones fit noise: with 0.3, linear models
#: were chosen for health insurance, where trees are better.
_ETA = 0.1
#: How many times a model is measured during training, as in a run: the best measurement counts.
_MEASURED = 8


MakeFold = Callable[[EncodedRows, EncodedRows], Task]
#: Which rows are trained on, and which are measured with: bool[n].
Fold = tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]


def choose_rows(count: int, inputs: int, seed: int) -> npt.NDArray[np.int64]:
    """The places of the rows to use, of `count`: all, or a sample, int64[n], in order."""
    most = min(MAX_ROWS, max(MAX_ROWS // 10, _MAX_CELLS // max(1, inputs)))
    if count <= most:
        return np.arange(count)
    return np.sort(random_state("compared", seed).permutation(count)[:most]).astype(np.int64)


def score(
    rows: EncodedRows,
    settings: Settings,
    min_count: int,
    make: MakeFold,
    watch: Watch,
    on_step: OnStep,
    times: npt.NDArray[np.float64] | None = None,
) -> ModelScores:
    """The scores of all models by a cross-validation. `settings`: all of the run's, with types.

    `min_count`: the owner's least number of rows of an answer. `make`: makes a task with these rows
    to train on and to measure with. `watch`: as in `ScoresModels`. `times`: of the rows, if models
    are judged on later rows than those that they are trained on. Raises what training raises.
    """
    places = choose_rows(len(rows.y), rows.x.shape[1], int(settings.get("seed", 0)))
    least = max(MIN_FOLD, min_count)
    rows = EncodedRows(rows.x[places], rows.y[places])
    seed = int(settings.get("seed", 0))
    divided = _random_folds(rows, seed) if times is None else time_folds(times[places])
    pairs = [(on, out) for on, out in divided if min(on.sum(), out.sum()) >= least]
    if len(places) < FOLDS * least or not pairs:
        return ModelScores()
    watch(places)
    folds = [(_some(rows, on), _some(rows, out)) for on, out in pairs]
    measured = sum(int(out.sum()) for _, out in pairs)
    plans = [_plan(model, settings, rows) for model in MODELS]
    total, done = len(folds) * sum(plan.rounds for plan in plans), 0

    def stepped() -> None:
        nonlocal done
        done += 1
        on_step(done, total, math.nan, len(rows.y))

    found = {}
    for plan in plans:
        try:
            runs = [list(_train(make(*fold), plan, seed, stepped)) for fold in folds]
        except UsageError:  # more classes than trees may have: this model is no candidate
            continue
        joined = [_join(outcomes, min_count) for outcomes in zip(*runs, strict=True)]
        found[plan.model] = min(joined, key=_badness)
    return ModelScores(rows=measured, metrics=found)


def _some(rows: EncodedRows, which: npt.NDArray[np.bool_]) -> EncodedRows:
    return EncodedRows(rows.x[which], rows.y[which])


def time_folds(times: npt.NDArray[np.float64]) -> Iterator[Fold]:
    """Of rows in time float64[n]: each fold measures with the part after those it is trained on.

    Rows of one time are in one part, so parts differ in size, and one may be empty.
    """
    known, counts = np.unique(times, return_counts=True)
    before = np.cumsum(counts) - counts  # rows that are earlier, by time
    goals = len(times) * np.arange(1, FOLDS + 1) / (FOLDS + 1)
    cuts = [known[np.abs(before - goal).argmin()] for goal in goals]
    for cut, end in zip(cuts, [*cuts[1:], np.inf], strict=True):
        yield times < cut, (times >= cut) & (times < end)


def _random_folds(rows: EncodedRows, seed: int) -> Iterator[Fold]:
    """The rows of each fold to train on and to measure with; each has its part of every class."""
    order = random_state("folds", seed).permutation(len(rows.y))
    if rows.y.dtype == np.int64:
        order = order[np.argsort(rows.y[order], kind="stable")]
    fold_of = np.empty(len(order), np.int64)
    fold_of[order] = np.arange(len(order)) % FOLDS
    for fold in range(FOLDS):
        out = fold_of == fold
        yield ~out, out


class _Plan(NamedTuple):
    """How a model is trained in a fold: its settings, rounds, and between how many of them it is
    measured. `first`: rounds that only prepare the others."""

    model: Model
    settings: dict[str, Setting]
    rounds: int
    every: int = 1
    first: int = 0


def _plan(model: Model, settings: Settings, rows: EncodedRows) -> _Plan:
    own: dict[str, Setting] = {**settings, "model": model, "max_steps": 0}
    if model != "trees":  # between two measurements all epochs are one round, which is quicker
        fold = len(rows.y) - -(-len(rows.y) // FOLDS)
        batch = max(int(settings["batch_size"]) or fold, fold // _EPOCH_STEPS)
        epochs = max(1, min(_MAX_EPOCHS, _MAX_STEPS * batch // fold))
        rounds = min(_MEASURED, epochs)
        own |= {"batch_size": batch, "epochs": epochs // rounds}
        return _Plan(model, own, rounds)
    classes = int(rows.y.max()) + 1 if rows.y.dtype == np.int64 else 1
    wanted, depth = int(settings["trees"]), int(settings["depth"])
    trees = min(wanted, max(_MAX_TREES // 6, _MAX_TREES // (classes if classes > 2 else 1)))
    eta = float(settings["eta"])
    own |= {"trees": trees, "eta": min(max(eta, _ETA), eta * wanted / trees)}
    every = depth * max(1, trees // _MEASURED)
    return _Plan(model, own, 1 + trees * depth, every, first=1)


def _train(
    task: Task, plan: _Plan, seed: int, stepped: Callable[[], None]
) -> Iterator[EvalOutcome]:
    """The metrics of a fold during the training of its model."""
    weights, state = task.init(seed, plan.settings), dict[str, npt.NDArray[np.generic]]()
    for number in range(1, plan.rounds + 1):
        settings = plan.settings if plan.first else {**plan.settings, "round": number}
        trained, count, _ = task.train(weights, settings, _ignore)
        if plan.model == "trees":
            place = layout.read(weights, layout.Shape.of(weights.schema))
            sums = np.asarray(trained[layout.SUMS])
            trained, state = growth.grow(weights, place, state, sums, count, bytes(32))
        weights = Weights(trained)
        stepped()
        done = number - plan.first
        if done and (done % plan.every == 0 or number == plan.rounds):
            yield EvalOutcome(*task.evaluate(weights, plan.settings, _ignore))


def _ignore(*_: object) -> None:
    """The step of a round within a fold."""


def _join(outcomes: Sequence[EvalOutcome], min_count: int) -> dict[str, float | None]:
    """The metrics over the rows of all folds."""
    total = sum(one.num_examples for one in outcomes)
    names = set.intersection(*(set(one.metrics) for one in outcomes))
    found: dict[str, float] = {
        name: sum(one.metrics[name] * one.num_examples for one in outcomes) / total
        for name in sorted(names)
    }
    tallies = [one.tallies for one in outcomes]
    if all(tallies):
        merged = evaluation_counts.merge(tallies, [1.0] * len(tallies))
        told = evaluation_counts.suppress_small(merged, min_count)
        found |= evaluation_counts.compute_metrics(told)
    return {name: value if math.isfinite(value) else None for name, value in found.items()}


def _badness(metrics: Mapping[str, float | None]) -> float:
    """The loss, which is more informative than the accuracy over few rows."""
    loss = metrics.get("loss")
    return math.inf if loss is None else loss
