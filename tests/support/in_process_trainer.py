"""A trainer whose tests say what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agent.tasks.work import Describe, Done, Evaluate, Init, Predict, Train, Work


class ByKind:
    """A trainer of a test: `run` calls the method for the kind of work."""

    trains_ahead = False
    describe: Any
    init: Any
    train: Any
    evaluate: Any
    predict: Any

    def cancel_training(self) -> None:
        """Nothing: a test's training is short, unless the test says how it ends."""

    def run(self, work: Work) -> Done:
        task, settings = work.task, work.settings
        match work:
            case Describe():
                return Done(description=self.describe(task, settings))
            case Init(seed=seed, out=out):
                done = self.init(task, settings, seed, Path(out))
            case Train(base=base, out=out):
                done = self.train(task, settings, Path(base), Path(out))
            case Evaluate(base=base):
                done = self.evaluate(task, settings, Path(base))
            case Predict(base=base, sources=sources, out=out):
                done = self.predict(task, settings, Path(base), sources, Path(out))
        assert isinstance(done, Done)
        return done
