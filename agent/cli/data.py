"""`commonweight-agent data`: look at your data before anybody else does."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from agent.cli.common import Json, parse_pair, print_data, print_line
from agent.data.settings import Format
from agent.home import settings
from protocols.errors import UsageError
from protocols.local import homes
from protocols.local.command_line import App

if TYPE_CHECKING:
    from agent.data.conversations import Report
    from agent.data.table_report import TableReport

#: How a command in a note begins.
_COMMAND = "commonweight-agent "

data = App(name="data", help="Look at your data: what a fleet would see, and what would stay.")


@data.callback()
def group() -> None:
    """Look at your data: what a fleet would see, and what would stay."""


@data.command("check")
def check(
    path: Annotated[
        str | None,
        typer.Argument(help="A table, or conversations (JSONL); by default the agent's data."),
    ] = None,
    target: Annotated[str, typer.Option(help="The column that a model is to predict.")] = "",
    json: Json = False,
) -> None:
    """Show what a run would be told of a table, and what is odd. Nothing is sent.

    Of conversations, it shows how many there are and how long they are.
    """
    from pathlib import Path

    from agent.data import conversations, open_table
    from agent.setup import own_data
    from agent.tasks import data_checks

    chosen = settings.read(homes.home_path("agent"), data=settings.data_path(path))
    if not chosen.data:
        raise UsageError("no data are set on this machine", "commonweight-agent data check FILE")
    known = settings.data_settings(chosen, Path())
    own_data.check_path(chosen)
    if conversations.are_in(chosen.data):
        counted = conversations.report(chosen.data)
        print_data(counted, _conversation_lines(chosen.data, counted), json=json)
        return
    data_checks.check("tabular", known)
    from agent.data import table_report
    from agent.data.value_map import with_values

    reader = with_values(open_table(known), known.values, known.formats)
    found = table_report.report(reader, known, target)
    print_data(found, _lines(chosen.data, found, known.min_count), json=json)


@data.command("map")
def map_values(
    column: Annotated[str, typer.Argument(help="A column of the agent's data.")],
    pairs: Annotated[
        list[str] | None, typer.Argument(help="OLD=NEW: read OLD as NEW; may be repeated.")
    ] = None,
    clear: Annotated[
        bool, typer.Option("--clear", help="Read all its values as they are.")
    ] = False,
) -> None:
    """Read values of a column as other peers write them. The table itself is not changed."""
    home = homes.open_home("agent")
    new = dict(parse_pair(pair, "YES=yes") for pair in pairs or [])
    with settings.locked(home):
        own = settings.read_own(home).data_values
        before = {} if clear else own.get(column, {})
        values = own | {column: {**before, **new}}
        if clear or new:
            settings.change(home, data_values={name: v for name, v in values.items() if v})
    for old, used in values[column].items():
        print_line(f"{column}: {old!r} is read as {used!r}")
    if not values[column]:
        print_line(f"{column}: all values are read as they are")


@data.command("format")
def format_column(
    column: Annotated[str, typer.Argument(help="A column of the agent's data.")],
    written: Annotated[
        str | None,
        typer.Argument(
            help=f"How it is written: {' or '.join(get_args(Format))}.", metavar="FORMAT"
        ),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Read its values as they are.")] = False,
) -> None:
    """Say how numbers or dates of a column are written. The table itself is not changed."""
    home = homes.open_home("agent")
    if not clear and written not in get_args(Format):
        raise UsageError(
            f"{written!r} is no format" if written else "FORMAT is missing",
            f"one of {', '.join(get_args(Format))}, such as data format {column} 31.12.2024",
        )
    with settings.locked(home):
        formats = dict(settings.read_own(home).data_formats)
        formats.pop(column, None)
        if not clear:
            formats[column] = cast(Format, written)
        settings.change(home, data_formats=formats)
    how = "as it is" if clear else f"as written like {written}"
    print_line(f"{column} is read {how}; see it: commonweight-agent data check")


def _conversation_lines(path: str, found: Report) -> list[str]:
    """The report on conversations for a person."""
    head = ("length", "least", "median", "95 %", "most")
    rows = [
        (name, *(f"{n:,}" for n in (of.least, of.median, of.p95, of.most)))
        for name, of in (
            ("turns", found.turns),
            ("characters", found.whole),
            ("characters of an answer", found.answers),
        )
    ]
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(len(head))]
    return [
        f"{path}: {found.conversations:,} conversations, {found.held_out:,} of them held out, "
        f"{found.repeated:,} repeated. Nothing has left this machine.",
        "",
        *("  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in (head, *rows)),
    ]


def _lines(path: str, found: TableReport, min_count: int) -> list[str]:
    """The report for a person, as wide as the terminal."""
    width = max(40, shutil.get_terminal_size().columns - 1)
    first = f"{path}: {found.rows:,} rows, {len(found.columns)} columns."
    notes: list[tuple[str, Sequence[str]]] = [("the table", found.notes)]
    notes += [(one.name or "(no name)", one.notes) for one in found.columns]
    odd = [(name, each) for name, each in notes if each]
    count = sum(len(each) for _, each in odd)
    told = (
        f"What a run would be told of it. No row leaves, nor a value of fewer than {min_count} "
        "rows (rare: how many such values there are):"
    )
    return [
        *textwrap.wrap(f"{first} Nothing has left this machine.", width),
        "",
        *textwrap.wrap(told, width),
        *_table(found, width),
        "",
        f"What is odd ({count}):" if odd else "Nothing is odd.",
        *(line for name, each in odd for line in _notes(name, each, width)),
    ]


def _table(found: TableReport, width: int) -> Iterator[str]:
    """A row for each column; the part that leaves has the rest of the width."""
    head = ("column", "kind", "missing", "rare", "told")
    rows = [
        (one.name or "(no name)", one.kind, f"{one.missing:,}", f"{one.stays:,}", one.told)
        for one in found.columns
    ]
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(4)]
    widths[0] = min(widths[0], max(12, width // 4))
    indent = 2 + sum(widths) + 2 * len(widths)
    for name, kind, missing, rare, told in (head, *rows):
        names = textwrap.wrap(name, widths[0]) or [""]
        texts = textwrap.wrap(told, max(16, width - indent)) or [""]
        cells = (names[0].ljust(widths[0]), kind.ljust(widths[1]))
        numbers = (missing.rjust(widths[2]), rare.rjust(widths[3]))
        yield "  ".join(["", *cells, *numbers, texts[0]]).rstrip()
        for more, text in zip_longest(names[1:], texts[1:], fillvalue=""):
            yield f"  {more.ljust(widths[0])}{' ' * (indent - 2 - widths[0])}{text}".rstrip()


def _notes(name: str, notes: Sequence[str], width: int) -> Iterator[str]:
    """The notes about a column. A command has a line of its own, however long it is."""
    yield f"  {name}"
    for note in notes:
        text, found, command = note.partition(_COMMAND)
        yield from textwrap.wrap(
            text, width, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False
        )
        if found:
            yield f"      {found}{command}"
