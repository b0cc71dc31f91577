"""`commonweight monitor` and `commonweight status`: show the fleet.

Textual is imported inside the commands that need it, so that `--help` stays fast.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from coordinator.cli.common import Json, print_line
from coordinator.cli.names import complete_peers
from protocols.local import cli_entry, json_output
from protocols.local.command_line import MORE


def add_to(app: typer.Typer) -> None:
    app.command("monitor")(monitor)
    app.command("status")(status)


def monitor(
    once: Annotated[bool, typer.Option("--once", help="Print one table and exit.")] = False,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Disable the keys that change something.")
    ] = False,
    ascii_: Annotated[
        bool, typer.Option("--ascii", help="Only ASCII, for plain consoles.")
    ] = False,
    record: Annotated[
        Path | None, typer.Option(help="Write all messages to this file.", rich_help_panel=MORE)
    ] = None,
    replay: Annotated[
        str | None, typer.Option(help="Play this recording; `demo` is a built-in one.")
    ] = None,
    speed: Annotated[
        float, typer.Option(min=0.01, help="Speed of the replay.", rich_help_panel=MORE)
    ] = 1.0,
    join: Annotated[
        str | None,
        typer.Option(help="A ticket with a role (file:PATH, or - to paste): watch from here on."),
    ] = None,
    name: Annotated[
        str,
        typer.Option(
            help="With --join: the operator's name; default: this host's.", rich_help_panel=MORE
        ),
    ] = "",
    via: Annotated[
        str | None,
        typer.Option(
            help="Ask this peer (name or HOST:PORT) while the coordinator is away.",
            autocompletion=complete_peers,
        ),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="In a browser on this machine (extra: serve).")
    ] = False,
    host: Annotated[
        str, typer.Option(help="For --serve; this machine only.", rich_help_panel=MORE)
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="For --serve (0: any).", rich_help_panel=MORE)] = 0,
) -> None:
    """Watch the fleet in the terminal."""
    if record is not None and (serve or replay is not None or via is not None):
        from protocols.errors import UsageError

        raise UsageError(
            "--record writes the messages of a coordinator to this terminal's monitor",
            "leave --serve, --replay and --via out",
        )
    if join is not None:
        _join(join, name)
    from coordinator.monitor import web

    source = _source(replay, speed, via)
    if serve:
        options = ["--read-only"] if read_only else []
        options += ["--ascii"] if ascii_ else []
        options += ["--replay", replay, "--speed", str(speed)] if replay else []
        options += ["--via", via] if via else []
        web.serve_monitor(host, port, options)
        return
    screen = (sys.stdout.isatty() or web.is_served()) and not once
    if screen and replay is None:
        read_only = read_only or via is not None or _is_observer()
    with ExitStack() as stack:
        if record is not None:
            from coordinator.remote.recording import Recorder, RecordingSource

            recorder = Recorder(record)
            stack.callback(recorder.close)
            source = RecordingSource(source, recorder)
        if screen:
            _run(source, replay=replay is not None, read_only=read_only, ascii_only=ascii_)
        elif record is not None:
            _record(source)
        else:
            if replay is not None:
                source.seek(source.length_s)
            clock = time.time if replay is None else source.clock
            heading = "" if via is None else source.heading
            _print(asyncio.run(source.snapshot()), clock(), ascii_only=ascii_, heading=heading)


def _source(replay: str | None, speed: float, via: str | None) -> Any:
    """What the monitor shows. Raises CommonweightError if it is not there."""
    if replay is not None:
        from coordinator.remote.recording import DEMO_FILE
        from coordinator.remote.replay import ReplaySource

        return ReplaySource(DEMO_FILE if replay == "demo" else Path(replay), speed)
    from coordinator.remote import access

    if via is not None:
        from coordinator.remote.peer_source import PeerSource

        return PeerSource(access.open_home(), via)
    from coordinator.remote.live_source import LiveSource

    return LiveSource(access.open_home())


def _join(ticket: str, name: str) -> None:
    from coordinator.remote import access

    joined = access.join(cli_entry.read_ticket(ticket), name)
    print_line(f"joined fleet {joined.fleet} as {joined.role}; next: commonweight monitor")


def _print(fleet: Any, now: float, *, ascii_only: bool = False, heading: str = "") -> None:
    from rich.console import Console

    from coordinator.monitor.plain_table import plain_table
    from protocols.local import terminal_text

    if not fleet.peers:
        print_line("no peers yet. Create a ticket: commonweight ticket create")
    console = Console()
    table = plain_table(fleet, now, heading, width=console.width)
    if not ascii_only:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    # Escape codes for colors are ASCII already and stay.
    for line in capture.get().split("\n")[:-1]:
        sys.stdout.write(terminal_text.ascii_only(line) + "\n")


def _is_observer() -> bool:
    """True if this home has access to a fleet, and may only watch it."""
    from coordinator.remote import access

    home = access.open_home()
    is_joined = (home / access.ACCESS_FILE).exists()
    return is_joined and access.connection_info(home).access.role == "observer"


def _record(source: Any) -> None:
    """Record without a screen, until Ctrl-C."""
    from coordinator.remote.follower import FleetFollower

    print_line("recording; Ctrl-C stops it")
    with suppress(KeyboardInterrupt):
        asyncio.run(FleetFollower(source, time.time).run())


def _run(source: Any, *, replay: bool, read_only: bool, ascii_only: bool) -> None:
    """Run the terminal UI over `source`. SIGTERM ends it and restores the terminal."""
    from coordinator.monitor.tui import config
    from coordinator.monitor.tui.app import MonitorApp
    from coordinator.monitor.tui.gc_tuning import tune_gc
    from coordinator.monitor.tui.replay_app import ReplayApp

    app: MonitorApp
    if replay:
        app = ReplayApp(source, config=config.read(), ascii_only=ascii_only)
    else:
        app = MonitorApp(source, read_only=read_only, config=config.read(), ascii_only=ascii_only)
    tune_gc()
    signal.signal(signal.SIGTERM, lambda *_: app.exit())
    app.run()


def status(
    watch: Annotated[
        bool, typer.Option("--watch", help="Update every second, until Ctrl-C.")
    ] = False,
    json: Json = False,
) -> None:
    """Show the fleet in a few lines."""
    from coordinator.remote import access
    from coordinator.remote.api_client import Remote

    if not watch:
        _print_status(Remote(access.open_home()).fleet(), json=json)
        return
    with suppress(KeyboardInterrupt):
        _watch(json=json)


def _watch(*, json: bool) -> None:
    """Update a table on a terminal; elsewhere print a table or a line of JSON on every change.

    While the coordinator does not answer, the error is shown and the request retried.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from coordinator.monitor.plain_table import plain_table
    from coordinator.remote import access
    from coordinator.remote.api_client import Remote
    from protocols.errors import CommonweightError

    home, remote = access.open_home(), None
    console = Console()
    state: object
    live = None if json or not sys.stdout.isatty() else Live(console=console, auto_refresh=False)
    printed: object = None
    with live or nullcontext():
        while True:
            try:
                remote = remote or Remote(home)
                fleet = remote.fleet()
            except CommonweightError as err:
                remote, state = None, err.message
                text = json_output.format_error(err)
                if live is not None:
                    live.update(Text(f"{text}\ntrying again"), refresh=True)
                elif printed != state and json:
                    sys.stdout.write(json_output.error(err) + "\n")
                elif printed != state:
                    print_line(text)
            else:
                state = (fleet.epoch, fleet.seq)
                if live is not None:
                    live.update(plain_table(fleet, time.time(), width=console.width), refresh=True)
                elif printed != state:
                    _print_status(fleet, json=json)
            sys.stdout.flush()
            printed = state
            time.sleep(1.0)


def _print_status(fleet: Any, *, json: bool) -> None:
    import msgspec

    from coordinator.fleet import state

    if json:
        sys.stdout.write(json_output.ok(msgspec.Raw(state.encode(fleet, fleet.at))) + "\n")
    else:
        _print(fleet, time.time())
