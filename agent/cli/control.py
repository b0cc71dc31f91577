"""`commonweight-agent`: what its owner can do with it, beside joining and running."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from protocols.errors import HomeLocked, NotRunning, UsageError
from protocols.local import homes, json_output

Json = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout.")]

_UNIT_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_POLL_EVERY_S = 0.3


def add_to(app: typer.Typer) -> None:
    app.command("pause")(pause)
    app.command("resume")(resume)
    app.command("finish")(finish)
    app.command("id")(show_id)
    app.command("paths")(paths)
    app.command("logs")(show_logs)
    app.command("ledger")(show_ledger)
    app.command("doctor")(doctor)
    app.command("leave")(leave)


def say(text: str) -> None:
    """A line for a person (stderr)."""
    sys.stderr.write(text + "\n")


def parse_duration(text: str) -> float:
    """`90s`, `30m`, `2h`, `7d` or plain seconds. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd]?)", text.strip())
    if not match:
        raise UsageError(f"{text!r} is no duration", "write 90s, 30m, 2h or 7d")
    return float(match[1]) * _UNIT_SECONDS[match[2] or "s"]


def is_running(home: Path) -> bool:
    """True if an agent works in this home now."""
    try:
        homes.lock_home(home, "agent").release()
    except HomeLocked:
        return True
    return False


# --- its work --------------------------------------------------------------------------------


def pause(
    duration: Annotated[str, typer.Option("--for", help="For how long, such as 2h.")] = "",
) -> None:
    """Stop working, keeping what is done; until `resume`, or for a while."""
    _request("pause", time.time() + parse_duration(duration) if duration else 0.0)
    say("paused" + (f" for {duration}" if duration else "; commonweight-agent resume goes on"))


def resume() -> None:
    """Work again, as the policy allows it."""
    _request("run", 0.0)
    say("goes on")


def finish() -> None:
    """End the round in hand, send it, then stop the agent."""
    home = homes.open_home("agent")
    if not is_running(home):
        raise NotRunning("the agent is not running", "there is nothing to finish")
    _request("finish", 0.0)
    say("will stop after this round")


def _request(want: Any, until: float) -> None:
    from agent.home import status_files

    home = homes.open_home("agent")
    kept = status_files.read_request(home).modes
    status_files.write_request(
        home, status_files.OwnerRequest(want=want, until=until, at=time.time(), modes=kept)
    )


# --- what it is ------------------------------------------------------------------------------


def show_id(json: Json = False) -> None:
    """This machine's id, as the coordinator and the monitor show it."""
    from agent.home import settings

    joined = settings.read_enrollment(homes.open_home("agent"))
    if json:
        sys.stdout.write(json_output.ok({"peer": joined.peer, "name": joined.name}) + "\n")
    else:
        sys.stdout.write(joined.peer + "\n")


def paths(json: Json = False) -> None:
    """Where this agent keeps its files."""
    from agent.home import logs

    home = homes.home_path("agent")
    files = {
        "home": home,
        "settings": home / "settings.toml",
        "log": home / logs.FILE,
        "versions": home / "cache",
        "outbox": home / "outbox",
    }
    if json:
        sys.stdout.write(json_output.ok(files) + "\n")
        return
    for what, path in files.items():
        sys.stdout.write(f"{what:9} {path}\n")


def show_logs(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many at first.")] = 50,
    json: Annotated[bool, typer.Option("--json", help="As logged: JSON lines.")] = False,
) -> None:
    """What the agent has logged."""
    from agent.home import logs

    log = logs.LogReader(homes.open_home("agent"))
    found = log.new_lines()
    if not found and not follow:
        say("nothing is logged yet; commonweight-agent run")
    found = found[max(0, len(found) - lines) :]
    while True:
        for line in found:
            sys.stdout.write((line if json else logs.format_line(line)) + "\n")
        sys.stdout.flush()
        if not follow:
            return
        time.sleep(_POLL_EVERY_S)
        found = log.new_lines()


def show_ledger(
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="How many of the last.")] = 50,
    told: Annotated[bool, typer.Option("--told", help="Statistics word for word.")] = False,
    json: Json = False,
) -> None:
    """What has left this machine in its work: statistics, weights, metrics."""
    from agent.home import audit_log

    found = audit_log.read(homes.open_home("agent"))
    found = found[max(0, len(found) - lines) :]
    if json:
        sys.stdout.write(json_output.ok(found) + "\n")
        return
    for departure in found:
        sys.stdout.write(audit_log.format_entry(departure) + "\n")
        if told and departure.told:
            sys.stdout.write(f"    {departure.told}\n")
    if not found:
        say("nothing has left this machine yet")


def doctor(json: Json = False) -> None:
    """Look for what keeps this agent from working. Exit status 6 when something does."""
    from agent.setup.doctor import examine_agent
    from protocols.local import cli_entry

    cli_entry.print_checks(examine_agent(homes.home_path("agent")), json=json)


def leave(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Without telling the coordinator.")
    ] = False,
) -> None:
    """Leave the fleet: the key is given up here and refused there. Data and settings stay."""
    from agent.home import settings
    from agent.setup import enrollment

    home = homes.open_home("agent")
    with enrollment.lock_home(home):
        joined = settings.read_enrollment(home)
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError("leaving asks first, and there is no terminal", "add --yes")
            typer.confirm(f"{joined.name} leaves fleet {joined.fleet}?", abort=True, err=True)
        enrollment.leave(home, joined, offline=offline)
    say("left the fleet; its keys are deleted, data and settings are where they were")
    if offline:
        say(f"the coordinator was not told: commonweight peers remove {joined.name}")
    say("to join again: commonweight-agent join TICKET")
