"""Thresholds that are moved until an answer changes, which is where a person's value is."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from agent.home.settings_schema import AgentSettings
from protocols.analytics.mergeable_states import CountState, HistogramState, MomentsState
from tests.hostile.test_analyze import SECRET, Row, Victim, counts, persons, total

pytest.importorskip("pyarrow", reason="tables are read by the extra analyze")
pytestmark = pytest.mark.attack("20.2")


@pytest.fixture
def tmp_path(memory_path: Path) -> Path:
    """In memory, because a peer commits what each answer told."""
    return memory_path


def halve(is_above: Callable[[float], bool], low: float = 0.0, high: float = 1e5) -> float:
    """Where the answer changes, to a whole number."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_above(middle) else (middle, high)
    return high


GROUPS = [
    "number in (199, 31, 32, 33, 34)",
    "number in (199, 61, 62, 63, 64, 65, 66, 67, 68, 69)",
    "number >= 195",
    "number >= 190",
    "number >= 185 and age >= 30",
    "town == 'Oslo' and number >= 180",
]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("form", ["less", "more", "equal", "bins", "quantile"])
def test_halving_does_not_find_a_value(tmp_path: Path, group: str, form: str) -> None:
    """Attack: `salary < x` for a few named persons is answered from the k-th of their salaries on.
    Halve x until it is found; two groups that share one person show whose it is."""
    rows = persons()
    victim = Victim(tmp_path, rows)

    def is_above(x: float) -> bool:
        if form == "bins":
            told = victim.ask(f"histogram(salary, 1, 0, {x})", group)
            states = [state for cell in told.cells for state in cell.states]
            return any(isinstance(s, HistogramState) and s.counts[0] > 0 for s in states)
        if form == "equal":
            return bool(victim.ask("count", f"{group} and salary < {x} and salary != {x}").rows)
        comparison = "<" if form in ("less", "quantile") else ">="
        return bool(victim.ask("count", f"{group} and salary {comparison} {x}").rows) == (
            comparison == "<"
        )

    found = halve(is_above)
    exact = {row["salary"] for row in rows}
    assert not exact & {found - 1, found, found + 1}, f"a salary by halving: {found}"


def test_names_pick_no_persons(tmp_path: Path) -> None:
    """Attack: ask about five persons by their names, one of whom is of interest."""
    rows = [row | {"name": f"n{row['number']}"} for row in persons()]
    victim = Victim(tmp_path, rows)
    names = ", ".join(f"'n{number}'" for number in (199, 1, 2, 3, 4))
    for where in (f"name in ({names})", "number in (199, 1, 2, 3, 4)", "number == 199"):
        assert not victim.ask("count, sum(salary)", where).cells
    # All but one is everybody.
    for where in ("name != 'n199'", "number != 199", "age != 95"):
        assert victim.ask("count, sum(salary)", where).rows == len(rows)


@pytest.mark.parametrize("by", [False, True])
def test_a_few_are_not_told_to_be_all_alike(tmp_path: Path, by: bool) -> None:
    """Attack: an answer about nine persons comes only if all of them smoke."""
    answers = []
    for number, smoker in enumerate((1, 0)):
        rows = [row | {"ward": "a" if row["number"] >= 191 else "b"} for row in persons()]
        for row in rows[191:]:
            row["smoker"] = 1
        rows[199]["smoker"] = smoker
        victim = Victim(tmp_path / str(number), rows)
        where = "ward == 'a'"
        told = [
            victim.ask("count by smoker", where)
            if by
            else victim.ask("count", f"{where} and smoker == 1"),
            victim.ask("count by ward, smoker"),
            victim.ask("distinct(smoker), histogram(smoker, 2, 0, 2)", where),
        ]
        answers.append([{cell.group: cell.states for cell in one.cells} for one in told])
        answers[-1][1] = {g: s for g, s in answers[-1][1].items() if g[0] == "a"}
    assert answers[0] == answers[1]


