"""What all commands share: the `--json` option, the coordinator to talk to, a plain table."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

Json = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout.")]


def connect() -> Any:
    from coordinator.remote import access
    from coordinator.remote.api_client import Remote

    return Remote(access.open_home())


def print_table(rows: list[dict[str, Any]], columns: dict[str, str], empty: str) -> None:
    from rich.console import Console
    from rich.table import Table

    if not rows:
        sys.stderr.write(empty + "\n")
        return
    shown = Table(box=None, pad_edge=False)
    for title in columns.values():
        shown.add_column(title)
    for row in rows:
        shown.add_row(*(str(row[key]) for key in columns))
    Console().print(shown)
