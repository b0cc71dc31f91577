"""`commonweight analyze "count, mean(age) by sex"`: figures from tables that stay put."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from coordinator.cli.common import Json, connect, print_table
from coordinator.remote.durations import parse_seconds
from protocols.errors import UsageError
from protocols.local import json_output


def add_to(app: typer.Typer) -> None:
    app.command("analyze")(analyze)


def analyze(
    question: Annotated[
        str, typer.Argument(help='Such as "count, mean(age), quantile(income, 0.5) by sex".')
    ],
    where: Annotated[
        str, typer.Option(help="Rows that count: \"age >= 18 and city == 'Oslo'\".")
    ] = "",
    epsilon: Annotated[
        float, typer.Option(min=0.0, help="Answers with noise, of this privacy cost (0: without).")
    ] = 0.0,
    bounds: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=LEAST..MOST, for noise; values beyond count as these."),
    ] = None,
    deadline: Annotated[
        str, typer.Option(help="Go on without peers that have not answered then.")
    ] = "10m",
    json: Json = False,
) -> None:
    """Ask every peer about its own table. Rows never leave; each owner decides what may be told."""
    from coordinator.cli import analysis_table
    from coordinator.remote import analysis
    from protocols.analytics import parser

    limits = dict(_bounds(text) for text in bounds or [])
    asked = parser.parse_query(question, where, epsilon=epsilon, bounds=limits)
    remote = connect()
    found = analysis.ask(remote, asked, parse_seconds(deadline))
    called = {peer["peer"]: peer["name"] for peer in remote.peers()}
    left_out = {called.get(peer, peer): why for peer, why in found.left_out.items()}
    if json:
        sys.stdout.write(json_output.ok({"answer": found, "label": found.label}) + "\n")
        return
    titles, rows = analysis_table.rows(found)
    keys = [f"column{number}" for number in range(len(titles))]
    table = [dict(zip(keys, row, strict=True)) for row in rows]
    print_table(table, dict(zip(keys, titles, strict=True)), "no group is large enough to be told")
    sys.stderr.write(f"{found.label}\n")
    for name, why in left_out.items():
        sys.stderr.write(f"{name}: {why}\n")


def _bounds(text: str) -> tuple[str, tuple[float, float]]:
    name, equals, limits = text.partition("=")
    least, dots, most = limits.partition("..")
    try:
        found = float(least), float(most)
    except ValueError:
        equals = ""
        found = 0.0, 0.0
    if not (name and equals and dots and found[0] < found[1]):
        raise UsageError(f"{text!r} is no bound", "--bounds age=0..120")
    return name, found
