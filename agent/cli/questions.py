"""`commonweight-agent policy questions`: questions about this machine's data, and their answers."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from agent.cli.common import Json, print_json, print_line, print_text
from protocols.errors import UnknownName
from protocols.local import homes
from protocols.local.command_line import App

if TYPE_CHECKING:
    from agent.analytics.query_log import QueryLog

questions = App(name="questions", help="List, allow and deny questions about your data.")


Digest = Annotated[str, typer.Argument(help="The start of its digest, see `questions list`.")]


def _query_log() -> QueryLog:
    from agent.analytics.query_log import QueryLog, log_file

    return QueryLog(log_file(homes.open_home("agent")))


@questions.command("list")
def list_questions(json: Json = False) -> None:
    """List every question, and those that await your decision."""
    query_log = _query_log()
    entries, requests = query_log.entries(), query_log.approval_requests()
    if json:
        data = {
            "answers": [entry._asdict() for entry in entries],
            "wishes": [{"digest": d, "question": q, "allowed": a} for d, q, a in requests],
            "epsilon_spent": query_log.spent_epsilon,
        }
        print_json(data)
        return
    method = ""
    for entry in entries:
        if entry.method != method and entry.method:
            print_text(f"for {entry.method}, as the requester says:")
        method, indent = entry.method, "  " if entry.method else ""
        at = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.at))
        outcome = entry.refused or f"{entry.cells} cells, {entry.bytes:,} bytes"
        noise = f", ε {entry.epsilon:g}" if entry.epsilon else ""
        if entry.secure and not entry.refused:
            outcome += ", in sums with other machines alone"
        print_text(f"{indent}{at}  {entry.question}: {outcome}{noise}")
    if query_log.spent_epsilon:
        print_text(f"privacy budget spent: ε {query_log.spent_epsilon:g}")
    for digest, question, allowed in requests:
        if allowed is None:
            print_line(f"waits for your approval: {question}")
            print_line(f"  commonweight-agent policy questions allow {digest[:12]}")
    if not entries and not requests:
        print_line("no questions yet")


@questions.command("allow")
def allow(question: Digest) -> None:
    """Allow a question. It is answered when it is asked again."""
    _decide(question, allowed=True)


@questions.command("deny")
def deny(question: Digest) -> None:
    """Deny a question. It is refused when it is asked again."""
    _decide(question, allowed=False)


def _decide(question: str, *, allowed: bool) -> None:
    if len(question) < 4 or not _query_log().decide(question, allowed):
        raise UnknownName(
            f"not one question whose digest starts with {question!r}",
            "commonweight-agent policy questions list",
        )
    print_line(f"{'allowed' if allowed else 'denied'}; this takes effect when it is asked again")
