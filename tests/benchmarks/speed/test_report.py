"""What the benchmark measures and writes down, without measuring anything."""

from __future__ import annotations

import json

import pytest

from benchmarks.speed import cases, report
from benchmarks.speed.cases import MB
from benchmarks.speed.figures import Figures
from benchmarks.speed.floor import Floor
from tests.support.fleet_harness import ROOT

OURS = Figures(
    seconds=[0.4, 0.5],
    cpu_s_per_round={"coordinator": 0.1},
    peak_rss_bytes={"coordinator": 180 * MB},
    resting_rss_bytes={},
)


def test_a_row_has_the_nominal_size_beside_the_bytes_that_are_sent() -> None:
    case = next(case for case in cases.FULL if case.name == "40 MB × 2")
    row = report.row(case, OURS, None, Floor(0.1, 0.1, 0.1, 0.1), None)
    assert (row["nominal_bytes"], row["model_bytes"]) == (40_000_000, 39_999_488)


@pytest.mark.parametrize("agents", [2, 4, 8])
def test_stock_flower_is_measured_beside_each_40_mb_case_of_the_full_run(agents: int) -> None:
    case = next(case for case in cases.FULL if case.name == f"40 MB × {agents}")
    assert case.agents == agents
    assert case.stock_rounds > 0


def test_the_results_in_the_docs_tell_both_sizes() -> None:
    results = json.loads((ROOT / "docs" / "bench" / report.RESULTS).read_bytes())
    of_name = {case.name: case for case in cases.FULL}
    for row in results["cases"]:
        case = of_name[row["name"]]
        assert row["nominal_bytes"] == case.nominal_bytes
        assert row["model_bytes"] == case.model_bytes
