"""Results of parts add up; what the docs say of all faults together."""

from __future__ import annotations

import json
import re
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


PLAYED = json.loads((ROOT / "docs" / "faults" / "fault-results.json").read_bytes())["rows"]


def numbers(fault: str) -> set[int]:
    """The numbers of the list in the name of a row: 1–5, 10 or 7 one thing, 8 another."""
    found: set[int] = set()
    for first, last in re.findall(r"(?:^|, )(\d+)(?:–(\d+))?", fault):
        found |= set(range(int(first), int(last or first) + 1))
    return found


def test_all_faults_of_the_list_have_cases() -> None:
    listed = set(range(1, 38))
    real = [row for row in PLAYED if "simulated" not in row["fault"]]
    assert set().union(*(numbers(row["fault"]) for row in PLAYED if row["cases"])) == listed
    assert listed - set().union(*(numbers(row["fault"]) for row in real)) == {5, 36}


def test_no_case_in_the_docs_has_a_violation() -> None:
    assert [row["fault"] for row in PLAYED if row["violations"]] == []
