"""Retries work after a failure of the trainer.

A trainer that was killed, hung, ran out of memory or raised an exception is restarted after a
growing delay and resumes from its checkpoint. Methods block; the work thread calls them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from random import Random

from agent.home.logs import owner_log
from agent.tasks.work import Done, Train, Work
from agent.trainer.process import TrainerProcess
from protocols.errors import TrainerFailed
from protocols.messages.refusals import refusal_of
from protocols.network.backoff import delays

log = logging.getLogger("commonweight.agent")

#: Failures that another child may not repeat. All others are final or were requested.
RETRYABLE = frozenset({"killed", "died", "hung", "out of memory", "task", "file", "start"})
#: The same for jobs, where the same rows raise the same exception.
RETRYABLE_IN_JOBS = RETRYABLE - {"task"}


class RetryingTrainer:
    """A trainer that survives failures of its child processes.

    After `tries` failures of the same work it calls `on_given_up(kind)` and raises the last one.
    Failures of a kind that is not in `retryable` are raised at once.
    """

    trains_ahead = True

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
        """Do the work, with retries. Raises TrainerFailed."""
        waits = delays(Random(), self._first_s, self._most_s)
        for left in range(self._tries - 1, -1, -1):
            try:
                done = self._trainer.run(work)
                if done.resumed_at:
                    log.info("training resumed from the checkpoint at step %s", done.resumed_at)
                return done
            except TrainerFailed as err:
                if err.kind not in self._worth or self._closed.is_set():
                    raise
                # The next try gets a new child, whatever state this one is in.
                self._trainer.stop()
                if not left:
                    self._on_given_up(err.kind)
                    raise
                wait_s = next(waits)
                text = refusal_of(err).text
                if err.message not in text:
                    owner_log.warning("%s", err.message)
                log.warning("%s; again in %.1f s, tries left: %s", text, wait_s, left)
                if self._closed.wait(wait_s):
                    raise TrainerFailed("stopped", "the trainer was stopped") from err
        raise AssertionError("at least one try")

    def cancel_training(self) -> None:
        """End the training in progress, if there is any: it raises TrainerFailed("cancelled")."""
        self._trainer.cancel(Train)

    def close(self) -> None:
        """Stop the trainer for good, and end a wait for the next try."""
        self._closed.set()
        self._trainer.close()
