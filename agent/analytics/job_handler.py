"""The agent's handler for queries in jobs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.analytics import child_process
from agent.clientapp.jobs import Result
from agent.home.settings import AgentSettings
from protocols.analytics.mergeable_states import PeerAnswer
from protocols.errors import BadMessage
from protocols.messages.jobs import Analyze, Unit


def handler(settings: Callable[[], AgentSettings], home: Path) -> Callable[[Unit], Result]:
    """Answers a query with the current settings of the owner. Raises CommonweightError."""

    def answer(unit: Unit) -> Result:
        if not isinstance(unit.question, Analyze):
            raise BadMessage("a unit that is no question")
        body = child_process.answer(
            child_process.read_question(unit.question.query), settings(), home
        )
        return Result(body, msgspec.json.decode(body, type=PeerAnswer).rows)

    return answer
