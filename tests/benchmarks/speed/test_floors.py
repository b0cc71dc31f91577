"""Rounds beside the physical limit: what the docs show of the results file."""

from __future__ import annotations

from benchmarks.speed import floors, report


def test_each_case_has_a_row_and_its_goal() -> None:
    rows = report.kept("floors")["rows"]
    assert [row["name"] for row in rows] == [case.name for case in floors.CASES]
    assert list(floors.GOALS) == [case.name for case in floors.CASES]


def test_a_ratio_is_a_range_where_the_limit_varied() -> None:
    assert floors.ratios({"round_s": 3.0, "limits_s": [2.0]}) == "1.50"
    assert floors.ratios({"round_s": 3.0, "limits_s": [1.5, 2.0]}) == "1.50 to 2.00"
