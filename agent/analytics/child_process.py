"""Starts the process that answers a query, and waits for it."""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec
from msgspec import Struct

from agent.analytics.limits import QueryLimits
from agent.data.settings import DataSettings
from agent.home.settings import AgentSettings, data_settings
from protocols.analytics.query import Query
from protocols.errors import BadMessage
from protocols.local.programs import run_program

TIMEOUT_S = 1800.0


class AnswerRequest(Struct, frozen=True, kw_only=True):
    """All that an answer needs: the query, the table, the limits, and the file of the query log."""

    question: Query
    table: DataSettings
    limits: QueryLimits
    memory: str


def read_question(text: str) -> Query:
    """The question in a unit of work. Raises BadMessage."""
    try:
        return msgspec.json.decode(text, type=Query)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
        raise BadMessage(f"not a question: {err}") from err


def limits(chosen: AgentSettings) -> QueryLimits:
    """The limits on queries in these settings."""
    return QueryLimits(
        mode=chosen.analyze,
        epsilon=chosen.analyze_epsilon,
        min_rows=chosen.data_min_count,
        columns=chosen.data_columns,
        operations=chosen.analyze_operations,
        extremes=chosen.data_extremes,
    )


def answer(question: Query, chosen: AgentSettings, home: Path) -> bytes:
    """The encoded answer, after it was recorded. Raises CommonweightError."""
    order = AnswerRequest(
        question=question,
        table=data_settings(chosen, home / "trainer"),
        limits=limits(chosen),
        memory=str(home / "analysis.db"),
    )
    return run_program(
        [sys.executable, "-P", "-m", "agent.analytics"],
        "the question could not be answered",
        within_s=TIMEOUT_S,
        stdin=msgspec.json.encode(order),
    )
