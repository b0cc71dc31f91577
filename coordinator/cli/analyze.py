"""`commonweight analyze "count, mean(age) by sex"`: statistics of the tables of all peers."""

from __future__ import annotations

from typing import Annotated

import typer

from coordinator.cli.common import Json, connect, peer_names, print_json, print_line, print_table
from protocols.errors import UsageError
from protocols.local.durations import parse_seconds


def add_to(app: typer.Typer) -> None:
    app.command("analyze")(analyze)


def analyze(
    question: Annotated[
        str, typer.Argument(help='Such as "count, mean(age), quantile(income, 0.5) by sex".')
    ],
    where: Annotated[
        str, typer.Option(help="Which rows count: \"age >= 18 and city == 'Oslo'\".")
    ] = "",
    epsilon: Annotated[
        float, typer.Option(min=0.0, help="Add noise, with this privacy cost (0: no noise).")
    ] = 0.0,
    bounds: Annotated[
        list[str] | None,
        typer.Option(help="COLUMN=LEAST..MOST, for noise; values outside are clipped."),
    ] = None,
    deadline: Annotated[
        str, typer.Option(help="Continue then without peers that have not answered.")
    ] = "10m",
    json: Json = False,
) -> None:
    """Ask every peer about its own table. Rows stay there; each owner decides what leaves.

    Its jobs: commonweight analyze list, analyze show JOB, analyze stop JOB.
    """
    from coordinator.cli import analysis_table
    from coordinator.remote import analysis
    from protocols.analytics import parser

    limits = dict(map(_parse_bounds, bounds or []))
    parsed = parser.parse_query(question, where, epsilon=epsilon, bounds=limits)
    remote = connect()
    result = analysis.ask(remote, parsed, parse_seconds(deadline))
    if json:
        print_json({"answer": result, "label": result.label})
        return
    titles, rows = analysis_table.rows(result)
    if rows:
        print_table(titles, rows)
    else:
        print_line("no group is large enough to be shown")
    print_line(result.label)
    names = peer_names(remote)
    for peer, reason in result.left_out.items():
        print_line(f"{names.get(peer, peer)}: {reason}")


def _parse_bounds(text: str) -> tuple[str, tuple[float, float]]:
    """Parse `age=0..120`. Raises UsageError."""
    name, _, limits = text.partition("=")
    least, _, most = limits.partition("..")
    try:
        if name and float(least) < float(most):
            return name, (float(least), float(most))
    except ValueError:
        pass
    raise UsageError(f"{text!r} is no bound", "--bounds age=0..120")
