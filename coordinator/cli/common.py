"""What the commands share: a client of the coordinator, common options, and output."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from protocols.errors import UsageError
from protocols.local.cli_entry import print_json as print_json
from protocols.local.cli_entry import print_line as print_line
from protocols.local.cli_entry import print_result as print_result
from protocols.local.cli_entry import print_text as print_text

if TYPE_CHECKING:
    from coordinator.remote.api_client import Remote

T = TypeVar("T")
_PIPE_COLUMNS = 200
#: By a column's title: the function that gives the cell of an item, or the key of the cell.
Columns = Mapping[str, Callable[[T], object] | str]

Json = Annotated[bool, typer.Option("--json", help="One line of JSON on stdout.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def connect(timeout_s: float = 15.0, *, may_be_stopped: bool = False) -> Remote:
    """A client of the coordinator on this machine, or of the one that was joined.

    `may_be_stopped`: read the ledger of the home if its coordinator is not running.
    """
    from coordinator.remote import access
    from coordinator.remote.api_client import Remote
    from coordinator.remote.stopped_home import open_remote

    return (open_remote if may_be_stopped else Remote)(access.open_home(), timeout_s)


def confirm(question: str, undone: str, command: str) -> None:
    """Ask before something that cannot be undone. Raises UsageError without a terminal: `undone`,
    such as "nothing was deleted", and the command that does not ask."""
    if not sys.stdin.isatty():
        raise UsageError(f"{undone}: there is no terminal to confirm it on", f"{command} --yes")
    typer.confirm(question, abort=True, err=True)


def print_table(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print a table, to stdout. Names and values of peers are neither markup nor more lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def cell(value: object) -> Text:
        return Text("".join(c if c.isprintable() else "·" for c in str(value)))

    table = Table(box=None, pad_edge=False)
    for title in titles:
        table.add_column(cell(title))
    for row in rows:
        table.add_row(*map(cell, row))
    # Without a terminal, such as in a pipe, a row stays on one line.
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPE_COLUMNS
    Console(width=width).print(table)


def print_list(items: Sequence[T], columns: Columns[T], empty: str, *, json: bool = False) -> None:
    """Print items as a line of JSON, or as a table; print `empty` if there are none."""
    if json:
        print_json(items)
    elif items:
        cells: list[Callable[[Any], object]] = [
            itemgetter(cell) if isinstance(cell, str) else cell for cell in columns.values()
        ]
        print_table(columns, ([cell(item) for cell in cells] for item in items))
    else:
        print_line(empty)
