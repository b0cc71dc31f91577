"""Questions that are asked to learn one person's row: each attack, with what it may learn at most.

The victim is one of 200 persons, the only one of 95. The attacker knows that, sees all answers, and
chooses all questions.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from agent.analytics.answer import answer_question
from agent.analytics.query_log import QueryLog
from agent.data.table_memory import TableMemory
from agent.home.settings_schema import AgentSettings
from protocols.analytics.mergeable_states import (
    ComomentsState,
    CountState,
    HistogramState,
    MomentsState,
    PeerAnswer,
    QuantileState,
)
from protocols.analytics.parser import parse_query
from protocols.analytics.query import Condition, Operation, Query

pytest.importorskip("pyarrow", reason="tables are read by the extra analyze")

ON = AgentSettings(analyze="on")
MIN_COUNT = ON.data_min_count
SECRET = 51_234.0
Row = dict[str, Any]


@pytest.fixture
def tmp_path(memory_path: Path) -> Path:
    """In memory, because a peer commits what each answer told."""
    return memory_path


def persons(count: int = 200, seed: int = 11) -> list[Row]:
    chance = np.random.default_rng(seed)
    rows: list[Row] = [
        {
            "number": number,
            "age": int(chance.integers(20, 80)),
            "salary": float(chance.integers(20_000, 90_000)),
            "smoker": int(chance.random() < 0.3),
            "town": str(chance.choice(["Oslo", "Bergen"])),
            "score": round(float(chance.normal()), 3),
        }
        for number in range(count - 1)
    ]
    return [*rows, rows[0] | {"number": count - 1, "age": 95, "salary": SECRET, "town": "Oslo"}]


class Victim:
    """An agent's table, as questions of a coordinator reach it."""

    def __init__(self, folder: Path, rows: list[Row], owner: AgentSettings = ON) -> None:
        folder.mkdir(exist_ok=True)
        self.file, self.owner = folder / "table.csv", owner
        self.open()
        self.write(rows)

    def open(self) -> None:
        folder = self.file.parent
        self.log, self.memory = QueryLog(folder / "analysis.db"), TableMemory(folder / "told.db")

    def restart(self) -> None:
        """A new process with the same home."""
        self.log.close()
        self.memory.close()
        self.open()

    def write(self, rows: list[Row]) -> None:
        with self.file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def ask(self, text: str, where: str = "", **more: Any) -> PeerAnswer:
        return self.send(parse_query(text, where, **more))

    def send(self, query: Query) -> PeerAnswer:
        owner = msgspec.structs.replace(self.owner, data=str(self.file))
        told = answer_question(query, owner, self.file.parent, self.log, self.memory)
        return msgspec.json.decode(told, type=PeerAnswer)


def total(told: PeerAnswer) -> float | None:
    """The sum over all cells, if there is one."""
    found = [s.moments for cell in told.cells for s in cell.states if isinstance(s, MomentsState)]
    return sum(m.count * m.mean for m in found) if found else None


def counts(told: PeerAnswer) -> list[int]:
    """Every number of rows that the answer tells."""
    found = [told.rows, *(cell.rows for cell in told.cells)]
    for state in (state for cell in told.cells for state in cell.states):
        match state:
            case CountState(count):
                found.append(count)
            case HistogramState(bins, below, above):
                found += [*bins, below, above]
            case MomentsState(moments):
                found.append(moments.count)
    return found


# --- sizes of hidden cells ------------------------------------------------------------------------


@pytest.mark.attack("20.2")
def test_the_salary_of_one_person_in_27_questions(tmp_path: Path) -> None:
    """Attack: search for the salary of the only person of 95 by the size of the hidden cell."""
    victim = Victim(tmp_path, persons())
    low, high, seen = 0.0, 2.0**27, set()
    for _ in range(27):
        middle = (low + high) / 2
        told = victim.ask("count", f"age == 95 and salary >= {middle}")
        seen.add(msgspec.json.encode(told))
        low, high = (middle, high) if middle <= SECRET else (low, middle)
    assert len(seen) == 1, "the answers differ with the salary"


