"""`commonweight monitor` and `commonweight status`: looking at the fleet.

Textual is imported inside the commands that need it: `--help` stays quick.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from protocols.local import cli_entry, json_output

Json = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout.")]


def add_to(app: typer.Typer) -> None:
    app.command("monitor")(monitor)
    app.command("status")(status)


def print_line(text: str) -> None:
    """A line for a person (stderr)."""
    sys.stderr.write(text + "\n")


def monitor(
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="Switch off what changes things.")
    ] = False,
    ascii_: Annotated[
        bool, typer.Option("--ascii", help="Only ASCII, for plain consoles.")
    ] = False,
    record: Annotated[Path | None, typer.Option(help="Write what is heard into this file.")] = None,
    replay: Annotated[
        str | None, typer.Option(help="Show this recording; `demo` is one that is here.")
    ] = None,
    speed: Annotated[float, typer.Option(min=0.01, help="How fast to replay.")] = 1.0,
    join: Annotated[
        str | None,
        typer.Option(help="A ticket with a role (file:PATH, or - to paste): watch from here on."),
    ] = None,
    via: Annotated[
        str | None,
        typer.Option(help="Ask this peer (name or HOST:PORT) while the coordinator is away."),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="In a browser on this machine (extra: serve).")
    ] = False,
    host: Annotated[str, typer.Option(help="For --serve; this machine only.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="For --serve (0: any).")] = 0,
) -> None:
    """Watch the fleet in the terminal."""
    if record is not None and (serve or replay is not None or via is not None):
        from protocols.errors import UsageError

        raise UsageError(
            "--record writes what a coordinator says to this terminal's monitor",
            "leave --serve, --replay and --via out",
        )
    if join is not None:
        _join(join)
    if serve:
        from coordinator.monitor.web import serve_monitor

        options = ["--read-only"] if read_only else []
        options += ["--ascii"] if ascii_ else []
        options += ["--replay", replay, "--speed", str(speed)] if replay else []
        options += ["--via", via] if via else []
        serve_monitor(host, port, options)
    elif replay is not None:
        _replay(replay, speed, once=once, ascii_only=ascii_)
    elif via is not None:
        _via(via, once=once, ascii_only=ascii_)
    else:
        _live(once=once, read_only=read_only, ascii_only=ascii_, record=record)


def _join(given: str) -> None:
    from coordinator.remote import access

    found = access.join(cli_entry.read_ticket(given))
    print_line(f"joined as {found.role} of fleet {found.fleet}; from now on: commonweight monitor")


def _print(fleet: Any, now: float, *, ascii_only: bool = False, heading: str = "") -> None:
    from rich.console import Console

    from coordinator.monitor.plain_table import plain_table
    from coordinator.monitor.terminal_text import ascii_only as in_ascii

    console = Console()
    table = plain_table(fleet, now, heading, width=console.width)
    if not ascii_only:
        console.print(table)
        return
    with console.capture() as taken:
        console.print(table)
    for line in taken.get().split("\n")[:-1]:
        # Colours are escape codes: they are ASCII, and left alone.
        sys.stdout.write(in_ascii(line) + "\n")


def _live(*, once: bool, read_only: bool, ascii_only: bool, record: Path | None) -> None:
    from coordinator.remote import access
    from coordinator.remote.api_client import LiveSource
    from coordinator.remote.recording import Recorder, RecordingSource
    from coordinator.remote.source import Source

    home = access.open_home()
    source: Source = LiveSource(home)
    screen = sys.stdout.isatty() and not once
    if record is None and not screen:
        _print(asyncio.run(source.snapshot()), time.time(), ascii_only=ascii_only)
        return
    if screen:
        from coordinator.monitor.tui import config
        from coordinator.monitor.tui.app import MonitorApp

        chosen = config.read()
        if (home / access.ACCESS_FILE).exists():
            read_only = read_only or access.connection_info(home).role == "observer"
    recorder = Recorder(record) if record else None
    if recorder is not None:
        source = RecordingSource(source, recorder)
    try:
        if screen:
            _run(MonitorApp(source, read_only=read_only, config=chosen, ascii_only=ascii_only))
        else:
            _record(source)
    finally:
        if recorder is not None:
            recorder.close()


def _via(peer: str, *, once: bool, ascii_only: bool) -> None:
    from coordinator.remote import access
    from coordinator.remote.peer_source import PeerSource

    source = PeerSource(access.open_home(), peer)
    if once or not sys.stdout.isatty():
        shown = asyncio.run(source.snapshot())
        _print(shown, time.time(), ascii_only=ascii_only, heading=source.heading)
        return
    from coordinator.monitor.tui import config
    from coordinator.monitor.tui.app import MonitorApp

    _run(MonitorApp(source, read_only=True, config=config.read(), ascii_only=ascii_only))


def _record(source: Any) -> None:
    """Only write down, until Ctrl-C."""
    from coordinator.remote.follower import FleetFollower

    print_line("recording; Ctrl-C ends it")
    try:
        asyncio.run(FleetFollower(source, time.time).run())
    except KeyboardInterrupt:
        pass


def _replay(name: str, speed: float, *, once: bool, ascii_only: bool) -> None:
    from coordinator.remote.recording import DEMO_FILE
    from coordinator.remote.replay import ReplaySource

    source = ReplaySource(DEMO_FILE if name == "demo" else Path(name), speed)
    if once or not sys.stdout.isatty():
        source.seek(source.length_s)
        _print(asyncio.run(source.snapshot()), source.clock(), ascii_only=ascii_only)
        return
    from coordinator.monitor.tui import config
    from coordinator.monitor.tui.replay_app import ReplayApp

    _run(ReplayApp(source, config=config.read(), ascii_only=ascii_only))


def _run(app: Any) -> None:
    """Show `app`. Asked to end (SIGTERM), it gives the terminal back as it was."""
    from coordinator.monitor.tui.gc_tuning import tune_gc

    tune_gc()
    signal.signal(signal.SIGTERM, lambda *_: app.exit())
    app.run()


def status(
    watch: Annotated[
        bool, typer.Option("--watch", help="Again each second, until Ctrl-C.")
    ] = False,
    json: Json = False,
) -> None:
    """The fleet in a few lines."""
    from coordinator.remote import access
    from coordinator.remote.api_client import Remote

    if not watch:
        _show(Remote(access.open_home()).fleet(), json=json)
        return
    try:
        _watch(json=json)
    except KeyboardInterrupt:
        pass


def _watch(*, json: bool) -> None:
    """A picture that moves on a terminal; elsewhere a line of JSON or a table whenever it changes.

    A coordinator that is away is said and waited for.
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
    live = None if json or not sys.stdout.isatty() else Live(console=console, auto_refresh=False)
    told: object = None
    with live or _Nothing():
        while True:
            try:
                remote = remote or Remote(home)
                fleet = remote.fleet()
            except CommonweightError as err:
                remote = None
                if live is not None:
                    live.update(
                        Text(f"{json_output.format_error(err)}\ntrying again"), refresh=True
                    )
                elif told != err.message:
                    sys.stdout.write(json_output.error(err) + "\n") if json else print_line(
                        json_output.format_error(err)
                    )
                    sys.stdout.flush()
                told = err.message
            else:
                if live is not None:
                    table = plain_table(fleet, time.time(), width=console.width)
                    live.update(table, refresh=True)
                elif told != (fleet.epoch, fleet.seq):
                    _show(fleet, json=json)
                    sys.stdout.flush()
                told = (fleet.epoch, fleet.seq)
            time.sleep(1.0)


class _Nothing:
    """In place of the live picture where there is none."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


def _show(fleet: Any, *, json: bool) -> None:
    import msgspec

    from coordinator.fleet import reducer as fleets

    if json:
        sys.stdout.write(json_output.ok(msgspec.Raw(fleets.encode(fleet, fleet.at))) + "\n")
    else:
        _print(fleet, time.time())
