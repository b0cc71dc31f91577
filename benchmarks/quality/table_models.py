"""What peers learn from tables, together and alone, as `commonweight run start tabular` trains.

Networks of many peers are trained by the real run loop. Trees are added up in this process. Sums
are exact, masked ones, too, so a run gives the same trees (tests/coordinator/runs/test_tree_runs.py
compares the digests).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from msgspec.structs import replace

from agent.data.features import EncodedRows
from agent.data.settings import DataSettings
from agent.tasks.capabilities import Member
from agent.tasks.tabular import Tabular
from agent.tasks.tabular_blend import Blend
from agent.tasks.tabular_trees import TreeModel
from agent.trainer import own_models
from benchmarks.quality.fleet import fleet_of
from benchmarks.quality.real_tables import Array, Table
from coordinator.remote import run_options
from coordinator.runs import best_version, model_choice, transitions
from coordinator.runs.state import Round, Standing
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent, RunSpec
from coordinator.strategies import outliers
from protocols.model import weights
from protocols.model.built_in_settings import BY_TASK
from protocols.model.weights import Weights
from protocols.tables import preprocessing
from protocols.tables.model_scores import AUTO, Model
from protocols.tables.trees import growth, layout

Settings = Mapping[str, Any]


class Peers(NamedTuple):
    """Rows as a run encodes them: of each peer to train on and held out, and those of the test.
    `counts`: the rows that each peer holds out."""

    settings: Settings
    train: list[EncodedRows]
    held_out: EncodedRows
    test: EncodedRows
    counts: tuple[int, ...] = ()

    @property
    def is_class(self) -> bool:
        return bool(self._made.target.classes)

    @property
    def _made(self) -> preprocessing.Preprocessing:
        return preprocessing.decode(str(self.settings["preprocessing"]))

    def score(self, outputs: Array, rows: EncodedRows) -> float:
        """AUC of outputs float[n, classes], or RMSE of float[n, 1], in the target's units."""
        from sklearn.metrics import roc_auc_score

        if not self.is_class:
            return float(np.sqrt(np.mean((outputs - rows.y) ** 2))) * self._made.target.scale
        return float(roc_auc_score(rows.y, outputs[:, 1] - outputs[:, 0]))

    def model(self) -> TreeModel:
        chosen = {name: spec.default for name, spec in BY_TASK["tabular"].items()}
        return TreeModel.of(self._made, {**chosen, **self.settings})


def prepare(parts: Sequence[DataSettings], test: Path, settings: Settings) -> Peers:
    """What the peers of a run agree on, unless the settings have it, and their rows."""
    tasks = [Tabular() for _ in parts]
    for task, part in zip(tasks, parts, strict=True):
        task.load(part)
    if "preprocessing" not in settings:
        surveys = {str(number): task.survey(settings) for number, task in enumerate(tasks)}
        made = preprocessing.derive(surveys, settings).preprocessing
        settings = {**settings, "preprocessing": preprocessing.encode(made)}
    other = Tabular()
    other.load(DataSettings(path=str(test), device="cpu", min_count=1))
    found = [task._sets(settings) for task in tasks]
    held_out = join([rows for _, rows in found])
    counts = tuple(len(rows.y) for _, rows in found)
    return Peers(
        settings, [rows for rows, _ in found], held_out, join(other._sets(settings)), counts
    )


def join(parts: Sequence[EncodedRows]) -> EncodedRows:
    return EncodedRows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class Trained(NamedTuple):
    """A model: its settings with the preprocessing, weights, the rounds of its run, and its scores
    on the rows that the peers hold out and on the test. `standing`: of its versions. `last`: the
    version from which peers trained last."""

    settings: Settings
    version: Weights
    rounds: int
    held_out: float
    test: float
    standing: Standing = Standing()
    last: Weights = Weights({})


def order(
    table: Table, model: str, peers: int, *, secure: bool = False, rounds: int = 0
) -> RunSpec:
    """What `commonweight run start tabular --target …` starts."""
    typed = {
        "task": "tabular", "target": table.target, "kind": table.kind, "quorum": peers,
        "secure": secure, "set": {"model": model},
        **({"rounds": rounds} if rounds else {}),
    }  # fmt: skip
    return run_options.build_order(run_options.from_keywords(typed)).spec