@pytest.mark.attack("20.2")
@pytest.mark.parametrize("by", ["town, smoker", "age", "number", "salary", "town, age"])
def test_what_is_withheld_has_no_size(tmp_path: Path, by: str) -> None:
    """Attack: subtract the cells that are told from the rows of the table."""
    victim = Victim(tmp_path, persons())
    told = victim.ask(f"count by {by}")
    assert told.rows == sum(cell.rows for cell in told.cells)
    assert all(count == 0 or count >= MIN_COUNT for count in counts(told))
    # Nor does the total, asked for later: it would reveal what is hidden.
    everybody = victim.ask("count")
    hidden = sum(counts(everybody)[:1]) - told.rows
    assert everybody.refused or hidden == 0 or hidden >= MIN_COUNT


@pytest.mark.attack("20.2")
def test_a_refusal_has_no_size_either(tmp_path: Path) -> None:
    """Attack: read from a refusal how many rows two questions differ in, or whether they do."""
    rows = persons()
    there, not_there = Victim(tmp_path / "a", rows), Victim(tmp_path / "b", [*rows[:-1], rows[0]])
    for victim in (there, not_there):
        assert victim.ask("count").rows == 200
    answers = [
        victim.ask("count", f"age < {age}")
        for victim in (there, not_there)
        for age in (90, 95, 96, 1000)
    ]
    assert {msgspec.json.encode(told) for told in answers} == {msgspec.json.encode(answers[0])}


# --- differences ----------------------------------------------------------------------------------


@pytest.mark.attack("20.2")
@pytest.mark.parametrize("function", ["sum(salary)", "mean(salary)", "count, sum(salary)"])
@pytest.mark.parametrize(
    "conditions",
    [
        ("", "age < 95"),
        ("age < 95", ""),
        ("", "age != 95"),
        ("", "number < 199"),
        ("town == 'Oslo'", "town == 'Oslo' and age < 90"),
        ("age <= 40", "age < 40"),
        # Three sets of which no two are alike: the two parts less everybody.
        ("", "number <= 100", "number >= 100"),
        ("number <= 100", "number >= 100", ""),
        ("number < 150", "number >= 50", "number >= 50 and number < 149", "number < 200"),
        # Four sets: the tracker of Denning and others (1979).
        ("smoker == 1", "smoker == 0", "number < 100", "number >= 99"),
        ("town == 'Oslo'", "town == 'Bergen'", "salary <= 50000", f"salary >= {SECRET}"),
    ],
)  # fmt: skip
def test_sums_of_questions_isolate_nobody(
    tmp_path: Path, function: str, conditions: tuple[str, ...]
) -> None:
    """Attack: add and subtract what several questions tell until one person is left."""
    rows = persons()
    victim = Victim(tmp_path, rows)
    _assert_nobody_alone(victim, rows, function, conditions)


def _assert_nobody_alone(
    victim: Victim, rows: list[Row], function: str, conditions: tuple[str, ...]
) -> None:
    """No combination of the sums isolates a few: tried with all small whole coefficients."""
    exact = np.array([row["salary"] for row in rows])
    told = [victim.ask(function, where) for where in conditions]
    sums = [value for one in told if (value := total(one)) is not None]
    if "mean" in function:
        sums = [value for one in told for value in [total(one)] if value is not None]
    few = {round(x) for x in exact}
    for coefficients in np.ndindex(*[3] * len(sums)):
        found = sum((c - 1) * s for c, s in zip(coefficients, sums, strict=True))
        assert round(abs(found)) not in few, f"{conditions} tell one salary: {coefficients}"


@pytest.mark.attack("20.2")
def test_a_random_stream_of_questions_isolates_nobody(tmp_path: Path) -> None:
    """Attack: 60 random questions; solve for each person by least squares over what was told."""
    rows = persons()
    victim = Victim(tmp_path, rows)
    chance = np.random.default_rng(5)
    sets, sums = [], []
    numbers = np.arange(200)
    for _ in range(60):
        low, high = sorted(chance.integers(0, 200, 2).tolist())
        told = victim.ask("sum(number), sum(salary)", f"number >= {low} and number <= {high}")
        if told.cells and not told.refused:
            member = (numbers >= low) & (numbers <= high)
            first = told.cells[0].states[0]
            assert isinstance(first, MomentsState)
            if not told.similar:
                assert first.moments.count == member.sum()
                sets.append(member)
                sums.append(total(told))
        if len(sets) % 5 == 0:
            victim.restart()
    matrix = np.array(sets, float)
    assert len(matrix) > 3
    projector = np.linalg.pinv(matrix) @ matrix
    assert np.diag(projector).max() < 0.999, "one person's salary is determined"


