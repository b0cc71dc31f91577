"""Results of an analysis as text."""

from __future__ import annotations

import pytest

from coordinator.cli.analysis_table import format_figure, format_value, table_of
from coordinator.jobs.analysis import AnalysisResult, Group


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        (None, "–"),
        (1234567, "1,234,567"),
        (1234.5678, "1,234.57"),
        (float("nan"), "–"),
        ({"least": 0.0, "most": 9.0, "counts": [0, 4, 8], "below": 0, "above": 2},
         "0 ▁▅█ 9 (2 above)"),
        ({"least": 1.0, "most": 2.0, "counts": [], "about": True}, "1  2"),
        ({"least": 3, "most": 1200}, "3 to 1,200"),
    ],
)  # fmt: skip
def test_figures_as_text(figure: object, words: str) -> None:
    assert format_figure(figure) == words  # type: ignore[arg-type]


def test_a_table_names_groups_rows_and_figures() -> None:
    answer = AnalysisResult(
        figures=("mean(age)",),
        by=("city",),
        groups=(Group(("Oslo",), 12, (30.5,)), Group((None,), 5, (None,))),
        peers=2,
        asked=3,
        rows=17,
        left_out={"c": "no answer in time"},
    )
    table = table_of(answer)
    assert table.columns == ("city", "rows", "mean(age)")
    shown = [[format_value(value) for value in row] for row in table.rows]
    assert shown == [["Oslo", "12", "30.5"], ["–", "5", "–"]]
    assert answer.label == "2 of 3 peers, 17 rows"
