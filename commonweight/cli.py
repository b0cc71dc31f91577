"""The entry point of the `commonweight` command: the coordinator's commands, and `simulate`."""

from __future__ import annotations

from commonweight.simulation.command import simulate
from coordinator.cli.main import app
from protocols.local import cli_entry

__all__ = ["app", "main"]

app.command("simulate")(simulate)


def main() -> None:
    """Run the command. Prints errors with a hint, and exits with their status."""
    raise SystemExit(cli_entry.run(app))
