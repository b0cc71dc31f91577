"""Results of parts add up, and the page of docs says what the results file says."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.faults import results
from benchmarks.faults.results import Row
from tests.support.fleet_harness import ROOT


def played(seed: int, found: list[str], took: float) -> Row:
    row = Row("1 a fault", "back within s", figure="0 lost; {worst:.1f} s")
    row.add("a case", seed, found, took)
    return row


def test_parts_of_a_row_add_up(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    results.write(path, [played(1, [], 2.0), Row("2 another", "")], {"3": "no reason"})
    results.write(path, [played(2, ["lost"], 3.25)], {}, add=True)
    one, other = json.loads(path.read_text())["rows"]
    assert (one["cases"], one["violations"], one["seed"]) == (2, 1, "1 2")
    assert one["figure"] == "0 lost; 3.2 s"
    assert other["fault"] == "2 another"
    results.write(path, [played(1, [], 1.0)], {})
    assert json.loads(path.read_text())["rows"][0]["cases"] == 1


def test_the_page_is_made_from_the_results(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text := (ROOT / "docs" / "reliability.md").read_text())
    results.tell(page, ROOT / "docs" / "faults" / "fault-results.json")
    assert page.read_text() == text
