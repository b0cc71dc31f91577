"""Text by the model of `commonweight demo --task text`, after each round.

The first agent predicts with its newest version, as its owner would: `commonweight-agent predict`.
"""

from __future__ import annotations

import csv
import io
import subprocess

from coordinator.cli.demo.processes import DemoFleet

#: The text that the model continues.
PROMPT = "The "
_SHOWN_CHARS = 120


class Samples:
    """One prediction at a time, beside the training."""

    def __init__(self, fleet: DemoFleet, agent: str, task: str) -> None:
        self._fleet, self._agent, self._task = fleet, agent, task
        self._round = 0
        self._process: subprocess.Popen[bytes] | None = None

    def is_pending(self, round_: int) -> bool:
        """True until the text after this round has been told, or has failed."""
        return self._process is not None or round_ > self._round

    def next(self, round_: int) -> tuple[int, str] | None:
        """Start a prediction after a new round. The round and text of one that has ended, once."""
        done = None
        if self._process is not None and self._process.poll() is not None:
            assert self._process.stdout is not None
            text = _continuation(self._process.stdout.read().decode(errors="replace"))
            done = (self._round, text) if text else None
            self._process.stdout.close()
            self._process = None
        if self._process is None and round_ > self._round:
            self._round = round_
            self._process = self._fleet.predict(self._agent, PROMPT, self._task)
        return done


def _continuation(said: str) -> str:
    """The first line of the prediction, with its prompt; empty if it failed."""
    row = next(csv.DictReader(io.StringIO(said)), {})
    text = " ".join((PROMPT + row.get("continuation", "")).split())
    return text[:_SHOWN_CHARS] if row else ""
