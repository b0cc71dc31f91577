"""`commonweight-agent questions …`: what others asked of this machine's data, and what they got."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli.control import Json, say
from protocols.errors import UnknownName
from protocols.local import homes, json_output

if TYPE_CHECKING:
    from agent.analytics.query_log import QueryLog

questions = typer.Typer(help="Questions about your data: what was told.", no_args_is_help=True)


def _query_log() -> QueryLog:
    from agent.analytics.query_log import QueryLog

    return QueryLog(homes.open_home("agent") / "analysis.db")


@questions.command("list")
def list_questions(json: Json = False) -> None:
    """Every question, what left this machine, or why nothing did; and those that wait for you."""
    query_log = _query_log()
    entries, wishes = query_log.entries(), query_log.approval_requests()
    if json:
        told = {
            "answers": [entry._asdict() for entry in entries],
            "wishes": [{"digest": d, "question": q, "allowed": a} for d, q, a in wishes],
            "epsilon_spent": query_log.spent_epsilon,
        }
        sys.stdout.write(json_output.ok(told) + "\n")
        return
    for entry in entries:
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.at))
        outcome = entry.refused or f"{entry.cells} cells, {entry.bytes:,} bytes"
        noise = f", ε {entry.epsilon:g}" if entry.epsilon else ""
        sys.stdout.write(f"{at}  {entry.question}: {outcome}{noise}\n")
    if query_log.spent_epsilon:
        sys.stdout.write(f"ε spent in all: {query_log.spent_epsilon:g}\n")
    for digest, question, allowed in wishes:
        if allowed is None:
            say(f"waits for you: {question}\n  commonweight-agent questions allow {digest[:8]}")
    if not entries and not wishes:
        say("nobody has asked yet")


@questions.command("allow")
def allow(
    question: Annotated[str, typer.Argument(help="The beginning of its digest, from list.")],
) -> None:
    """Let a question be answered when it is asked again."""
    _decide(question, allowed=True)


@questions.command("deny")
def deny(
    question: Annotated[str, typer.Argument(help="The beginning of its digest, from list.")],
) -> None:
    """Let a question not be answered."""
    _decide(question, allowed=False)


def _decide(question: str, *, allowed: bool) -> None:
    if len(question) < 4 or not _query_log().decide(question, allowed):
        raise UnknownName(f"no question {question!r}", "commonweight-agent questions list")
    say(f"{'allowed' if allowed else 'denied'}; it counts when it is asked again")
