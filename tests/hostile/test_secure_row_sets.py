"""A coordinator that asks secure questions over other rows of the same peers, against the agents'
real steps: no difference of sums is the sum over rows of one peer."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from agent.analytics import peer_sets
from agent.analytics.query_log import QueryLog, log_file
from coordinator.cli.demo import trial_tables
from protocols.errors import CommonweightError
from protocols.messages.jobs import QuestionStep, SecureAnalyze
from protocols.privacy.question_layout import Layout
from protocols.privacy.secagg.messages import encode
from tests.support.secure_tables import SecureTables
from tests.support.tables import write_csv

pytest.importorskip("pyarrow", reason="tables are read by the extra analyze")
pytestmark = pytest.mark.attack("questions", by="coordinator")

Question = tuple[str, str]
Row = dict[str, Any]


@pytest.fixture
def tmp_path(memory_path: Path) -> Path:
    """In memory, because a peer commits what each answer told."""
    return memory_path


def rows(seed: int, wards: str, count: int = 60) -> list[Row]:
    chance = np.random.default_rng(seed)
    return [
        {
            "salary": int(chance.integers(20_000, 90_000)),
            "age": int(chance.integers(20, 70)),
            "smoker": int(chance.random() < 0.4),
            "ward": wards[place % len(wards)],
        }
        for place in range(count)
    ]


def fleet(folder: Path, *wards: str, **allowed: Any) -> SecureTables:
    return SecureTables(folder, [rows(n, some) for n, some in enumerate(wards)], **allowed)


def refused(site: SecureTables, question: Question) -> None:
    """The peers refuse it before a card leaves that the sum would need."""
    site.errors.clear()
    with pytest.raises(CommonweightError) as caught:
        site.ask(*question)
    assert "rows that differ at more peers" in caught.value.hint
    assert any("rows of fewer than 3 trusted peers" in why for why in site.errors)


#: The first peer has a ward X too.
LEFT_OUT: list[list[Question]] = [
    [("sum(salary)", ""), ("sum(salary)", "ward != 'X'")],
    [("var(salary)", ""), ("cov(salary, age)", "ward != 'X'")],
    [("sum(salary)", "age >= 30"), ("mean(salary)", "age >= 30 and ward in ('A', 'B')")],
    [("count", ""), ("count by ward", "")],
    [("sum(salary)", ""), ("sum(salary)", "ward == 'A'"), ("sum(salary)", "ward == 'B'")],
    [("cov(smoker, salary)", ""), ("sum(salary)", "smoker == 1 and ward != 'X'")],
    [("levels(smoker)", ""), ("count", "smoker == 1 and ward != 'X'")],
    [("sum(smoker)", ""), ("count", "smoker == 1 and ward != 'X'")],
    [("count", ""), ("missing(salary), levels(smoker)", "ward != 'X'")],
]


@pytest.mark.parametrize("questions", LEFT_OUT, ids=lambda some: "; ".join(map(" ".join, some)))
@pytest.mark.parametrize("turned", [False, True])
def test_rows_of_one_peer_are_not_the_difference_of_sums(
    tmp_path: Path, questions: list[Question], turned: bool
) -> None:
    """Attack: ask the same peers with a condition, a group or categories that leave out rows of one
    of them. The difference of the sums is the sum over these rows. In either order."""
    site = fleet(tmp_path, "ABX", "AB", "AB", "AB")
    *before, last = questions[::-1] if turned else questions
    for question in before:
        site.ask(*question)
    refused(site, last)
    for question in before:  # an answer of before is repeated
        site.ask(*question)


def test_a_bin_of_one_peer_is_empty(tmp_path: Path) -> None:
    """Attack: ask for a histogram with a bin in which one peer alone has rows; and subtract numbers
    of rows under a condition from its bins."""
    parts = [rows(n, some) for n, some in enumerate(("ABX", "AB", "AB", "AB"))]
    parts[0] += [row | {"age": 90} for row in rows(9, "AB", 12)]
    site = SecureTables(tmp_path, parts)
    (found,) = site.ask("histogram(age, 3, 10, 100)").groups
    *_, oldest = found.figures[0]["counts"]
    assert (found.rows, oldest, sum(found.figures[0]["counts"])) == (252, 0, 240)
    refused(site, ("count", "age >= 40 and age < 70 and ward != 'X'"))


@pytest.mark.parametrize("figure", ["corr(age, salary)", "levels(ward)"])
def test_a_figure_that_one_peer_leaves_out_of_a_group_is_in_no_sum(
    tmp_path: Path, figure: str
) -> None:
    """Attack: ask for a figure by group that one peer leaves out, as it has too few rows there: the
    number of rows of the group, less that of the figure, is this peer's."""
    parts = [rows(n, "AB") for n in range(4)]
    for place, row in enumerate(parts[0]):
        row["smoker"] = int(place % 8 == 0)
    site = SecureTables(tmp_path, parts)
    refused(site, (f"{figure} by smoker", ""))
    assert len(site.ask("mean(salary) by smoker", "").groups) == 2


