"""Answers queries in jobs, each in a child process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from agent.analytics.query_log import QuestionContext
from agent.clientapp.jobs import Result
from agent.data import check_installed, passwords
from agent.data.settings import uses_network
from agent.home import settings
from agent.policy import sandbox
from agent.trainer import sandbox_rules
from protocols.analytics.mergeable_states import PeerAnswer
from protocols.analytics.query import Query
from protocols.errors import (
    BadMessage,
    CommonweightError,
    HomeError,
    MissingPackage,
    TrainerFailed,
)
from protocols.local.programs import run_program
from protocols.messages.decoding import decode
from protocols.messages.jobs import Analyze, Unit

TIMEOUT_S = 1800.0
#: The folder in the home for files made from the data.
CACHE = "analysis"
_query = msgspec.json.Decoder(Query)
_FAILED = "the question could not be answered; its owner sees why: commonweight-agent status"


def handler(home: Path, fleet: str = "") -> Callable[[Unit], Result]:
    """Answers a query of a fleet with the settings in this home. Raises CommonweightError."""

    def answer_unit(unit: Unit) -> Result:
        if not isinstance(unit.question, Analyze):
            raise BadMessage("a unit that is no question")
        asked = QuestionContext(unit.job, fleet, method=unit.question.method)
        body = answer(read_question(unit.question.query), home, asked)
        return Result(body, msgspec.json.decode(body, type=PeerAnswer).rows)

    return answer_unit


def read_question(text: str) -> Query:
    """The question in a unit of work. Raises BadMessage."""
    return decode(_query, text.encode(), "question")


def answer(question: Query, home: Path, asked: QuestionContext = QuestionContext()) -> bytes:
    """The encoded answer, after it was recorded.

    Raises CommonweightError. The message of an error leaves the machine; its hint does not. The
    reason why a process failed may quote a path, a setting or a value, so it is in the hint.
    """
    try:
        check_installed(settings.read(home).data_reader)
        program, env = child_program(home)
        return run_program(
            [sys.executable, "-P", "-m", *program, str(home)],
            "its process failed",
            within_s=TIMEOUT_S,
            stdin=msgspec.json.encode((question, asked)),
            env=env,
        )
    except (TrainerFailed, HomeError, MissingPackage):
        raise
    except CommonweightError as err:
        why = f"{err.message} ({err.hint})" if err.hint else err.message
        raise CommonweightError(_FAILED, why) from err


def child_program(home: Path) -> tuple[list[str], dict[str, str]]:
    """The module that answers, and its environment. Raises TrainerFailed.

    It runs in the sandbox too: it reads the data and the settings, and records what was disclosed.
    It gets network access only for a cluster of the owner.
    """
    chosen = settings.read(home)
    folder = home / CACHE
    rules = replace(
        sandbox_rules.make_rules(
            chosen, read=(home / settings.FILE,), write=(folder, settings.memory_file(home).parent)
        ),
        tasks=False,
        network=uses_network(chosen.data, chosen.data_reader),
    )
    if rules.mode == "off":
        return ["agent.analytics"], dict(os.environ)
    sandbox.check(rules)
    for path in (*map(Path, rules.write), folder / sandbox.TEMPORARY):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    env = {**os.environ, **sandbox.environment(rules, folder), **passwords.environment(chosen.data)}
    return ["agent.trainer.sandboxed", "agent.analytics"], env