def choose(
    table: Table,
    parts: Sequence[DataSettings],
    settings: Settings,
    *,
    secure: bool = False,
    rounds: int = 0,
) -> tuple[Model, ...]:
    """The models that a run of these peers trains; one, if it has a number of rounds.

    `settings`: with the preprocessing.
    """
    log: list[RunEvent] = [
        run_events.RunStarted(order(table, AUTO, len(parts), secure=secure, rounds=rounds)),
        run_events.PreprocessingFixed(str(settings["preprocessing"]), ()),
    ]
    declared = dict[str, tuple[int, int]]()
    for number, part in enumerate(parts):
        task, name = Tabular(), f"peer{number}"
        task.load(part)
        train, held_out = (len(rows.y) for rows in task._sets(settings))
        declared[name] = train, held_out
        if not secure:
            scores = task.score_models({**settings, "model": AUTO}, lambda _: None, _ignore)
            assert scores is not None
            log.append(run_events.ModelsCompared(name, scores))
    run = replace(transitions.replay("run", log), declared=declared)
    chosen = model_choice.choose(run)
    return chosen.model, *chosen.then


def keep(table: Table, trained: Mapping[Model, Trained]) -> Model:
    """The model with the version that a run keeps, of these in the order of their training."""
    best = best_version.of_models(
        order(table, AUTO, len(trained)), [one.standing for one in trained.values()]
    )
    return next(model for model, one in trained.items() if one.standing.best is best)


def _ignore(*_: object) -> None:
    """A step."""


def together(
    table: Table, parts: Sequence[DataSettings], test: Path, model: Model, *, secure: bool = False
) -> Trained:
    """The best version of a run of these peers: of networks by the real run loop."""
    spec = order(table, model, len(parts), secure=secure)
    if model == "trees":
        return trees(spec, prepare(parts, test, spec.settings), parts[0].min_count, masked=secure)
    with fleet_of(parts, secure=secure) as fleet:
        run = fleet.run(spec)
        assert run.best is not None
        version, last = (
            weights.load(fleet.lane.version_path(digest))
            for digest in (run.best.digest, run.history[-2].digest)
        )
    agreed = {**run.spec.settings, "preprocessing": run.preprocessing}
    peers = prepare(parts, test, agreed)
    scored = _scored(parts[0], peers, version, len(run.history))
    return scored._replace(standing=run.standing, last=last)


def _scored(part: DataSettings, peers: Peers, version: Weights, rounds: int) -> Trained:
    task = Tabular()
    task.load(part)
    outputs = task._ready(version, peers.settings)
    held_out, test = (
        peers.score(outputs(torch.from_numpy(np.asarray(rows.x))).detach().numpy(), rows)
        for rows in (peers.held_out, peers.test)
    )
    return Trained(peers.settings, version, rounds, held_out, test)


def own(part: DataSettings, test: Path, shared: Trained) -> float:
    """The model that a peer has after further training of the shared one on its own rows, by the
    rule of the agent's own comparison."""
    task = Tabular()
    task.load(part)
    found = _trained_here(task, shared, lambda settings: task.continued(shared.version, settings))
    return _scored(part, prepare([part], test, shared.settings), found, 0).test


def _trained_here(task: Tabular, shared: Trained, start: Callable[[Settings], Weights]) -> Weights:
    """A model after training on one peer's rows, by the rule of the agent's own comparison."""
    settings, rounds = dict(shared.settings), task.local_rounds(shared.settings, shared.rounds)
    with tempfile.TemporaryDirectory(prefix="commonweight-tables-") as folder:
        training = own_models._Training(
            task, settings, _ignore, Path(folder), "alone", 0.0, time.monotonic
        )
        training.advance(lambda: start(settings), rounds, math.inf)
    task.set_aside(0)
    return training.weights


def blend(
    part: DataSettings, test: Path, trained: Mapping[Model, Trained], kept: Model
) -> dict[str, Any]:
    """The blend that a peer makes after a run that has trained these models: its score on the test,
    and how much each model counts in it."""
    task, shared = Tabular(), trained[kept]
    task.load(part)
    settings = dict(shared.settings)
    alone = _trained_here(task, shared, lambda s: task.init(int(s.get("seed", 0)), s))
    others = [Member(model, one.last) for model, one in trained.items() if model != kept]
    made = task.blend_models(
        [Member(kept, shared.version), Member(kept, alone), *others], settings, _ignore
    )
    assert made is not None
    read = Blend.read(made[0])
    assert read is not None
    names = [kept, "alone", *(one.kind for one in others)]
    return {
        "blend": _scored(part, prepare([part], test, settings), made[0], 0).test,
        "shares": dict(zip(names, np.round(read.shares, 3).tolist(), strict=True)),
    }


