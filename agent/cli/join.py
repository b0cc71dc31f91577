"""`commonweight-agent join` and `discover`: find a coordinator and join its fleet."""

from __future__ import annotations

import contextlib
import socket
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from agent.cli import prompts
from agent.cli.common import (
    Json,
    Part,
    Split,
    parse_pair,
    parse_part,
    print_data,
    print_json,
    print_line,
)
from agent.cli.names import complete_tasks
from agent.home import settings
from agent.setup import sharing_text
from protocols.errors import Unreachable
from protocols.local import cli_entry, homes
from protocols.local.command_line import MORE


def join(
    ticket: Annotated[
        str | None,
        typer.Argument(help="The ticket, file:PATH, or - for standard input; else it is asked."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="This machine's name in the fleet.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="key=value; may be repeated.", rich_help_panel=MORE),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="This machine's data; `data check FILE` shows what leaves of them."),
    ] = None,
    allow: Annotated[
        list[str] | None,
        typer.Option(
            help="A task that may train on this data; may be repeated. * is every task.",
            autocompletion=complete_tasks,
        ),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns that may be used, such as age,sex; or all.")
    ] = None,
    analyze: Annotated[
        Literal["off", "ask", "on"] | None,
        typer.Option(help="Answer questions to the table: on; ask, after your approval; off."),
    ] = None,
    purpose: Annotated[
        str | None,
        typer.Option(
            help="What the allowed tasks are for: a note for yourself.", rich_help_panel=MORE
        ),
    ] = None,
    part: Part = None,
    split: Split = None,
    battery: Annotated[
        str | None,
        typer.Option(help="Work on battery: always, auto (do not), never.", rich_help_panel=MORE),
    ] = None,
    hours: Annotated[
        str | None,
        typer.Option(
            help="Work hours: mon-fri 18:00-08:00; empty is always.", rich_help_panel=MORE
        ),
    ] = None,
    cpu_share: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help="Share of the CPU time to use.", rich_help_panel=MORE),
    ] = None,
    unattended: Annotated[
        bool, typer.Option("--unattended", help="Ask nothing and use the defaults.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Join again with a new key.")] = False,
    find: Annotated[
        bool, typer.Option("--discover", help="Only list the coordinators in this network.")
    ] = False,
    json: Json = False,
) -> None:
    """Join a fleet with a ticket from `commonweight ticket create`."""
    from agent.setup import consents, enrollment, own_data

    if find:
        discover(json=json)
        return
    text = _read_ticket(ticket)
    policy = {"battery": battery, "hours": hours, "cpu_share": cpu_share}
    labels = dict(parse_pair(item, "site=north") for item in label or [])
    home = homes.open_home("agent", create=True)
    if data:
        wanted = settings.read(home, data=settings.data_path(data))
        print_line(own_data.check_setting(wanted, allowing=bool(allow)))
    patterns = consents.parse_columns(columns)
    if note := own_data.check_columns(settings.data_path(data) or "", patterns or []):
        print_line(note)
    if prompts.can_ask() and not (unattended or json):
        policy |= {key: prompts.ask(key) for key, value in policy.items() if value is None}
        allow = allow or [prompts.ask("allow")]
        there = own_data.columns(settings.data_path(data) or "")
        if there and patterns is None:
            patterns = consents.parse_columns(prompts.ask_columns(data or "", there))
    chosen: dict[str, Any] = {
        "data": settings.data_path(data),
        **parse_part(part),
        "split": split,
        "data_columns": patterns,
        "analyze": analyze,
        **policy,
    }
    names = [name for text in allow or [] for name in consents.split_list(text) or []]

    def allowed() -> dict[str, Any]:
        if not names:
            return {}
        own, known = settings.read_own(home), consents.known_tasks(settings.read(home))
        return consents.allowing(own, known, names, purpose=purpose)

    wanted = settings.read(
        home, **chosen, **allowed()
    )  # wrong settings fail before the ticket is used
    if data:
        own_data.check_setting(wanted)
    joined, awaiting = enrollment.join(
        home, text, name=name or socket.gethostname(), labels=labels, replace=replace
    )
    with settings.locked(home):  # other commands may have changed them since
        settings.change(home, **chosen, **allowed())
    if json:
        print_json({"peer": joined.peer, "name": joined.name, "awaiting": awaiting})
        return
    print_line(f"joined as {joined.name}, id {joined.peer}")
    if awaiting:
        print_line(f"the operator must approve it: commonweight peers approve {joined.name}")
    _say_terms(home)
    print_line("next: commonweight-agent up")


def _say_terms(home: Path) -> None:
    """What this machine allows now: tasks, columns, and a port for other peers."""
    from agent.setup import consents, own_data

    chosen = settings.read(home)
    for task in chosen.tasks:
        name = "every task on this machine" if task == consents.EVERY else task
        print_line(f"allowed: {consents.describe(chosen, task, name)}")
    if awaiting := consents.awaiting_columns(chosen):
        there, command = own_data.columns(chosen.data), consents.columns_command(awaiting[0])
        print_line(f"no column may be used yet, of {own_data.shorten(there)}; a run waits for you")
        print_line(f"to name them: {command}")
    if not chosen.tasks:
        print_line(
            "no task is allowed yet: a run that needs one waits for you "
            "(commonweight-agent task allow NAME)"
        )
    if line := sharing_text.describe(chosen, home):
        print_line(line)


def discover(
    seconds: Annotated[float, typer.Option(min=0.5, max=60, help="How long to listen.")] = 3.0,
    json: Json = False,
) -> None:
    """List the coordinators that announce themselves in this network."""
    from agent.setup import discovery

    found = discovery.discover(seconds)
    data = [{**one._asdict(), "ca": one.ca.hex()} for one in found]
    lines = (f"{one.name}  {', '.join(one.addresses)}  ca {one.ca.hex()}" for one in found)
    print_data(data, lines, json=json)
    if not (found or json):
        print_line("none; a coordinator announces itself with: commonweight up --announce")


def _read_ticket(given: str | None) -> str:
    if given is not None:
        return cli_entry.read_ticket(given)
    if not sys.stdin.isatty():
        return cli_entry.read_ticket("-")
    from agent.setup import discovery

    with contextlib.suppress(Unreachable):  # the list is only a help for the prompt
        for one in discovery.discover(1.5):
            print_line(f"in this network: {one.name} at {one.addresses[0]}")
    return str(typer.prompt("ticket, or its short code", hide_input=True, err=True))
