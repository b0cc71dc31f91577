"""Answers queries in jobs, each in a child process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.clientapp.jobs import Result
from protocols.analytics.mergeable_states import PeerAnswer
from protocols.analytics.query import Query
from protocols.errors import BadMessage
from protocols.local.programs import run_program
from protocols.messages.jobs import Analyze, Unit

TIMEOUT_S = 1800.0


def handler(home: Path) -> Callable[[Unit], Result]:
    """Answers a query with the settings in this home. Raises CommonweightError."""

    def answer_unit(unit: Unit) -> Result:
        if not isinstance(unit.question, Analyze):
            raise BadMessage("a unit that is no question")
        body = answer(read_question(unit.question.query), home)
        return Result(body, msgspec.json.decode(body, type=PeerAnswer).rows)

    return answer_unit


def read_question(text: str) -> Query:
    """The question in a unit of work. Raises BadMessage."""
    try:
        return msgspec.json.decode(text, type=Query)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadMessage(f"not a question: {err}") from err


def answer(question: Query, home: Path) -> bytes:
    """The encoded answer, after it was recorded. Raises CommonweightError."""
    return run_program(
        [sys.executable, "-P", "-m", "agent.analytics", str(home)],
        "the question could not be answered",
        within_s=TIMEOUT_S,
        stdin=msgspec.json.encode(question),
    )
