"""`commonweight-agent monitor`: this machine in a terminal, for its owner.

Textual is imported inside the command, so that `--help` stays fast.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from agent.cli.common import print_text
from protocols.local import homes


def monitor(
    once: Annotated[bool, typer.Option("--once", help="Print everything once and exit.")] = False,
    in_ascii: Annotated[bool, typer.Option("--ascii", help="Draw with ASCII only.")] = False,
    light: Annotated[
        bool, typer.Option("--light", help="Use colors for a light terminal.")
    ] = False,
) -> None:
    """Watch this machine: its policy, CPU, budget, and what left it."""
    home = homes.open_home("agent")
    if once or not sys.stdout.isatty():
        _print(home, in_ascii=in_ascii)
        return
    from agent.cli.monitor.app import OwnerMonitor
    from agent.cli.monitor.readings import MachineReader
    from agent.home import status_files

    OwnerMonitor(
        MachineReader(home).read,
        lambda want: status_files.ask(home, want, time.time()),
        look="light" if light else "dark",
        in_ascii=in_ascii,
    ).run()


def _print(home: Path, *, in_ascii: bool) -> None:
    from agent.cli.monitor.panels import panels
    from agent.cli.monitor.readings import MachineReader
    from protocols.local.terminal_text import ascii_only

    reader = MachineReader(home)
    reader.read()
    time.sleep(1.0)  # the use of the CPU needs two readings
    for panel in panels(reader.read()):
        for text in (panel.title, *(f"  {line.text}".rstrip() for line in panel.lines)):
            print_text(ascii_only(text) if in_ascii else text)