@pytest.mark.attack("20.2")
@pytest.mark.parametrize("by", ["", " by town", " by smoker"])
def test_one_more_row_is_not_told_by_the_difference(tmp_path: Path, by: str) -> None:
    """Attack: ask before and after one person came (104 and then 105 rows)."""
    rows = persons(105)
    victim = Victim(tmp_path, rows[:104])
    before = victim.ask(f"count, sum(salary){by}")
    assert before.rows == 104
    for order in (rows, rows[::-1], [*rows[50:], *rows[:50]]):
        victim.write(order)
        victim.restart()
        after = victim.ask(f"count, sum(salary){by}")
        assert not after.refused
        assert total(after) == pytest.approx(total(before))
        assert after.rows == 104, "the new person waits for others"


@pytest.mark.attack("20.2")
def test_one_row_less_is_not_told_by_the_difference(tmp_path: Path) -> None:
    """Attack: ask before and after one person left, or was changed."""
    rows = persons(105)
    for number, after in enumerate((rows[:-1], [*rows[:-1], rows[-1] | {"score": 9.0}])):
        victim = Victim(tmp_path / str(number), rows)
        assert not victim.ask("sum(salary)").refused
        victim.write(after)
        told = victim.ask("sum(salary)")
        assert told.refused
        assert not told.cells
    # New rows are told once there are enough of them.
    victim = Victim(tmp_path / "more", persons(104))
    assert victim.ask("count").rows == 104
    victim.write([*persons(104), *persons(110)[-MIN_COUNT:]])
    assert victim.ask("count").rows == 104 + MIN_COUNT


# --- noise ----------------------------------------------------------------------------------------


@pytest.mark.attack("20.2")
@pytest.mark.parametrize("epsilon", [0.1, 1.0, 100.0])
def test_the_one_who_asks_cannot_choose_noise_instead_of_the_rules(
    tmp_path: Path, epsilon: float
) -> None:
    """Attack: ask with ε = 100 of one's own, so that nearly exact figures skip the rules."""
    bounds = {"salary": (0.0, 1e5)}
    where = "age == 95"
    victim = Victim(tmp_path / "a", persons())
    told = victim.ask("count, sum(salary)", where, epsilon=epsilon, bounds=bounds)
    assert "analyze_epsilon" in told.refused
    # With a budget of the owner, noise comes on top: too small a cell stays hidden.
    owner = AgentSettings(analyze="on", analyze_epsilon=1000.0)
    victim = Victim(tmp_path / "b", persons(), owner)
    told = victim.ask("count, sum(salary)", where, epsilon=epsilon, bounds=bounds)
    assert not told.cells
    assert bool(told.refused) == (epsilon > owner.analyze_epsilon_per_question)
    # So does the difference.
    everybody = victim.ask("sum(salary)", epsilon=0.5, bounds=bounds)
    assert not everybody.refused
    others = victim.ask("sum(salary)", "age < 95", epsilon=0.5, bounds=bounds)
    assert not others.refused
    assert len(victim.memory.sets.rows_of("cell")) == 1, "both are told of the same rows"


@pytest.mark.attack("20.2")
def test_clipping_without_noise_is_refused(tmp_path: Path) -> None:
    """Attack: move the bounds of a clipped mean past one value after the other."""
    victim = Victim(tmp_path, persons())
    query = Query(operations=(Operation("mean", ("salary",)),), bounds={"salary": (0.0, 50_000.0)})
    assert "bounds" in victim.send(query).refused


# --- figures of a few rows in a large cell --------------------------------------------------------


