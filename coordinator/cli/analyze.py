"""`commonweight analyze "count, mean(age) by sex"`: statistics of the tables of all peers."""

from __future__ import annotations

from typing import Annotated

import msgspec
import typer

from coordinator.cli.common import (
    Json,
    connect,
    print_json,
    print_line,
    print_table,
    print_text,
)
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
    secure: Annotated[
        bool,
        typer.Option("--secure", help="Get the sums over all peers alone, and no single answer."),
    ] = False,
    deadline: Annotated[
        str, typer.Option(help="Continue then without peers that have not answered.")
    ] = "10m",
    csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print LaTeX tables.")] = False,
    json: Json = False,
) -> None:
    """Ask every peer about its own table. Rows stay there; each owner decides what leaves.

    Statistics such as "mean(age) by sex", or a method: ttest, anova, chi2, corr, pca, hist,
    table1, glm, km, cox, meta.

    Its jobs: commonweight analyze list, analyze show JOB, analyze stop JOB.
    """
    from coordinator.cli import analysis_formats, analysis_table
    from coordinator.jobs.methods.requests import parse_method
    from coordinator.remote import analysis
    from protocols.analytics import parser
    from protocols.privacy import question_layout

    limits = dict(map(_parse_bounds, bounds or []))
    if json + csv + latex > 1:
        raise UsageError("the output has one form", "give one of --json, --csv, --latex")
    method = parse_method(question, where)
    if method and (epsilon or limits):
        raise UsageError(f"{method.name} has no answer with noise", "leave --epsilon out")
    if method:
        remote = connect()
        result = analysis.ask_method(remote, method, parse_seconds(deadline), secure=secure)
        tables, notes, plot = result.tables, result.notes, result.plot
        label, left_out, answer = result.label, result.left_out, msgspec.to_builtins(result)
    else:
        parsed = parser.parse_query(question, where, epsilon=epsilon, bounds=limits)
        if secure:
            question_layout.check(parsed)
        remote = connect()
        found = analysis.ask(remote, parsed, parse_seconds(deadline), secure=secure)
        tables, notes, plot = (analysis_table.table_of(found),), (), ()
        label, left_out, answer = found.label, found.left_out, found
    if json:
        print_json({"answer": answer, "label": label})
        return
    if csv or latex:
        for line in (analysis_formats.to_csv if csv else analysis_formats.to_latex)(tables):
            print_text(line)
        return
    for table in tables:
        if table.title:
            print_line(f"\n{table.title}")
        if table.rows:
            cells = [[analysis_table.format_value(value) for value in row] for row in table.rows]
            print_table(table.columns, cells)
        else:
            print_line("no group is large enough to be shown")
    for line in (*plot, *notes, label):
        print_line(line)
    names = remote.peer_names()
    for peer, reason in left_out.items():
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