def trial(*wards: str) -> list[list[Row]]:
    """Rows with a time, and whether there was an event."""
    parts = [rows(n, some, 120) for n, some in enumerate(wards)]
    for row in (row for part in parts for row in part):
        row |= {"months": row["salary"] % 60, "died": row["salary"] // 60 % 2}
    return parts


COX = 'cox(months, died ~ C(ward, "A", "B"), bins=(32,), at=(0,))'


@pytest.mark.parametrize(
    "condition", ["died == 1 and months < 32", "months < 32", "died == 0 and months >= 16"]
)
@pytest.mark.parametrize("turned", [False, True])
def test_time_bins_less_a_condition_are_not_of_one_peer(
    tmp_path: Path, condition: str, turned: bool
) -> None:
    """Attack: subtract numbers of rows under a condition from those of the time bins."""
    site = SecureTables(tmp_path, trial("ABX", "AB", "AB", "AB"))
    survival, count = ("survival(months, died, 64)", ""), ("count", f"{condition} and ward != 'X'")
    site.ask(*(count if turned else survival))
    refused(site, survival if turned else count)


@pytest.mark.parametrize("last", [0, 1, 2])
@pytest.mark.parametrize("kind", ["sum", "levels"])
def test_numbers_of_rows_of_several_columns_are_not_of_one_peer(
    tmp_path: Path, kind: str, last: int
) -> None:
    """Attack: from time bins under two conditions, subtract numbers of rows of other columns. What
    is left are the rows of one peer that a condition leaves out. In any order."""
    site = SecureTables(tmp_path, trial("ABX", "AB", "AB", "AB"))
    questions = [
        ("survival(months, died, 64)", "ward != 'X' and smoker == 0"),
        (f"{kind}(died)", "smoker == 1"),
        ("count", "died == 0"),
    ]
    refusing = questions.pop(last)
    for question in questions:
        site.ask(*question)
    refused(site, refusing)


def test_time_bins_less_those_of_a_cox_model_are_not_of_one_peer(tmp_path: Path) -> None:
    """Attack: subtract the numbers of rows in the time bins of a Cox model, which leaves out a
    category that rows of one peer alone have, from those of all rows. Its answer has the number of
    all rows, so it is refused also without an earlier question."""
    site = SecureTables(tmp_path, trial("ABX", "AB", "AB", "AB"))
    refused(site, (COX, ""))
    site.ask("survival(months, died, 64)")
    refused(site, (COX, ""))


def test_a_cox_model_without_a_category_of_enough_peers(tmp_path: Path) -> None:
    """Control: a Cox model is answered beside the counts of all rows, if it leaves out rows of
    enough peers, or none."""
    for number, wards in enumerate((("ABX", "ABX", "ABX", "AB"), ("AB",) * 4)):
        (tmp_path / str(number)).mkdir()
        site = SecureTables(tmp_path / str(number), trial(*wards))
        for question in ("survival(months, died, 64)", COX):
            assert site.ask(question).peers == 4


@pytest.mark.parametrize("asked", ["model", "cov(salary, flag)", "sum(flag)"])
def test_a_category_of_one_peer_is_in_no_sum(tmp_path: Path, asked: str) -> None:
    """Attack: ask for a model with a category that rows of one peer alone have, or for sums with a
    column of zeros and ones that has ones there alone. They tell the sum over these rows."""
    parts = [rows(n, some) for n, some in enumerate(("ABX", "AB", "AB", "AB"))]
    parts = [[row | {"flag": int(row["ward"] == "X")} for row in part] for part in parts]
    site = SecureTables(tmp_path, parts)
    model = "glm(salary ~ C(ward, {}), family=gaussian, link=identity, at=({}))"
    refused(site, (model.format('"A", "B", "X"', "5e4, 0, 0") if asked == "model" else asked, ""))
    assert site.ask(model.format('"A", "B"', "5e4, 0")).peers == 4


def test_a_combination_of_one_peer_is_in_no_model(tmp_path: Path) -> None:
    """Attack: ask for an interaction of two categories, each of which enough peers have, and both
    of which one peer alone has."""
    parts = [
        [row | {"shift": shifts[n // 3 % len(shifts)]} for n, row in enumerate(rows(3, wards, 400))]
        for wards, shifts in (
            ("ABX", "dn"),
            ("ABX", "de"),
            ("ABX", "de"),
            ("AB", "dne"),
            ("AB", "dne"),
        )
    ]
    site = SecureTables(tmp_path, parts)
    model = "glm(salary ~ {}, family=gaussian, link=identity, at=({}))"
    ward, shift = 'C(ward, "A", "B", "X")', 'C(shift, "d", "e", "n")'
    apart = model.format(f"{ward} + {shift}", "5e4, 0, 0, 0, 0")
    refused(site, (model.format(f"{ward} * {shift}", "5e4" + ", 0" * 8), ""))
    assert site.ask(apart).peers == 5


def followed(seed: int, months: float, count: int = 200) -> list[Row]:
    """Patients who are followed for so long."""
    chance = np.random.default_rng(seed)
    return [
        {
            "months": round(float(chance.uniform(0, months)), 1),
            "died": int(chance.random() < 0.5),
            "age": int(chance.integers(20, 70)),
        }
        for _ in range(count)
    ]


def test_a_time_in_which_one_peer_has_rows_has_no_sum(tmp_path: Path) -> None:
    """Attack: ask for a Cox model with a time bin in which one peer alone has rows: its sums over
    that bin are that peer's. An honest coordinator joins such bins with others."""
    for name in ("lie", "honest"):
        (tmp_path / name).mkdir()
    parts = [followed(n, months) for n, months in enumerate((36.0, 20.0, 20.0, 20.0))]
    site = SecureTables(tmp_path / "lie", parts)
    refused(site, ("cox(months, died ~ age, bins=(10, 22), at=(0,))", ""))
    assert site.ask("cox(months, died ~ age, bins=(10,), at=(0,))").peers == 4
    site = SecureTables(tmp_path / "honest", parts)
    assert max(row[1] for row in site.method("km(months, died)").tables[0].rows) < 20
    assert site.method("cox(months, died ~ age)").tables


def test_two_peers_are_too_few_also_with_others(tmp_path: Path) -> None:
    """Attack: the same with two peers of four, and with a peer that no owner trusts."""
    site = fleet(tmp_path, "ABX", "ABX", "AB", "AB")
    site.ask("sum(salary)")
    refused(site, ("sum(salary)", "ward != 'X'"))
    (tmp_path / "other").mkdir()
    site = fleet(tmp_path / "other", "ABX", "ABX", "ABX", "AB", "AB")
    unknown = site.ids[0]
    for peer in site.peers.values():
        trust = {one: "" for one in peer.owner.trust if one != unknown}
        peer.owner = replace(peer.owner, trust=trust)
    site.online.discard(unknown)
    site.ask("sum(salary)")
    refused(site, ("sum(salary)", "ward != 'X'"))


def test_a_condition_of_enough_peers_is_answered(tmp_path: Path) -> None:
    """Control: three of four peers have rows that the condition leaves out; or all; or none."""
    site = fleet(tmp_path, "ABX", "ABX", "ABX", "AB")
    assert site.ask("sum(salary)").rows == 240
    assert site.ask("mean(salary)", "ward != 'X'").rows == 180
    assert site.ask("sum(salary)", "ward in ('A', 'B', 'X')").rows == 240
    assert site.ask("mean(salary) by smoker").rows == 240
    assert site.ask("var(salary)", "age >= 40").peers == 4
    assert len(site.ask("count, var(age) by ward").groups) == 3


def test_new_rows_of_one_peer_wait_for_those_of_others(tmp_path: Path) -> None:
    """Attack: ask again after one peer has new rows: the difference would be these. When as many
    peers have some as a sum needs, the question is answered, also after restarts."""
    site = fleet(tmp_path, "AB", "AB", "AB", "AB")
    assert site.ask("sum(salary)").rows == 240
    for place, peer in enumerate(site.ids[:3]):
        write_csv(site.peers[peer].file, [*rows(place, "AB"), *rows(10 + place, "AB", 20)])
        for agent in site.peers.values():
            agent.questions = agent.restarted()
        if place < 2:
            refused(site, ("sum(salary)", ""))
    assert site.ask("sum(salary)").rows == 300


def test_a_peer_that_has_lost_its_record_counts_as_one_with_other_rows(tmp_path: Path) -> None:
    """Attack: have a machine restored from a backup, and ask about rows that would get the numbers
    of those whose record was lost."""
    site = fleet(tmp_path, "ABX", "AB", "AB", "AB")
    victim = site.peers[site.ids[0]]
    record = peer_sets.file_beside(victim.home / "told" / "analysis.db")
    before = record.read_bytes()
    site.ask("sum(salary)")
    victim.log.close()
    record.write_bytes(before)
    victim.log = QueryLog(log_file(victim.home))
    victim.questions = victim.restarted()
    refused(site, ("sum(salary)", "ward != 'X'"))


def test_a_peer_says_itself_which_rows_its_sums_are_over(tmp_path: Path) -> None:
    """Attack: tell the peers in the layout that a peer's rows are others than it has said, so that
    the difference does not show; or leave them out."""

    def rows_as(change: Callable[[Layout], Layout]) -> None:
        def reply(step: QuestionStep, peer: str, asked: SecureAnalyze) -> bytes | None:
            if step != "ready":
                return None
            layout = change(msgspec.msgpack.decode(asked.request, type=Layout))
            lie = SecureAnalyze(
                query=asked.query, session=asked.session, step=step, request=encode(layout)
            )
            return site.peers[peer].step(lie)

        site.reply = reply

    for name in ("other", "none"):
        (tmp_path / name).mkdir()
        site = fleet(tmp_path / name, "ABX", "AB", "AB", "AB")
        site.ask("sum(salary)")
        lie = {site.ids[0]: ({"": {0: 1}}, {"": {5: 1}})}
        rows_as(
            lambda layout, name=name, lie=lie: replace(
                layout, rows=layout.rows | lie if name == "other" else {}
            )
        )
        site.errors.clear()
        with pytest.raises(CommonweightError):
            site.ask("sum(salary)", "ward != 'X'")
        assert any("which rows this peer's figures are over" in why for why in site.errors)


def test_sums_over_many_sets_of_rows_come_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: ask about more and more sets of rows until the record of them fills the disk, or
    until the search for combinations takes all time."""
    monkeypatch.setattr(peer_sets, "MAX_SUMS", 4)
    site = fleet(tmp_path, "ABCD", "ABCD", "ABCD")
    site.ask("sum(salary) by ward")
    with pytest.raises(CommonweightError, match="over 4 different sets of rows"):
        site.ask("sum(salary)", "age >= 40")
    assert len(site.ask("sum(salary) by ward").groups) == 4
    monkeypatch.setattr(peer_sets, "MAX_SUMS", 256)
    monkeypatch.setattr(peer_sets, "MAX_COUNTS", 7)
    site.ask("levels(smoker)")
    with pytest.raises(CommonweightError, match="over 7 different sets of rows"):
        site.ask("count", "age >= 40")
    site.ask("levels(smoker)")


STATISTICS = (
    "table1(age, bmi, sex, by=treatment)",
    "ttest(age by treatment)",
    "chi2(sex, treatment)",
    "corr(age, bmi, time)",
)
MODELS = (
    "table1(age, sex, bmi, smoker, outcome, by=treatment)",
    "glm(outcome ~ age + smoker, family=binomial)",
)
SURVIVAL = ("km(time, event by treatment)", "cox(time, event ~ age + sex + treatment)")


@pytest.mark.parametrize(
    "methods",
    [
        STATISTICS,
        MODELS,
        pytest.param(SURVIVAL, marks=pytest.mark.long),
        pytest.param(SURVIVAL[::-1], marks=pytest.mark.long),
    ],
    ids=["statistics", "models", "survival", "cox first"],
)
def test_the_questions_of_a_trial_are_answered(tmp_path: Path, methods: tuple[str, ...]) -> None:
    """Control: the tables, tests and models of a trial at three clinics, whose tables have missing
    values, in secure sums."""
    trial_tables.write(tmp_path / "trial")
    clinics = [_read(tmp_path / "trial" / f"{name}.csv") for name in trial_tables.CLINICS]
    site = SecureTables(tmp_path, clinics)
    for method in methods:
        assert site.method(method).tables
    assert site.ask("count, mean(age), var(bmi), levels(sex), missing(bmi)").rows == 2020
    assert site.ask("mean(bmi), histogram(age, 6, 30, 90) by sex", "age >= 50").peers == 3


def _read(file: Path) -> list[Row]:
    text = file.read_text()
    if ";" in text:
        text = text.replace(",", ".").replace(";", ",")
    return [
        {name: _value(word) for name, word in row.items() if name != "patient"}
        for row in csv.DictReader(text.splitlines())
    ]


def _value(word: str) -> Any:
    word = {"YES": "1", "NO": "0"}.get(word, word)
    try:
        return float(word) if word else None
    except ValueError:
        return word
