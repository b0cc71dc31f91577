"""`commonweight-agent data`: look at your data before anybody else does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, cast, get_args

import typer

from agent.cli.common import Json, parse_pair, print_data, print_line
from agent.data.settings import Format
from agent.home import settings
from protocols.errors import UsageError
from protocols.local import homes
from protocols.local.command_line import App

if TYPE_CHECKING:
    from agent.data.table_report import TableReport

data = App(name="data", help="Look at your data: what a fleet would see, and what would stay.")


@data.callback()
def group() -> None:
    """Look at your data: what a fleet would see, and what would stay."""


@data.command("check")
def check(
    path: Annotated[
        str | None, typer.Argument(help="A table; by default the agent's data.")
    ] = None,
    target: Annotated[str, typer.Option(help="The column that a model is to predict.")] = "",
    json: Json = False,
) -> None:
    """Show what a run on a table would be told, and what is odd about it. Nothing is sent."""
    from pathlib import Path

    from agent.data import open_table
    from agent.setup import own_data
    from agent.tasks import data_checks

    chosen = settings.read(homes.home_path("agent"), data=settings.data_path(path))
    if not chosen.data:
        raise UsageError("no data are set on this machine", "commonweight-agent data check FILE")
    known = settings.data_settings(chosen, Path())
    own_data.check_path(chosen)
    data_checks.check("tabular", known)
    from agent.data import table_report
    from agent.data.value_map import with_values

    reader = with_values(open_table(known), known.values, known.formats)
    found = table_report.report(reader, known, target)
    print_data(found, _lines(chosen.data, found), json=json)


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


def _lines(path: str, found: TableReport) -> list[str]:
    """The report for a person."""
    rows = [
        (one.name, one.kind, f"{one.missing:,}", one.told, f"{one.stays:,}" if one.stays else "")
        for one in found.columns
    ]
    head = ("column", "kind", "missing", "a run would be told", "rare values that stay")
    widths = [max(len(row[place]) for row in (head, *rows)) for place in range(4)]
    lines = [
        f"{path}: {found.rows:,} rows, {len(rows)} columns. Nothing has left this machine.",
        "",
    ]
    for row in (head, *rows):
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        lines.append("  ".join([*cells, row[4]]).rstrip())
    notes = [f"{one.name}: {note}" for one in found.columns for note in one.notes]
    return [*lines, "", *found.notes, *notes] if found.notes or notes else lines
