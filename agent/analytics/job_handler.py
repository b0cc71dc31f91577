"""Questions as units of jobs: the handler that the agent has for them."""

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
    """Answers a question by the owner's settings of the moment. Raises CommonweightError."""

    def answer(unit: Unit) -> Result:
        if not isinstance(unit.question, Analyze):
            raise BadMessage("a unit that is no question")
        body = child_process.answer(
            child_process.read_question(unit.question.query), settings(), home
        )
        return Result(body, msgspec.json.decode(body, type=PeerAnswer).rows)

    return answer