@pytest.mark.attack("20.2")
@pytest.mark.parametrize(
    "text",
    [
        "histogram(salary, 1000, 20000, 90000)",
        f"histogram(salary, 3, {SECRET - 1}, {SECRET + 2})",
        "histogram(age, 100, 0, 100)",
        "histogram(age, 2, 0, 94)",
        "histogram(number, 200, 0, 200) by town",
        "missing(score)",
        "missing(score) by town",
        "mean(score), sum(score) by smoker",
        "sum(rare), mean(rare)",
        "var(rare) by town",
        "std(rare), missing(rare)",
    ],
)
def test_no_figure_counts_a_few(tmp_path: Path, text: str) -> None:
    """Attack: bins with one row, missing values, and sums of a yes-or-no column as counts."""
    rows = [row | {"rare": int(row["number"] in (3, 77))} for row in persons()]
    for number in (5, 199):
        rows[number]["score"] = ""
    told = Victim(tmp_path, rows).ask(text)
    assert not told.refused
    for count in counts(told):
        assert count == 0 or count >= MIN_COUNT
        assert count == 200 or 200 - count >= MIN_COUNT
    sums = [s for c in told.cells for s in c.states if isinstance(s, MomentsState)]
    assert "rare" not in text or not sums


@pytest.mark.attack("20.2")
@pytest.mark.parametrize(
    "text",
    ["quantile(salary, 0)", "quantile(salary, 1)", "quantile(salary, 0.999)",
     "histogram(salary, 10)", "quantile(salary, 0.5) by town", "quantile(age, 1)"],
)  # fmt: skip
def test_quantiles_tell_no_single_value(tmp_path: Path, text: str) -> None:
    """Attack: read the least, the most, or every value from the bins of a quantile sketch."""
    rows = persons()
    rows[7]["salary"] = 9_999_999.0
    told = Victim(tmp_path / "a", rows).ask(text)
    # The sketch is the same for any other value of the richest.
    rows[7]["salary"] = 1_111_111.0
    other = Victim(tmp_path / "b", rows).ask(text)
    assert told.cells
    assert told.cells == other.cells
    for state in (state for cell in told.cells for state in cell.states):
        assert isinstance(state, QuantileState)
        # Far more bins than buckets: the rows of a bucket are spread over it.
        assert max([*state.positive]) < np.log(200_000) / np.log(1.01)


@pytest.mark.attack("20.2")
def test_distinct_values_cannot_be_tested_one_by_one(tmp_path: Path) -> None:
    """Attack: hash a dictionary of names and look which of them are in the sketch."""
    name = "Astrid"
    answers = []
    for number, known in enumerate((name, "Bjørn")):
        rows = [row | {"name": f"n{row['number']}"} for row in persons()]
        rows[9]["name"] = known
        answers.append(Victim(tmp_path / str(number), rows).ask("distinct(name)"))
    assert answers[0] == answers[1]
    assert b"registers" not in msgspec.json.encode(answers[0])
    # One ill person among 40 does not show in the number of different values.
    rows = [row | {"ill": "no"} for row in persons(40)]
    healthy = Victim(tmp_path / "h", rows).ask("distinct(ill)")
    rows[4]["ill"] = "yes"
    assert Victim(tmp_path / "i", rows).ask("distinct(ill)") == healthy


@pytest.mark.attack("20.2")
def test_one_value_that_dominates_a_sum_is_not_told(tmp_path: Path) -> None:
    """Attack: ask for the sum of a column in which one value is larger than all others together."""
    rows = persons()
    rows[3]["salary"] = 1e9
    told = Victim(tmp_path, rows).ask("sum(salary), mean(salary), var(salary)")
    assert not [s for cell in told.cells for s in cell.states if isinstance(s, MomentsState)]


@pytest.mark.attack("20.2")
def test_covariances_with_known_columns_do_not_solve_for_values(tmp_path: Path) -> None:
    """Attack: solve for the values of a small cell by covariances with known columns."""
    rows = [row | {f"k{n}": int(row["number"]) ** n % 97 for n in range(1, 6)} for row in persons()]
    told = Victim(tmp_path, rows).ask(
        "sum(salary), " + ", ".join(f"cov(k{n}, salary)" for n in range(1, 6)), "number < 6"
    )
    assert [type(state).__name__ for state in told.cells[0].states[1:]] == ["WithheldState"] * 5


