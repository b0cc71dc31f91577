"""Ends the work for a run that has ended, as the coordinator would not accept the answer."""

from __future__ import annotations

from typing import NamedTuple

from agent.daemon.state_runner import StateRunner
from agent.tasks.work import Train
from agent.trainer.supervisor import TrainerSupervisor


class EndedRuns(NamedTuple):
    """Requests say what `working_for` returns, and `end` is called when that run has ended."""

    runner: StateRunner
    trainers: tuple[TrainerSupervisor, ...]

    def working_for(self) -> str:
        """The run that this machine works for; empty for none. Any thread."""
        work = self.runner.state.shown_work
        return work.run if work is not None else ""

    def end(self, run: str) -> None:
        """Cancel the work for this run. Any thread."""
        self.runner.call_threadsafe(self._end, run)

    def _end(self, run: str) -> None:
        state = self.runner.state
        for trainer in self.trainers:
            if state.work is not None and state.work.run == run:
                trainer.cancel()
            elif state.ahead is not None and state.ahead.run == run:
                trainer.cancel(Train)
