"""Tables of an analysis as CSV and as LaTeX. Pure."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from coordinator.jobs.methods.results import ResultTable, Value
from protocols.local.spreadsheets import escape_formula

_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
        "_": r"\_", "%": r"\%", "^": r"\textasciicircum{}", "~": r"\textasciitilde{}",
        "<": r"\textless{}", ">": r"\textgreater{}", "–": "--",
    }
)  # fmt: skip


def to_csv(tables: Sequence[ResultTable]) -> list[str]:
    """The lines of all tables with all digits, an empty line between two."""
    lines: list[str] = []
    for number, table in enumerate(tables):
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        for row in (table.columns, *table.rows):
            writer.writerow(map(escape_formula, row))
        lines += [""] * (number > 0) + out.getvalue().splitlines()
    return lines


def to_latex(tables: Sequence[ResultTable]) -> list[str]:
    """The lines of a `tabular` for each table, for the package booktabs."""
    lines: list[str] = []
    for number, table in enumerate(tables):
        lines += [""] * (number > 0) + [r"\begin{tabular}{l" + "r" * (len(table.columns) - 1) + "}"]
        heads = " & ".join(title.translate(_LATEX) for title in table.columns)
        lines += [r"\toprule", heads + r" \\", r"\midrule"]
        lines += [" & ".join(map(_cell, row)) + r" \\" for row in table.rows]
        lines += [r"\bottomrule", r"\end{tabular}"]
    return lines


def _cell(value: Value) -> str:
    if value is None:
        return "--"
    text = value if isinstance(value, str) else f"{value:.6g}" if value % 1 else f"{value:,.0f}"
    return text.translate(_LATEX)
