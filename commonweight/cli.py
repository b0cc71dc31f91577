"""The entry point of the `commonweight` command: the coordinator's commands."""

from __future__ import annotations

from coordinator.cli.main import app
from protocols.local import cli_entry

__all__ = ["app", "main"]


def main() -> None:
    """Run the command. Prints errors with a hint, and exits with their status."""
    raise SystemExit(cli_entry.run(app))
