"""Peers that lie: what they send in place of what they learned, and what they claim about it.

A lie knows the updates of all other peers in the round, which a real liar can only guess.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from agent.data.settings import DataSettings
from agent.tasks import work as trainer_work
from agent.tasks.demo.mnist import Mnist
from agent.tasks.training.torch_task import LastValue
from agent.tasks.work import Done, Evaluate, Train
from agent.trainer.in_process import InProcessTrainer
from coordinator.runs.options import OUTLIER_LIMIT
from protocols.model import weights
from protocols.model.weights import Weights

Floats = npt.NDArray[np.float32]
Others = Callable[[], Sequence[Weights]]

CLASSES = 10
#: How much an inflated count is above the true one.
INFLATED = 1000
#: Baruch, Baruch and Goldberg 2019, arXiv 1902.06156: deviations from the mean; the paper's for
#: MNIST. With one liar of ten its formula gives 0.14, which does nothing.
_LITTLE = 1.5


class Round(NamedTuple):
    """What a lie is made of: the change that the liar learned float32[d], those of the others
    float32[n, d], and the base float32[d]."""

    own: Floats
    others: Floats
    base: Floats
    chance: np.random.Generator


def _random(known: Round) -> Floats:
    noise = known.chance.standard_normal(known.own.shape).astype(np.float32)
    return noise * np.float32(10 * np.linalg.norm(known.own) / np.linalg.norm(noise))


def _at_the_limit(known: Round) -> Floats:
    """Against the mean of the others, as far as the limit on outliers just allows."""
    mean = known.others.mean(0)
    usual = np.median(np.linalg.norm(known.others - mean, axis=1))
    return mean * np.float32(1 - 0.95 * OUTLIER_LIMIT * usual / np.linalg.norm(mean))


def _nothing(known: Round) -> Floats:
    return known.own


class Lie(NamedTuple):
    """`change`: what is sent. `times`: what the number of examples is multiplied by."""

    change: Callable[[Round], Floats] = _nothing
    times: int = 1
    flips_labels: bool = False
    praises: bool = False
    needs_others: bool = False


LIES = {
    "sign flip": Lie(lambda known: -known.own),
    "hundredfold": Lie(lambda known: 100 * known.own),
    "random": Lie(_random),
    "constant": Lie(lambda known: np.float32(7.0) - known.base),
    "label flip": Lie(flips_labels=True),
    "a little": Lie(
        lambda known: known.others.mean(0) - np.float32(_LITTLE) * known.others.std(0),
        needs_others=True,
    ),
    "inflated count": Lie(lambda known: -known.own, times=INFLATED),
    "at the limit": Lie(_at_the_limit, needs_others=True),
    "false metrics": Lie(praises=True, times=INFLATED),
}


def scaled(factor: float) -> Lie:
    """The change times a factor."""
    return Lie(lambda known: np.float32(factor) * known.own)


class Liar(InProcessTrainer):
    """A trainer that lies. `others()`: the updates of the other peers in this round."""

    def __init__(self, data: DataSettings, threads: int, lie: Lie, others: Others) -> None:
        super().__init__(data, threads)
        self._lie, self._others = lie, others
        self._chance = np.random.default_rng(data.seed)
        self._has_flipped = False

    def run(self, work: trainer_work.Work) -> Done:
        done = super().run(work)
        if self._lie.flips_labels and not self._has_flipped:
            self._flip_labels()  # the data are loaded now
            done = super().run(work)
        if isinstance(work, Evaluate) and self._lie.praises:
            return self._praise(done, first=work.settings.get("round") == 1)
        if not isinstance(work, Train):
            return done
        base, out = weights.load(Path(work.base)), Path(work.out)
        before, names = _flat(base), list(base)
        others = [_flat(other) - before for other in self._others()] if self._needs_others else []
        known = Round(_flat(weights.load(out)) - before, np.array(others), before, self._chance)
        sent, place, lie = before + self._lie.change(known), 0, {}
        for name in names:
            lie[name] = sent[place : place + base[name].size].reshape(base[name].shape)
            place += base[name].size
        digest = weights.save(Weights(lie), out)
        count = done.num_examples * self._lie.times
        return replace(done, digest=digest, nbytes=out.stat().st_size, num_examples=count)

    @property
    def _needs_others(self) -> bool:
        return self._lie.needs_others

    def _praise(self, done: Done, first: bool) -> Done:
        """The first version is perfect, says the liar, and the others are useless."""
        metrics = {"accuracy": float(first), "loss": 0.0 if first else 1e6}
        return replace(
            done, metrics=metrics, tallies={}, num_examples=done.num_examples * self._lie.times
        )

    def _flip_labels(self) -> None:
        task = self._trainer._task
        if isinstance(task, Mnist):
            pixels, y = task._parts[0]
            task._parts[0] = pixels, CLASSES - 1 - y
            task._read_data = LastValue()
            self._has_flipped = True


def _flat(model: Weights) -> Floats:
    return np.concatenate([np.asarray(model[name], np.float32).ravel() for name in model])
