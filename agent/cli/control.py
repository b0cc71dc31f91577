"""`commonweight-agent pause`, `logs`, `leave` and so on: what the owner does with an agent."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from msgspec.structs import replace

from agent.cli.common import (
    Json,
    format_duration,
    is_running,
    print_data,
    print_line,
)
from agent.home import enrollment_file, logs
from protocols.errors import CommonweightError, NotRunning, UsageError
from protocols.local import cli_entry, homes
from protocols.local.durations import parse_seconds
from protocols.messages.states import PauseReason

_POLL_EVERY_S, _POLL_OBEYED_S = 0.3, 0.1
#: An agent polls what its owner asks about once a second.
_MAX_OBEY_S = 10.0
_MAX_RESTART_S = 90.0


# --- work ------------------------------------------------------------------------------------


def pause(
    duration: Annotated[str, typer.Option("--for", help="For how long, such as 2h.")] = "",
) -> None:
    """Stop working until `resume`, or for a while. Finished work is kept."""
    until, then = 0.0, "; next: commonweight-agent resume"
    if duration:
        for_s = parse_seconds(duration)
        until, then = time.time() + for_s, f" for {format_duration(for_s)}"
    home = homes.open_home("agent")
    if _is_obeyed(home, "pause", until):
        print_line(f"paused{then}")
    else:
        print_line("the agent was asked to pause; when it has: commonweight-agent status")


def resume() -> None:
    """Work again, as far as the policy allows it."""
    home = homes.open_home("agent")
    if _is_obeyed(home, "run"):
        print_line("resumed")
    else:
        print_line("the agent was asked to work again; when it does: commonweight-agent status")


def finish() -> None:
    """Send the update of this round, then stop the agent."""
    from agent.home import status_files

    home = homes.open_home("agent")
    if not is_running(home):
        raise NotRunning("the agent is not running", "there is nothing to finish")
    status_files.ask(home, "finish", time.time())
    print_line("will stop after this round")


def restart() -> None:
    """Restart the agent with all settings; it continues its work."""
    from agent.home import status_files

    home = homes.open_home("agent")
    if not is_running(home):
        raise NotRunning("the agent is not running", "start it: commonweight-agent up")
    asked_at = time.time()
    request = status_files.read_request(home)
    status_files.write_request(home, replace(request, restart_at=asked_at))
    while time.time() < asked_at + _MAX_RESTART_S:
        status = status_files.read_status(home)
        if status is not None and status.since > asked_at:
            print_line("restarted")
            return
        time.sleep(_POLL_EVERY_S)
    raise CommonweightError(
        f"the agent has not restarted within {_MAX_RESTART_S:.0f} s",
        "see commonweight-agent logs; or stop it (Ctrl-C, commonweight-agent service stop) and "
        "start it again",
    )


def _is_obeyed(home: Path, want: Literal["pause", "run"], until: float = 0.0) -> bool:
    """Ask the agent to pause or to work again. True once it has done so, or if it does not run."""
    from agent.home import status_files

    asked_at = time.time()
    status_files.ask(home, want, asked_at, until)
    while time.time() < asked_at + _MAX_OBEY_S:
        status = status_files.read_status(home)
        if not is_running(home) or 0 < until <= time.time():
            return True
        if status is not None and status.at > asked_at:
            is_paused = PauseReason.USER in status.reason
            if is_paused == (want == "pause"):
                return True
        time.sleep(_POLL_OBEYED_S)
    return False


# --- information -----------------------------------------------------------------------------


def show_id(json: Json = False) -> None:
    """Show this machine's id, as the coordinator and the monitor do."""

    joined = enrollment_file.read_enrollment(homes.open_home("agent"))
    print_data({"peer": joined.peer, "name": joined.name}, [joined.peer], json=json)


def paths(json: Json = False) -> None:
    """Show where this agent keeps its files."""

    home = homes.home_path("agent")
    files = {
        "home": home,
        "settings": home / "settings.toml",
        "log": home / logs.FILE,
        "versions": home / "cache",
        "outbox": home / "outbox",
    }
    print_data(files, (f"{what:9} {path}" for what, path in files.items()), json=json)


def show_logs(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Follow until Ctrl-C.")] = False,
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Number of lines.")] = 50,
    json: Annotated[bool, typer.Option("--json", help="Print the JSON lines as logged.")] = False,
) -> None:
    """Show the agent's log."""

    log = logs.LogReader(homes.open_home("agent"))
    new = log.new_lines()
    if not new and not follow:
        print_line("the log is empty; next: commonweight-agent up")
    new = new[max(0, len(new) - lines) :]
    while True:
        for line in new:
            sys.stdout.write((line if json else logs.format_line(line)) + "\n")
        sys.stdout.flush()
        if not follow:
            return
        time.sleep(_POLL_EVERY_S)
        new = log.new_lines()


def show_ledger(
    lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="Number of entries.")] = 50,
    told: Annotated[bool, typer.Option("--told", help="Show statistics in full.")] = False,
    json: Json = False,
) -> None:
    """Show what left this machine, was refused, or offered to you.

    The coordinator's log of versions: commonweight-agent ledger audit.
    """
    from agent.home import audit_log, offer_log, refusal_log

    home = homes.open_home("agent")
    found = [*audit_log.read(home), *refusal_log.read(home), *offer_log.read(home)]
    entries = sorted(found, key=lambda entry: entry.at)
    entries = entries[max(0, len(entries) - lines) :]
    rows: list[str] = []
    for entry in entries:
        rows.append(audit_log.format_entry(entry))
        if told and entry.told and entry.what not in audit_log.NOTHING_LEFT:
            rows.append(f"    {entry.told}")
    print_data(entries, rows, json=json)
    if not (entries or json):
        print_line("nothing has left this machine yet")


def doctor(json: Json = False) -> None:
    """Check everything that this agent needs. The exit status is 6 if a check fails."""
    from agent.setup.doctor import examine_agent

    cli_entry.print_checks(examine_agent(homes.home_path("agent")), json=json)


def leave(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the coordinator.")] = False,
) -> None:
    """Leave the fleet: revoke and delete the key. Data and settings stay."""
    from agent.setup import enrollment

    home = homes.open_home("agent")
    with enrollment.lock_home(home):
        joined = enrollment_file.read_enrollment(home)
        if not yes:
            if not sys.stdin.isatty():
                raise UsageError("leaving asks first, and there is no terminal", "add --yes")
            typer.confirm(f"{joined.name} leaves fleet {joined.fleet}?", abort=True, err=True)
        enrollment.leave(home, joined, offline=offline)
    print_line("left the fleet; the keys are deleted, data and settings stay")
    if offline:
        print_line(f"the coordinator does not know: commonweight peers remove {joined.name}")
    print_line("to join again: commonweight-agent join TICKET")


#: Those at the top level of help.
COMMANDS: dict[str, Callable[..., None]] = {
    "pause": pause,
    "resume": resume,
    "logs": show_logs,
    "ledger": show_ledger,
    "doctor": doctor,
    "leave": leave,
}
