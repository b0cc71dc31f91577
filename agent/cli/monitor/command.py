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
) -> None:
    """Watch this machine: its policy, CPU, budget, and what left it."""
    home = homes.open_home("agent")
    if once or not sys.stdout.isatty():
        _print(home)
        return
    from agent.cli.monitor.app import OwnerMonitor
    from agent.home import status_files

    OwnerMonitor(home, lambda want: status_files.ask(home, want, time.time())).run()


def _print(home: Path) -> None:
    from agent.cli.monitor.panels import panels
    from agent.cli.monitor.readings import MachineReader

    reader = MachineReader(home)
    reader.read()
    time.sleep(1.0)  # the use of the CPU needs two readings
    for panel in panels(reader.read()):
        print_text(f"{panel.title}")
        for line in panel.lines:
            print_text(f"  {line.text}".rstrip())
