"""Answers from tables: equal to sums over all rows, and nothing that isolates a person."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import agent.data
from agent.analytics import job_handler
from agent.analytics.answer import answer_question
from agent.analytics.query_log import QueryLog
from agent.data.disclosed_sets import MAX_SETS, ToldSet
from agent.data.table_memory import TableMemory
from agent.home.settings import change
from agent.home.settings_schema import AgentSettings
from coordinator.jobs.analysis import AnalysisResult, combine, validate
from protocols.analytics.mergeable_states import PeerAnswer
from protocols.analytics.parser import parse_query
from protocols.analytics.query import Query
from protocols.errors import BadMessage, MissingPackage
from protocols.messages.refusals import refusal_of

pytest.importorskip("pyarrow", reason="tables are read by the extra analyze")

ALL = AgentSettings(analyze="on", data_extremes=True)
Row = dict[str, Any]


def people(count: int = 200, seed: int = 3) -> list[Row]:
    chance = np.random.default_rng(seed)
    return [
        {
            "age": int(chance.integers(0, 90)),
            "income": round(float(chance.lognormal(10, 1)), 2),
            "sex": str(chance.choice(["f", "m"])),
            "city": str(chance.choice(["Oslo", "Bergen", "Røros"], p=[0.5, 0.4, 0.1])),
            "score": "" if chance.random() < 0.1 else round(float(chance.normal()), 6),
        }
        for _ in range(count)
    ]


class Peer:
    """A table on a disk, with what its owner allows."""

    def __init__(self, folder: Path, rows: Sequence[Row], allowed: AgentSettings = ALL) -> None:
        folder.mkdir(exist_ok=True)
        self.file = folder / "table.csv"
        with self.file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        self.allowed = allowed
        self.memory = QueryLog(folder / "analysis.db")
        self.told_rows = TableMemory(folder / "told.db")

    def ask(self, text: str, where: str = "", **more: Any) -> PeerAnswer:
        return self.told(parse_query(text, where, **more))

    def told(self, asked: Query) -> PeerAnswer:
        chosen = msgspec.structs.replace(self.allowed, data=str(self.file))
        told = answer_question(asked, chosen, self.file.parent, self.memory, self.told_rows)
        return msgspec.json.decode(told, type=PeerAnswer)


def together(peers: Sequence[Peer], text: str, where: str = "", **more: Any) -> AnalysisResult:
    asked = parse_query(text, where, **more)
    told = {f"p{number}": peer.told(asked) for number, peer in enumerate(peers)}
    assert [validate(asked, given) for given in told.values()] == [""] * len(told)
    return combine(asked, told, list(told))


def split(rows: list[Row], folder: Path) -> list[Peer]:
    """Three peers of different sizes."""
    parts = [rows[: len(rows) // 5], rows[len(rows) // 5 : len(rows) // 2], rows[len(rows) // 2 :]]
    return [Peer(folder / f"p{number}", part) for number, part in enumerate(parts)]


def test_exact_statistics_are_those_of_all_rows(tmp_path: Path) -> None:
    rows = people(1000)
    found = together(
        split(rows, tmp_path),
        "count, missing(score), sum(income), mean(score), var(score), std(age), min(age), "
        "max(age), cov(age, income), corr(age, income), histogram(age, 9, 0, 90)",
    )
    age = np.array([row["age"] for row in rows], float)
    income = np.array([row["income"] for row in rows])
    score = np.array([row["score"] for row in rows if row["score"] != ""])
    expected = [
        1000, 1000 - len(score), income.sum(), score.mean(), score.var(ddof=1), age.std(ddof=1),
        age.min(), age.max(), np.cov(age, income)[0, 1], np.corrcoef(age, income)[0, 1],
    ]  # fmt: skip
    (group,) = found.groups
    np.testing.assert_allclose(group.figures[:-1], expected, rtol=1e-9)  # type: ignore[arg-type]
    bins = group.figures[-1]
    assert isinstance(bins, dict)
    assert bins["counts"] == np.histogram(age, 9, (0, 90))[0].tolist()
    assert found.label == "3 of 3 peers, 1,000 rows"


def test_sketches_are_within_their_bounds(tmp_path: Path) -> None:
    rows = people(4000)
    found = together(
        split(rows, tmp_path), "quantile(income, 0.5), quantile(income, 0.9), distinct(city)"
    )
    income = np.sort([row["income"] for row in rows])
    half, most, cities = found.groups[0].figures
    for q, got in ((0.5, half), (0.9, most)):
        assert isinstance(got, float)
        assert abs(np.searchsorted(income, got) / len(income) - q) < 0.02
    assert cities == {"least": 3, "most": 9}


def test_groups_and_conditions(tmp_path: Path) -> None:
    rows = people(400)
    found = together(
        split(rows, tmp_path), "count, mean(age) by sex", "age >= 18 and city != 'Røros'"
    )
    for group in found.groups:
        mine = [
            row["age"]
            for row in rows
            if row["sex"] == group.group[0] and row["age"] >= 18 and row["city"] != "Røros"
        ]
        assert group.figures[0] == len(mine)
        assert group.figures[1] == pytest.approx(np.mean(mine), rel=1e-12)
    assert {group.group for group in found.groups} == {("f",), ("m",)}


@settings(max_examples=8)
@given(st.integers(1, 4), st.integers(0, 1000))
def test_any_split_gives_the_same(
    tmp_path_factory: pytest.TempPathFactory, parts: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("split")
    rows = people(60, seed)
    cuts = np.array_split(np.arange(60), parts)
    peers = [Peer(folder / f"p{n}", [rows[i] for i in cut]) for n, cut in enumerate(cuts)]
    text = "count, mean(income), var(age)"
    whole = together([Peer(folder / "all", rows)], text).groups[0].figures
    np.testing.assert_allclose(  # type: ignore[call-overload]
        together(peers, text).groups[0].figures, whole, rtol=1e-9
    )


# --- the guard -------------------------------------------------------------------------------


def test_a_group_of_one_is_kept_back_and_hides_behind_another(tmp_path: Path) -> None:
    rows = [{"city": "Oslo", "pay": 1}] * 30 + [{"city": "Bergen", "pay": 2}] * 12
    peer = Peer(tmp_path, [*rows, {"city": "Røros", "pay": 999}])
    told = peer.ask("count, sum(pay) by city")
    assert [cell.group for cell in told.cells] == [("Oslo",)]
    assert told.rows == 30, "the total would tell the one"


def test_the_total_does_not_tell_what_groups_kept_back(tmp_path: Path) -> None:
    rows = [{"city": "Oslo", "pay": 1}] * 30 + [{"city": "Røros", "pay": 999}]
    total_first = Peer(tmp_path / "a", rows)
    assert not total_first.ask("sum(pay)").refused
    told = total_first.ask("count by city", "city == 'Oslo'")
    assert (told.rows, told.similar) == (31, True), "told for the rows of the first question"
    groups_first = Peer(tmp_path / "b", rows)
    assert not groups_first.ask("sum(pay)", "city == 'Oslo'").refused
    told = groups_first.ask("sum(pay)")
    assert (told.rows, told.similar) == (30, True)


def test_the_difference_of_two_questions_isolates_nobody(tmp_path: Path) -> None:
    rows = people(200)
    rows[0]["age"] = 95
    peer = Peer(tmp_path, rows)
    oldest = sorted(row["age"] for row in rows)
    everybody = peer.ask("mean(income)")
    for asked in (peer, Peer(tmp_path, rows)):  # the disk remembers over a restart
        assert asked.ask("mean(income)", f"age < {oldest[-1]}").cells == everybody.cells
    fewer = peer.ask("mean(income)", f"age < {oldest[-40]}")
    assert 100 < fewer.rows <= 160
    assert not fewer.similar


def test_least_and_most_are_not_told_unless_the_owner_says_so(tmp_path: Path) -> None:
    peer = Peer(tmp_path, people(), AgentSettings(analyze="on"))
    assert "single row" in peer.ask("max(income)").refused
    # Nor by narrowing conditions down to the one.
    top = max(row["income"] for row in people())
    assert peer.ask("count", f"income >= {top}").cells == ()


@pytest.mark.parametrize(
    ("allowed", "text", "words"),
    [
        (AgentSettings(), "count", "allows no questions"),
        (AgentSettings(analyze="on", data_columns=("age",)), "mean(income)", "column 'income'"),
        (AgentSettings(analyze="on", data_columns=("age",)), "count by city", "column 'city'"),
        (
            AgentSettings(analyze="on", analyze_operations=("count",)),
            "mean(age)",
            "does not let mean",
        ),
        (ALL, "mean(ages)", "has no column 'ages'"),
        (ALL, "mean(city)", "holds text"),
        (AgentSettings(analyze="on", analyze_epsilon=1.0), "count", "with noise only"),
    ],
)
def test_what_is_refused_says_why(
    tmp_path: Path, allowed: AgentSettings, text: str, words: str
) -> None:
    assert words in Peer(tmp_path, people(), allowed).ask(text).refused


def test_an_owner_who_is_asked_first(tmp_path: Path) -> None:
    peer = Peer(tmp_path, people(), AgentSettings(analyze="ask"))
    assert "must allow this question first" in peer.ask("count").refused
    ((digest, words, decided),) = peer.memory.approval_requests()
    assert (words, decided) == ("count", None)
    assert peer.memory.decide(digest[:8], allowed=True)
    assert peer.ask("count").cells[0].rows == 200
    assert "must allow this question first" in peer.ask("mean(age)").refused


def test_nobody_collects_sets_of_rows_without_end(tmp_path: Path) -> None:
    rows = [{"n": number, "m": 1} for number in range(3000)]
    peer = Peer(tmp_path, rows)
    for n in range(MAX_SETS["cell"]):
        peer.told_rows.sets.tell([ToldSet("cell", np.arange(5 * n, 5 * n + 5))], 5)
    assert "and its limit is" in peer.ask("count", "n >= 2800").refused


# --- noise -----------------------------------------------------------------------------------


def test_noise_has_a_budget_that_outlives_a_restart(tmp_path: Path) -> None:
    allowed = AgentSettings(analyze="on", analyze_epsilon=1.0)
    peer = Peer(tmp_path, people(), allowed)
    assert not peer.ask("count", epsilon=0.6).refused
    assert "budget is spent" in peer.ask("count", "age > 10", epsilon=0.6).refused
    again = Peer(tmp_path, people(), allowed)
    again.file.write_text(peer.file.read_text())
    assert again.memory.spent_epsilon == pytest.approx(0.6)
    assert "budget is spent" in again.ask("count", "age > 11", epsilon=0.6).refused
    assert not again.ask("count", "age > 11", epsilon=0.4).refused


def test_the_same_question_a_thousand_times_is_one_answer(tmp_path: Path) -> None:
    peer = Peer(tmp_path, people(), AgentSettings(analyze="on", analyze_epsilon=1.0))
    told = {msgspec.json.encode(peer.ask("count, sum(age)", epsilon=0.5, bounds={"age": (0, 90)}))
            for _ in range(50)}  # fmt: skip
    assert len(told) == 1
    assert peer.memory.spent_epsilon == 0.5


@pytest.mark.long
def test_a_thousand_questions_that_mean_the_same_share_one_budget(tmp_path: Path) -> None:
    """Each is noised anew; what all of them together tell is bounded by the budget."""
    peer = Peer(tmp_path, people(), AgentSettings(analyze="on", analyze_epsilon=1.0))
    told = [peer.ask("count", f"age > -{number}", epsilon=0.01) for number in range(1, 1001)]
    answered = [one for one in told if not one.refused]
    assert len(answered) == 100
    assert all("budget is spent" in one.refused for one in told[100:])
    assert peer.memory.spent_epsilon == pytest.approx(1.0)


def test_noisy_figures_are_near_and_never_exact_by_rule(tmp_path: Path) -> None:
    rows = people(2000)
    peer = Peer(
        tmp_path,
        rows,
        AgentSettings(analyze="on", analyze_epsilon=1000.0, analyze_epsilon_per_question=0.5),
    )
    bounds = {"age": (0.0, 90.0)}
    errors = []
    for number in range(6):
        told = peer.ask("count, mean(age)", f"age >= -{number}", epsilon=0.5, bounds=bounds)
        count, mean = told.cells[0].states
        errors.append(count.count - 2000)  # type: ignore[union-attr]
        assert abs(mean.moments.mean - np.mean([r["age"] for r in rows])) < 10  # type: ignore[union-attr]
    assert len(set(errors)) > 1
    assert max(map(abs, errors)) < 200


def test_rare_groups_do_not_show_in_noisy_answers(tmp_path: Path) -> None:
    rows = [{"city": "Oslo"}] * 500 + [{"city": "Bergen"}] * 200 + [{"city": "Røros"}]
    peer = Peer(
        tmp_path,
        rows,
        AgentSettings(analyze="on", analyze_epsilon=100.0, analyze_epsilon_per_question=2.0),
    )
    assert [cell.group for cell in peer.ask("count by city", epsilon=2.0).cells] == [("Oslo",)]


@pytest.mark.parametrize(
    "text", ["quantile(age, 0.5)", "std(age)", "mean(age)", "histogram(age, 9)", "distinct(city)"]
)
def test_what_has_no_noisy_form_is_refused(tmp_path: Path, text: str) -> None:
    allowed = AgentSettings(analyze="on", analyze_epsilon=1.0)
    assert "usage" in Peer(tmp_path, people(), allowed).ask(text, epsilon=1.0).refused


# --- what a peer could send ------------------------------------------------------------------


def test_a_peer_with_other_types_is_left_out_by_name(tmp_path: Path) -> None:
    good = split(people(200), tmp_path)
    odd = Peer(tmp_path / "odd", [{**row, "age": "old"} for row in people(50)])
    found = together([*good, odd], "count, missing(age)")
    assert found.left_out == {
        "p3": "column 'age' holds text there, and number elsewhere; its owner sees more: "
        "commonweight-agent data check"
    }
    assert found.peers == 3
    assert "3 of 4 peers" in found.label


def test_an_answer_of_a_wrong_form_is_told(tmp_path: Path) -> None:
    peer = Peer(tmp_path, people())
    asked = parse_query("count, mean(age) by sex")
    told = peer.told(asked)
    assert validate(asked, told) == ""
    for other in ("count by sex", "count, count by sex", "mean(age), count by sex", "count"):
        assert validate(parse_query(other), told) != ""
    twice = msgspec.structs.replace(told, cells=told.cells * 2)
    assert validate(asked, twice) != ""
    for wrong in (b'{"cells":[[["f"],-1,[]]]}', b'{"rows":1e9}', b'{"cells":[[["f"],1,[["x"]]]]}'):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(wrong, type=PeerAnswer)
    assert math.isfinite(msgspec.json.decode(b'{"rows":5}', type=PeerAnswer).rows)


def test_a_process_of_its_own_answers_and_remembers(tmp_path: Path) -> None:
    file = Peer(tmp_path / "table", people()).file
    home = tmp_path / "home"
    home.mkdir()
    change(home, analyze="on", data=str(file))
    told = msgspec.json.decode(job_handler.answer(parse_query("count"), home), type=PeerAnswer)
    assert told.cells[0].rows == 200
    file_of_log = home / "told" / "analysis.db"
    (entry,) = QueryLog(file_of_log).entries()
    assert (entry.question, entry.cells, entry.refused) == ("count", 1, "")
    assert file_of_log.stat().st_mode & 0o077 == 0
    with pytest.raises(BadMessage):
        job_handler.read_question('{"operations":[]}')


def test_the_limit_on_everything_holds_for_questions_too(tmp_path: Path) -> None:
    peer = Peer(tmp_path, people(), AgentSettings(analyze="on", privacy_max_epsilon=1.0))
    assert "with noise only" in peer.ask("count").refused
    assert not peer.ask("count", epsilon=0.7).refused
    refused = peer.ask("count", "age > 10", epsilon=0.7).refused
    assert "privacy_max_epsilon is 1" in refused
    assert peer.memory.spent_epsilon == pytest.approx(0.7)
    assert not peer.ask("count", epsilon=0.7).refused  # the same again costs nothing


def test_an_exact_answer_is_named_in_the_ledger(tmp_path: Path) -> None:
    peer = Peer(tmp_path, people())
    peer.ask("count")
    peer.ask("count")
    (charge,) = peer.memory.ledger.charges()
    assert (charge.purpose, charge.is_exact, charge.about) == ("question", True, "count")


def test_a_missing_reader_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent.data, "find_spec", lambda name: None)
    with pytest.raises(MissingPackage, match="needs pyarrow") as caught:
        job_handler.answer(parse_query("count"), tmp_path)
    assert caught.value.hint == "pip install 'commonweight[tabular]'"
    assert "commonweight[tabular]" in refusal_of(caught.value).text
