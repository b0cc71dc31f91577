"""The tasks that runs asked for and that wait for their owner's consent, in a file of the home.

A request stays until the owner allows or forbids its task. Only tasks that are on this machine are
written, so the file stays small.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import msgspec
from msgspec import Struct

from agent.policy.consent import Review
from protocols.local import settings_file
from protocols.local.atomic_files import read_json, write_private
from protocols.messages.envelope import strip_controls

FILE = "asked.json"
_MAX_COLUMNS, _MAX_COLUMN_CHARS = 32, 64
#: Names of columns that a suggested command may have: no pattern, and nothing that a shell reads.
_PLAIN = re.compile(r"[\w.-]+( [\w.-]+)*")


class Request(Struct, frozen=True, kw_only=True):
    """A run asked for a task. `columns`: those that it names, none if it takes all that it may;
    `target`: the one that it predicts. `awaits_columns`: the task is allowed, and only its columns
    are not named yet. `at`: Unix s of the first time. Without a `run`, the operator offers the task
    or withdrew it. `review`: what the owner has to decide about the offer.
    """

    task: str
    run: str
    at: float
    target: str = ""
    columns: tuple[str, ...] = ()
    awaits_columns: bool = False
    review: Review = ""

    @property
    def command(self) -> str:
        """The command that allows it, or shows the offer. It is safe to paste into a shell."""
        if self.review == "offered":
            return shlex.join(["commonweight-agent", "task", "review", self.task])
        words = ["commonweight-agent", "task", "allow", self.task]
        if self.review == "withdrawn":
            words += ["--keep"]
        if self.columns and all(_PLAIN.fullmatch(name) for name in self.columns):
            words += ["--columns", ",".join(self.columns)]
        elif self.awaits_columns:
            words += ["--columns", "NAME,NAME"]
        return shlex.join(words)

    @property
    def answer(self) -> str:
        """What the owner can do, with the command."""
        if self.awaits_columns:
            return f"to name them: {self.command} (or all)"
        verb = {"offered": "see the file", "withdrawn": "go on with it"}.get(
            self.review, "allow it"
        )
        return f"to {verb}: {self.command}"

    @property
    def line(self) -> str:
        """What is awaited, and what the owner can do."""
        return f"awaiting {self.lacks}: {self.about}; {self.answer}"

    @property
    def lacks(self) -> str:
        """What the owner has to give."""
        if self.review:
            return "approval" if self.review == "offered" else "decision"
        return "columns" if self.awaits_columns else "consent"

    @property
    def about(self) -> str:
        """Which run asks for what."""
        if not self.run:
            verb = "offers" if self.review == "offered" else "withdrew"
            return f"the operator {verb} the task {self.task!r}"
        columns = ", ".join(self.columns) or "all columns that you allow"
        target = f" to predict {self.target}, from {columns}" if self.target else ""
        if self.awaits_columns and not self.columns:
            target = f" to predict {self.target}" if self.target else ""
            target += "; no column of your data may be used yet"
        return f"run {self.run} asks for the task {self.task!r}{target}"


def plain_columns(names: list[str]) -> tuple[str, ...]:
    """Names of columns from a run's settings, as they may be shown to a person."""
    shown = (strip_controls(name.strip())[:_MAX_COLUMN_CHARS] for name in names)
    return tuple(dict.fromkeys(filter(None, shown)))[:_MAX_COLUMNS]


def read(home: Path) -> dict[str, Request]:
    """The requests by task; none if the file is missing or damaged."""
    found = read_json(home / FILE, list[Request]) or ()
    return {request.task: request for request in found}


def add(home: Path, request: Request) -> None:
    """Write a request in place of an earlier one for its task. Raises OSError, HomeLocked."""
    with settings_file.locked(home):
        _write(home, read(home) | {request.task: request})


def drop(home: Path, task: str) -> None:
    """Delete the request for a task: its owner has decided. Raises OSError, HomeLocked."""
    with settings_file.locked(home):
        found = read(home)
        if found.pop(task, None) is not None:
            _write(home, found)


def _write(home: Path, found: dict[str, Request]) -> None:
    write_private(home / FILE, msgspec.json.encode(list(found.values())))