def test_a_refusal_does_not_depend_on_one_row(tmp_path: Path) -> None:
    """Attack: two sets share one person alone, so a third that differs by this person is refused,
    and one that does not is answered. The person's salary decides."""
    answers = []
    for number, salary in enumerate((40_000.0, 80_000.0)):
        rows = [row | {"ward": "a" if 100 <= row["number"] < 150 else "b"} for row in persons()]
        rows[199] |= {"ward": "a", "salary": salary}
        victim = Victim(tmp_path / str(number), rows)
        assert victim.ask("count", "ward == 'a'").rows == 51
        assert victim.ask("count", "number >= 150").rows == 50
        before = victim.ask("count", "ward == 'a' and number < 150 and salary < 60000")
        after = victim.ask("count", "ward == 'a' and salary < 60000")
        answers.append((before.rows, before.refused, after.rows, after.refused, after.similar))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("text", ["sum(fine)", "mean(fine) by town", "cov(fine, salary)"])
@pytest.mark.parametrize("fined", [1, 2, 4])
def test_a_sum_to_which_a_few_add(tmp_path: Path, text: str, fined: int) -> None:
    """Attack: ask for the sum of a column in which all but a few have 0: it is theirs alone."""
    rows = [row | {"fine": 0} for row in persons()]
    for number in range(fined):
        rows[199 - number]["fine"] = 100 * (number + 1)
    told = Victim(tmp_path, rows).ask(text)
    assert not [
        s for cell in told.cells for s in cell.states if not type(s).__name__.startswith("With")
    ]


def test_no_missing_value_is_told_like_a_few(tmp_path: Path) -> None:
    """Attack: read from the count of a mean that somebody of the group has no value."""
    answers: list[list[Any]] = []
    for number, lacks in enumerate((None, 199)):
        rows = [dict(row) for row in persons()]
        for row in rows:
            row["died"] = "" if row["number"] < 40 or row["number"] == lacks else row["number"]
        victim = Victim(tmp_path / str(number), rows)
        told = victim.ask("missing(died), mean(died)", "number >= 150")
        answers.append([
            state.count if isinstance(state, CountState) else state.moments.count
            for cell in told.cells
            for state in cell.states
            if isinstance(state, CountState | MomentsState)
        ])  # fmt: skip
    assert answers[0] == answers[1]


@pytest.mark.long
def test_thresholds_come_to_an_end(tmp_path: Path) -> None:
    """Attack: move a threshold by one again and again, over all values of a column."""
    victim = Victim(tmp_path, persons())
    last = [victim.ask("count", f"salary >= {20_000 + x}") for x in range(600)][-1]
    assert "different numbers" in last.refused
    assert not victim.ask("count", "salary >= 20000").refused
    victim.restart()
    assert "different numbers" in victim.ask("count", "salary >= 20599").refused
    told = victim.ask("histogram(salary, 1000, 20000, 90000)")
    assert all(count in (0, 200) for count in counts(told))


def test_noise_as_large_as_the_bounds_demand(tmp_path: Path) -> None:
    """Attack: bounds so wide that the noise that they need is more than is drawn."""
    pytest.importorskip("opendp", reason="noise is drawn by the extra analyze")
    owner = AgentSettings(analyze="on", analyze_epsilon=10.0)
    rows = [row | {"key": 1e20 + row["salary"] * 1e15} for row in persons()]
    exact = sum(row["key"] for row in rows)
    for bounds, text in (((0.0, 1e21), "sum(key)"), ((0.0, 1e21), "mean(key)")):
        told = Victim(tmp_path / text, rows, owner).ask(text, epsilon=0.1, bounds={"key": bounds})
        found = total(told)
        assert found is None or not math.isclose(found, exact, rel_tol=1e-4)
    victim = Victim(tmp_path / "tiny", rows, owner)
    assert not victim.ask("count", epsilon=1e-300).cells


def test_an_honest_threshold_is_exact(tmp_path: Path) -> None:
    """Control: the rule binds only near a threshold that was used before."""
    rows: list[Row] = persons()
    victim = Victim(tmp_path, rows)
    for where, kept in (
        ("age >= 30", [r for r in rows if r["age"] >= 30]),
        (
            "age >= 50 and town == 'Oslo'",
            [r for r in rows if r["age"] >= 50 and r["town"] == "Oslo"],
        ),
        ("smoker == 1", [r for r in rows if r["smoker"]]),
    ):
        told = victim.ask("count", where)
        assert (told.rows, told.similar) == (len(kept), False)
    assert SECRET in {row["salary"] for row in rows}