def trees(spec: RunSpec, peers: Peers, min_count: int, *, masked: bool) -> Trained:
    """The best version of the trees that a run grows."""
    model, state = peers.model(), dict[str, Array]()
    version: dict[str, Array] = dict(model.first())
    growing = [model.rows(rows, min_count) for rows in peers.train]
    count = sum(len(rows.y) for rows in peers.train)
    course = _Course(spec, peers, is_limited=not masked)
    slots = [model.slots(rows.x) for rows in (peers.held_out, peers.test)]
    for number in range(1, spec.rounds + 1):
        at, numbers = layout.read(version, model.shape)
        sums = [one.sums(version, at, numbers, masked=masked).astype(np.int64) for one in growing]
        total = np.sum(sums, 0)
        version, state = growth.grow(version, (at, numbers), state, total, count, bytes(32))
        if (number - 1) % spec.evaluate_every:
            continue
        outputs = [model.objective.outputs_of(model.margins(version, one)) for one in slots]
        if course.ends(number, version, outputs):
            break
    return course.best()


def alone(table: Table, part: DataSettings, test: Path, model: str) -> Trained:
    """The best version of a peer without others."""
    spec = order(table, model, 1)
    peers = prepare([part], test, spec.settings)
    if model == "trees":
        return trees(spec, peers, 1, masked=True)
    task, course = Tabular(), _Course(spec, peers)
    task.load(part)
    settings = {**peers.settings, "seed": spec.seed}
    version = task.init(spec.seed, settings)
    inputs = [torch.from_numpy(np.asarray(rows.x)) for rows in (peers.held_out, peers.test)]
    for number in range(1, spec.rounds + 1):
        version = task.train_locally(version, {**settings, "round": number}, _ignore)
        outputs = task._ready(version, settings)
        if course.ends(number, version, [outputs(x).detach().numpy() for x in inputs]):
            break
    return course.best()


class _Course:
    """The versions of a training, until a run would end. `is_limited`: the peers in the middle
    decide, as in runs that are not secure."""

    def __init__(self, spec: RunSpec, peers: Peers, *, is_limited: bool = False) -> None:
        self._spec, self._peers, self._is_limited = spec, peers, is_limited
        self._history, self._trained = list[Round](), dict[int, Trained]()
        self._standing = Standing()

    def ends(self, number: int, version: Mapping[str, Array], outputs: Sequence[Array]) -> bool:
        """Take a version, and its outputs on the rows held out and on the test."""
        peers, both = self._peers, (self._peers.held_out, self._peers.test)
        scores = [peers.score(one, rows) for one, rows in zip(outputs, both, strict=True)]
        self._trained[number] = Trained(peers.settings, Weights(version), number, *scores)
        metrics = _metrics(outputs[0].astype(np.float64), both[0], is_class=peers.is_class)
        count = len(both[0].y)
        decides = self._decisive(outputs[0]) if self._is_limited else {}
        self._history.append(
            Round(round=number, digest="", metrics=metrics, num_evaluated=count, decisive=decides)
        )
        self._standing = best_version.after(self._spec, self._standing, self._history[-1])
        last = self._standing.gained
        return bool(self._spec.patience) and number - last >= self._spec.patience

    def _decisive(self, outputs: Array) -> dict[str, float | None]:
        """The metrics of the peers in the middle."""
        peers, rows = self._peers, self._peers.held_out
        places = np.split(np.arange(len(rows.y)), np.cumsum(peers.counts)[:-1])
        each = [
            _metrics(
                outputs[at].astype(np.float64),
                EncodedRows(rows.x[at], rows.y[at]),
                is_class=peers.is_class,
            )
            for at in places
        ]
        names = [str(number) for number in range(len(each))]
        return {
            name: sum(middle) / len(middle)
            for name in each[0]
            if (middle := outliers.values_in_the_middle([one[name] or 0.0 for one in each], names))
        }

    def best(self) -> Trained:
        best = self._standing.best
        assert best is not None
        found = self._trained[best.round]
        ended = self._history[-1].round
        last = self._trained[ended].version
        return found._replace(rounds=ended, standing=self._standing, last=last)


def _metrics(outputs: Array, rows: EncodedRows, *, is_class: bool) -> dict[str, float | None]:
    """Those that choose the best version: the accuracy and the loss."""
    if not is_class:
        return {"loss": float(np.mean((outputs - rows.y) ** 2))}
    top = outputs.max(1, keepdims=True)
    logs = outputs - top - np.log(np.exp(outputs - top).sum(1, keepdims=True))
    loss = -float(np.mean(logs[np.arange(len(rows.y)), rows.y]))
    return {"accuracy": float(np.mean(outputs.argmax(1) == rows.y)), "loss": loss}