@pytest.mark.attack("20.2")
def test_two_nested_cells_do_not_solve_for_the_rows_between(tmp_path: Path) -> None:
    """Attack: covariances with known columns over two cells that differ in five rows: five
    equations for the five salaries."""
    names = [f"k{n}" for n in range(1, 6)]
    rows = [
        row | {name: int(row["number"]) ** (n + 1) % 97 for n, name in enumerate(names)}
        for row in persons()
    ]
    victim = Victim(tmp_path, rows)
    text = "sum(salary), " + ", ".join(f"cov({name}, salary)" for name in names)
    equations = []
    for where in ("", "number < 195", "number >= 5", "number >= 195"):
        told = victim.ask(text, where)
        found = [state for cell in told.cells for state in cell.states]
        equations.append(sum(isinstance(state, ComomentsState) for state in found))
        assert not told.refused, "sums are told all the same"
    assert equations == [5, 0, 0, 0]


# --- the owner's word -----------------------------------------------------------------------------


@pytest.mark.attack("20.2")
def test_the_owner_approves_all_of_the_question(tmp_path: Path) -> None:
    """Attack: have `mean(salary)` approved, and mean bounds, digits or values that it hides."""
    base = parse_query("count", "salary >= 51234.125")
    near = [
        parse_query("count", "salary >= 51234.1250001"),
        parse_query("count", "salary >= 51234"),
        parse_query("count", "salary >= 51234.125 and age in (95,)"),
        parse_query("count", 'salary >= 51234.125 and town == "95"'),
        parse_query("count", "salary >= 51234.125", epsilon=0.5),
    ]
    assert len({str(query) for query in (base, *near)}) == len({q.digest for q in (base, *near)})
    hidden = (
        Query(operations=(Operation("count", args=(5.0,)),)),
        Query(
            operations=(Operation("mean", ("age",)),),
            where=(Condition("age", "==", (95.0, 94.0)),),
        ),
        Query(operations=(Operation("mean", ("age", "salary")),)),
        Query(operations=(Operation("mean"),)),
        Query(operations=(Operation("quantile", ("age",), (7.0,)),)),
    )
    for number, query in enumerate(hidden):
        victim = Victim(tmp_path / str(number), persons())
        assert "text" in victim.send(query).refused
        assert not victim.log.approval_requests()


@pytest.mark.attack("20.2")
def test_an_approval_is_for_one_question(tmp_path: Path) -> None:
    """Attack: make a second question whose digest starts like one that the owner will allow."""
    victim = Victim(tmp_path, persons(), AgentSettings(analyze="ask"))
    starts: dict[str, Query] = {}
    for number in range(1000):
        query = parse_query("count", f"age < {number}")
        other = starts.setdefault(query.digest[:4], query)
        if other is not query:
            break
    assert "must allow this question first" in victim.send(query).refused
    assert victim.log.decide(query.digest[:4], allowed=True)
    assert not victim.send(query).refused
    assert "must allow this question first" in victim.send(other).refused
    assert not victim.log.decide(query.digest[:4], allowed=True), "two questions start so"


@pytest.mark.attack("20.2")
@pytest.mark.parametrize(
    "tighter",
    [
        {"analyze": "off"},
        {"data_columns": ("age",)},
        {"analyze_operations": ("count",)},
        {"data_min_count": 201},
        {"data_extremes": False},
    ],
)
def test_an_earlier_answer_is_not_told_again_after_the_owner_has_changed_a_limit(
    tmp_path: Path, tighter: dict[str, Any]
) -> None:
    """Attack: repeat a question that the owner does not allow any more."""
    owner = AgentSettings(analyze="on", data_extremes=True)
    victim = Victim(tmp_path, persons(), owner)
    assert victim.ask("max(salary)").cells
    victim.owner = msgspec.structs.replace(owner, **tighter)
    assert not victim.ask("max(salary)").cells
