"""The watchdog over the trainer: tries again after a crash, and says when there is no use.

A trainer that was killed, hung, ran out of memory or met an exception is started anew after a
growing wait; its journal lets it go on where it was. Blocking, for the work thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from random import Random

from agent.tasks.work import Done, Work
from agent.trainer.process import TrainerProcess
from protocols.errors import TrainerFailed
from protocols.network.backoff import delays

log = logging.getLogger("commonweight.agent")

#: What another child may not meet again. All else is said of the work itself, or was asked for.
RETRYABLE = frozenset({"killed", "died", "hung", "out of memory", "task", "file", "start"})
#: The same for what others ask in jobs: the same rows meet the same exception.
RETRYABLE_IN_JOBS = RETRYABLE - {"task"}


class RetryingTrainer:
    """A trainer for `client.Client` that survives its children.

    After `tries` failures of one work it raises the last one, having told `on_given_up(kind)`.
    Failures of a kind that is not in `worth` are raised at once.
    """

    def __init__(
        self,
        trainer: TrainerProcess,
        *,
        tries: int = 4,
        first_delay_s: float = 0.5,
        max_delay_s: float = 15.0,
        retryable: frozenset[str] = RETRYABLE,
        on_given_up: Callable[[str], None] = lambda kind: None,
    ) -> None:
        self._trainer, self._tries, self._worth = trainer, tries, retryable
        self._first_s, self._most_s = first_delay_s, max_delay_s
        self._on_given_up = on_given_up
        self._closed = threading.Event()

    def run(self, work: Work) -> Done:
        """Do a work, with some tries. Raises TrainerFailed."""
        waits = delays(Random(), self._first_s, self._most_s)
        for left in range(self._tries - 1, -1, -1):
            try:
                done = self._trainer.run(work)
                if done.resumed_at:
                    log.info("the training went on from step %s of its journal", done.resumed_at)
                return done
            except TrainerFailed as err:
                if err.kind not in self._worth or self._closed.is_set():
                    raise
                # Whatever state it is in: the next try gets a child that has done nothing yet.
                self._trainer.stop()
                if not left:
                    self._on_given_up(err.kind)
                    raise
                wait_s = next(waits)
                log.warning("%s; again in %.1f s, tries left: %s", err.message, wait_s, left)
                if self._closed.wait(wait_s):
                    raise TrainerFailed("stopped", "the trainer was stopped") from err
        raise AssertionError("at least one try")

    def close(self) -> None:
        """End the trainer for good; a wait for the next try ends too."""
        self._closed.set()
        self._trainer.close()
