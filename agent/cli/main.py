"""`commonweight-agent`: the program on each machine that has data.

Flower and torch are imported inside the commands that need them: `--help` stays quick.
"""

from __future__ import annotations

import contextlib
import gc
import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from agent.cli import control as cli_owner
from agent.cli import export, predict, questions, serve, service, task
from agent.cli import policy as cli_policy
from agent.cli.control import Json, is_running, say
from protocols import VERSION
from protocols.errors import NotRunning, Unreachable, UsageError
from protocols.local import cli_entry, crash_reports, exits, homes, json_output

if TYPE_CHECKING:
    from agent.home.status_files import Status

#: What is left after a command's end are threads: an upload broken off, the sync of a file.
EXIT_TIMEOUT_S = 10.0

# Typer escapes "[default: 10]" for rich even in help that is plain text.
typer.core.HAS_RICH = False

app = typer.Typer(
    name="commonweight-agent",
    help="Train together, keep your data: the agent on a machine that has data.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a panel of many lines fills a daemon's log
    pretty_exceptions_show_locals=False,
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        sys.stdout.write(VERSION + "\n")
        raise typer.Exit


@app.command()
def join(
    ticket: Annotated[
        str | None,
        typer.Argument(help="The ticket, file:PATH, or - for standard input; asked if left out."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What others call this machine.")] = None,
    label: Annotated[list[str] | None, typer.Option(help="key=value; may be repeated.")] = None,
    data: Annotated[str | None, typer.Option(help="This machine's data.")] = None,
    part: Annotated[str | None, typer.Option(help="i/n: this piece of a shared set.")] = None,
    split: Annotated[str | None, typer.Option(help="iid, or shards: two labels a peer.")] = None,
    battery: Annotated[
        str | None, typer.Option(help="Work on battery: always, auto (not), never.")
    ] = None,
    hours: Annotated[
        str | None, typer.Option(help="When to work: mon-fri 18:00-08:00; empty is always.")
    ] = None,
    cpu_share: Annotated[
        float | None, typer.Option(min=0.01, max=1, help="How much of its CPU time to use.")
    ] = None,
    unattended: Annotated[
        bool, typer.Option("--unattended", help="Ask nothing: defaults for what is not given.")
    ] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Join anew, with a new key.")] = False,
    json: Json = False,
) -> None:
    """Join a fleet with a ticket from `commonweight ticket create`."""
    from agent.home import settings
    from agent.setup import enrollment

    text = _read_ticket(ticket)
    asks = sys.stdin.isatty() and sys.stderr.isatty() and not (unattended or json)
    policy = {"battery": battery, "hours": hours, "cpu_share": cpu_share}
    if asks:
        policy |= {name: _prompt(name) for name, given in policy.items() if given is None}
    labels = dict(_parse_label(item) for item in label or [])
    home = homes.open_home("agent", create=True)
    data = settings.data_path(data)
    index, parts = _parse_part(part) if part else (None, None)
    chosen: dict[str, Any] = {"data": data, "part": index, "parts": parts, "split": split, **policy}
    settings.read(home, **chosen)
    joined, awaiting = enrollment.join(
        home, text, name=name or socket.gethostname(), labels=labels, replace=replace
    )
    settings.change(home, **chosen)
    if json:
        told = {"peer": joined.peer, "name": joined.name, "awaiting": awaiting}
        sys.stdout.write(json_output.ok(told) + "\n")
        return
    say(f"joined as {joined.name}, id {joined.peer}")
    if awaiting:
        say(f"the operator must approve it: commonweight peers approve {joined.name}")
    say("next: commonweight-agent run")


@app.command()
def discover(
    seconds: Annotated[float, typer.Option(min=0.5, max=60, help="How long to listen.")] = 3.0,
    json: Json = False,
) -> None:
    """Coordinators that announce themselves in this network."""
    from agent.setup import discovery

    found = discovery.discover(seconds)
    if json:
        rows = [{**one._asdict(), "ca": one.ca.hex()} for one in found]
        sys.stdout.write(json_output.ok(rows) + "\n")
        return
    for one in found:
        sys.stdout.write(f"{one.name}  {', '.join(one.addresses)}  ca {one.ca.hex()}\n")
    if not found:
        say("none; a coordinator announces itself with: commonweight up --announce")


#: The three questions of a first start, and what an empty answer means.
_PROMPTS = {
    "battery": ("train on battery too? always, or auto for not", "auto"),
    "hours": ("in which hours, such as mon-fri 18:00-08:00? empty for all", ""),
    "cpu_share": ("how much of its CPU time to use, 0.01 to 1", "1"),
}


def _prompt(name: str) -> str:
    question, default = _PROMPTS[name]
    return str(typer.prompt(question, default=default, show_default=bool(default), err=True))


def _read_ticket(given: str | None) -> str:
    if given is None:
        if sys.stdin.isatty():
            from agent.setup import discovery

            with contextlib.suppress(Unreachable):  # a help for the question, no more
                for one in discovery.discover(1.5):
                    say(f"in this network: {one.name} at {one.addresses[0]}")
        return str(typer.prompt("ticket, or its short code", hide_input=True, err=True))
    return cli_entry.read_ticket(given)


def _parse_label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"the label {text!r} is not key=value")
    return key, value


def _parse_part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"{text!r} is no part: write i/n with i from 0 to n-1, such as 0/4")
    return int(match[1]), int(match[2])


@app.command()
def run(
    part: Annotated[str | None, typer.Option(help="i/n: this piece of a shared set.")] = None,
    split: Annotated[str | None, typer.Option(help="iid, or shards: two labels a peer.")] = None,
) -> None:
    """Work until Ctrl-C: wait for runs, train, send updates."""
    import asyncio

    from agent.home import settings

    os.umask(0o077)
    home = homes.open_home("agent")
    held = homes.lock_home(
        home, "agent"
    )  # first: until then, join --replace may change the enrollment
    joined = settings.read_enrollment(home)
    index, parts = _parse_part(part) if part else (None, None)
    chosen = settings.read(home, part=index, parts=parts, split=split)
    _configure_logs(home, chosen.log_level)

    from agent.daemon.agent import Agent

    # What is here now stays: else garbage waits until it is a quarter as much as all modules.
    gc.collect()
    gc.freeze()
    say(f"agent {joined.name} ({joined.peer}) of fleet {joined.fleet}; Ctrl-C stops it")
    try:
        asyncio.run(Agent(home, joined, chosen).serve())
    except Exception as err:
        crash_reports.save(home, err)
        raise
    finally:
        held.release()
    say("agent stopped")


def _configure_logs(home: Path, level: str) -> None:
    import logging

    from agent.home import logs

    person = logging.StreamHandler(sys.stderr)
    person.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logs.configure(home, level, person)


@app.command()
def status(
    watch: Annotated[
        bool, typer.Option("--watch", help="Again each second, until Ctrl-C.")
    ] = False,
    json: Json = False,
) -> None:
    """What the agent on this machine is doing."""
    home = homes.open_home("agent")
    if not watch:
        sys.stdout.write(_format_status(home, json=json))
        return
    moving = sys.stdout.isatty() and not json
    told = ""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            try:
                text = _format_status(home, json=json)
            except NotRunning as err:
                text = (json_output.error(err) if json else json_output.format_error(err)) + "\n"
            if moving:  # home, each line cleared to its end, then what is below
                lines = "".join(f"{line}\x1b[K\n" for line in text.splitlines())
                sys.stdout.write(f"\x1b[H{lines}\x1b[J" if told else f"\x1b[2J\x1b[H{lines}")
            elif text != told:
                sys.stdout.write(text)
            sys.stdout.flush()
            told = text
            time.sleep(1.0)


def _format_status(home: Path, *, json: bool) -> str:
    from agent.home import status_files

    told = status_files.read_status(home)
    if told is None or not is_running(home):
        raise NotRunning("the agent is not running", "start it: commonweight-agent run")
    if json:
        return json_output.ok(told) + "\n"
    from protocols.messages.states import PeerState, label

    links = f"coordinator {'●' if told.session else '○'}  mqtt {'●' if told.mqtt else '○'}"
    work = f"  run {told.run} round {told.round}" if told.run else ""
    text = f"{label(PeerState(told.state), told.reason)}{work}\n{links}\n"
    if told.free_at > time.time():
        text += f"expects to work again {time.strftime('%a %H:%M', time.localtime(told.free_at))}\n"
    text += _format_version(told)
    if told.share < 1:
        text += f"works {told.share:.0%} of the time\n"
    text += f"{told.name} {told.peer}, up {_format_uptime(told.since)}, pid {told.pid}\n"
    return text + (f"last error: {told.last_error}\n" if told.last_error else "")


def _format_version(told: Status) -> str:
    """Which version is here, and what peers hold while the coordinator is away."""
    if told.head is None:
        return ""
    head = told.head
    text = f"holds version {head.version} of {head.run} ({head.digest[:12]})"
    if not told.session and told.heard:
        text += f"; {told.alike} of {told.heard} peers heard hold the same"
    text += f"; shares it at {told.shares_at}" if told.shares_at else ""
    return text + "\n"


def _format_uptime(since: float) -> str:
    minutes = int(time.time() - since) // 60
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


cli_owner.add_to(app)
app.add_typer(cli_policy.policy, name="policy")
app.add_typer(service.service, name="service")
app.add_typer(task.task, name="task")
app.add_typer(questions.questions, name="questions")
app.command("export")(export.export)
app.command("predict")(predict.predict)
app.command("serve")(serve.serve)


def main() -> None:
    """The entry point: our errors become a message, a hint and an exit code."""
    code = 1  # of an exception that is not ours
    try:
        code = cli_entry.run(app)
    finally:
        exits.exit_within(EXIT_TIMEOUT_S, code)
    raise SystemExit(code)
