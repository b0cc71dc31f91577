"""Statistical models that are asked to learn one person's row.

The victim is one of 300 persons, the only one of 99. The attacker writes the questions, with any
coefficients, and knows everybody's age.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from protocols.analytics.mergeable_states import CountState, PeerAnswer, WithheldState
from protocols.analytics.model_states import ColumnsState, FitState, LevelsState, SurvivalState
from protocols.analytics.parser import parse_query
from tests.support.table_peers import TablePeer

pytest.importorskip("pyarrow", reason="tables are read by the extra analyze")
pytestmark = pytest.mark.attack("24.3")

MIN_COUNT = 5


@pytest.fixture
def tmp_path(memory_path: Path) -> Path:
    """In memory, because a peer commits what each answer told."""
    return memory_path


def persons(count: int = 300, seed: int = 6, oldest: float = 99.0) -> list[dict[str, Any]]:
    chance = np.random.default_rng(seed)
    rows = [
        {
            "age": float(chance.integers(20, 80)),
            "visits": int(chance.poisson(4)) + 1,
            "ill": int(chance.random() < 0.4),
            "sex": str(chance.choice(["f", "m"])),
            "months": int(chance.integers(1, 60)),
            "died": int(chance.random() < 0.5),
            "city": str(chance.choice(["Oslo", "Bergen"])),
        }
        for _ in range(count - 1)
    ]
    return [*rows, rows[0] | {"age": oldest, "visits": 9, "ill": 1}]


def ask(peer: TablePeer, text: str, where: str = "") -> PeerAnswer:
    return peer.answer(parse_query(text, where))


def fit_of(told: PeerAnswer) -> FitState | None:
    states = [state for cell in told.cells for state in cell.states]
    return states[0] if states and isinstance(states[0], FitState) else None


MODELS = {
    "poisson": "glm(visits ~ age, family=poisson, link=log, at=({}, {}))",
    "gamma": "glm(visits ~ age, family=gamma, link=log, at=({}, {}))",
    "gaussian": "glm(visits ~ age, family=gaussian, link=log, at=({}, {}))",
    "binomial": "glm(ill ~ age, family=binomial, link=logit, at=({}, {}))",
}


@pytest.mark.parametrize("family", MODELS)
def test_coefficients_give_no_row_most_of_the_weight(tmp_path: Path, family: str) -> None:
    """Attack: choose coefficients for which the weights of all rows but the oldest vanish."""
    peer = TablePeer(tmp_path, persons())
    for slope in (0.2, 0.5, 2.0):
        # In a gamma model, the outcomes count by exp(-x'b) in the score.
        sign = -1 if family == "gamma" else 1
        told = ask(peer, MODELS[family].format(-sign * slope * 99, sign * slope))
        assert "most of the weight" in told.refused
    assert fit_of(ask(peer, MODELS[family].format(0, 0.01))) is not None


def test_a_steep_curve_counts_no_rows_above_a_threshold(tmp_path: Path) -> None:
    """Attack: make a logistic curve a step, whose sums count those older than any threshold."""
    peer = TablePeer(tmp_path, persons())
    for threshold in (30.5, 50.5):
        for slope in (2, 20):
            told = ask(peer, MODELS["binomial"].format(-slope * threshold, slope))
            assert "the coefficients of this question" in told.refused


def test_one_person_dominates_no_sum(tmp_path: Path) -> None:
    """Attack: ask for a model with a column in which one person has nearly all."""
    rows = persons()
    rows[-1] |= {"age": 1e9}
    told = ask(TablePeer(tmp_path, rows), "glm(ill ~ age, family=binomial, link=logit, at=(0, 0))")
    assert "outweighs" in told.refused


def test_one_person_dominates_no_time_bin_whatever_the_scale(tmp_path: Path) -> None:
    """Attack: shift a column so that no value outweighs others, and ask for a narrow time bin."""
    chance = np.random.default_rng(2)
    rows = [row | {"income": float(chance.integers(9_000, 11_000))} for row in persons()]
    rows[-1] |= {"income": 3e6, "months": 3, "died": 1}
    peer = TablePeer(tmp_path, rows)
    assert ask(peer, "mean(income)").cells[0].states != (WithheldState(),)
    for term in ("income", "scaled(income, 1e9, 1)", "scaled(income, 1e4, 1e-99)"):
        told = ask(peer, f"cox(months, died ~ {term}, bins=(8,), at=(0,))")
        assert "the coefficients of this question" in told.refused


@pytest.mark.parametrize("few", [0, 1, 4])
def test_combinations_of_few_rows_are_refused_alike(tmp_path: Path, few: int) -> None:
    """Attack: read from cross-products of categories how many women were ill."""
    rows = [row | {"ill": 0} if row["sex"] == "f" else row for row in persons()]
    women = [row for row in rows if row["sex"] == "f"]
    for row in women[:few]:
        row["ill"] = 1
    rows = [*women, *(row for row in rows if row["sex"] == "m")]
    told = ask(
        TablePeer(tmp_path, rows), 'glm(age ~ ill + C(sex, "f", "m"), link=identity, at=(0, 0, 0))'
    )
    assert told.refused.endswith("some combination of 'ill' and 'sex'")
    assert not told.cells


def test_there_are_more_rows_than_coefficients(tmp_path: Path) -> None:
    """Attack: ask for as many sums as a small group has rows."""
    peer = TablePeer(tmp_path, persons(300))
    model = "glm(age ~ visits + months + ill, link=identity, at=(0, 0, 0, 0))"
    whole = fit_of(ask(peer, model))
    assert whole is not None
    assert whole.rows == 300
    small = TablePeer(tmp_path / "small", persons(17))
    assert "too many coefficients" in ask(small, model).refused


def test_questions_with_other_coefficients_are_limited_in_number(tmp_path: Path) -> None:
    """Attack: solve for a column from the sums at very many different coefficients."""
    rows = persons(120)
    peer = TablePeer(tmp_path, rows)
    model = "glm(visits ~ age + months, family=poisson, link=log, at=({}, 0, 0))"
    answered = [fit_of(ask(peer, model.format(number / 1000))) is not None for number in range(30)]
    coefficients = 3
    assert 3 < sum(answered) * (coefficients + 2) < len(rows)
    assert not any(answered[-8:])
    # What was answered is answered again, and other columns have a count of their own.
    assert fit_of(ask(peer, model.format(0.0))) is not None
    assert ask(peer, MODELS["binomial"].format(0, 0)).refused
    fresh = 'glm(ill ~ C(sex, "f", "m"), family=binomial, link=logit, at=(0, 0))'
    assert fit_of(ask(peer, fresh)) is not None


def test_refusals_do_not_search_for_the_oldest(tmp_path: Path) -> None:
    """Attack: find the greatest age by halving: coefficients are refused from it on."""
    answers = []
    for oldest in (90.0, 99.0):
        peer = TablePeer(tmp_path / str(oldest), persons(100, oldest=oldest))
        model = "glm(visits ~ age, family=gamma, link=inverse, at=({}, -1))"
        asked = [ask(peer, model.format(80 + number / 2)).refused for number in range(30)]
        told_apart = sum("too many coefficients" not in words for words in asked)
        assert 0 < told_apart * 4 < 100, "each attempt counts, also a refused one"
        answers.append(asked[told_apart:])
    assert answers[0] == answers[1]
    assert len({*answers[0]}) == 1


def test_a_model_without_one_person_is_that_with_them(tmp_path: Path) -> None:
    """Attack: subtract the sums of everybody but one person from those of everybody."""
    peer = TablePeer(tmp_path, persons())
    model = "glm(visits ~ months, family=poisson, link=log, at=(0, 0))"
    everybody = fit_of(ask(peer, model))
    others = ask(peer, model, "age < 99")
    assert fit_of(others) == everybody
    assert others.similar


def test_time_bins_have_enough_rows_whatever_is_asked(tmp_path: Path) -> None:
    """Attack: move the ends of time bins until a bin holds one person."""
    peer = TablePeer(tmp_path, persons())
    answered = 0
    for by in ("", " by sex", " by city"):
        for power in range(2, 9):
            told = ask(peer, f"survival(months, died, {2**power}){by}")
            for state in (state for cell in told.cells for state in cell.states):
                if isinstance(state, SurvivalState):
                    answered += 1
                    counts = [*state.events, *state.censored]
                    assert all(count == 0 or count >= MIN_COUNT for count in counts)
    assert answered > 3


ORDERS = [
    ("city", "", "sex"),
    ("", "city", "sex"),
    ("sex", "cox", ""),
    ("cox", "city", ""),
    ("cox", "sex", ""),
]
NAMES = {"sex": ("f", "m"), "city": ("Oslo", "Bergen")}


@pytest.mark.parametrize("order", ORDERS, ids=",".join)
def test_bins_of_several_questions_describe_no_few_rows(
    tmp_path: Path, order: tuple[str, ...]
) -> None:
    """Attack: subtract the time bins of groups, of all rows and of a Cox model from each other.
    Each question is answered: in the bins of an earlier one, where its own would tell of few."""
    rows, told = persons(260), list[Any]()
    peer = TablePeer(tmp_path, rows)
    months, died = (np.array([row[name] for row in rows]) for name in ("months", "died"))
    of_all = np.ones(len(rows), bool)
    for by in order:
        groups, edges = [of_all], (16.0, 32.0)
        if by == "cox":
            asked = f'cox(months, died ~ C(sex, "f", "m"), bins={edges}, at=(0,))'
            assert not ask(peer, asked).refused
        else:
            answer = ask(peer, f"survival(months, died, 64){f' by {by}' if by else ''}")
            (edges,) = {state.edges for cell in answer.cells for state in cell.states}  # type: ignore[union-attr]
            assert edges, "there are several bins"
        if by:  # the sums of a Cox model count the rows of each category
            column = "sex" if by == "cox" else by
            groups = [np.array([row[column] == name for row in rows]) for name in NAMES[column]]
        bin_of = np.searchsorted(edges, months, side="right")
        told += [
            group & (bin_of == place) & (died == event)
            for group in groups
            for place in range(len(edges) + 1)
            for event in (0, 1)
        ]
    sums = np.unique([one for one in told if one.any()], axis=0).astype(np.int8)
    for one in sums:  # each alone, less another one, and less two
        left = one - sums
        for both in [left, (left[:, None] - sums[None]).reshape(-1, len(rows))]:
            counts = np.count_nonzero(both, axis=1)
            assert counts[counts > 0].min(initial=len(rows)) >= MIN_COUNT


def test_bins_of_a_question_that_was_refused_are_not_used(tmp_path: Path) -> None:
    """Attack: choose the bins of later answers by questions that are refused."""
    peer = TablePeer(tmp_path, persons(260))
    survival = parse_query("survival(months, died, 64)", "").operations[0]
    cox = 'cox(months, died ~ C(sex, "f", "m"), bins={}, at=(0,))'
    assert ask(peer, f"{cox.format((16.0, 32.0))}, {cox.format((2.0, 3.0))}").refused
    assert not peer.log.time_bins.earlier(survival)
    assert not ask(peer, cox.format((16.0, 32.0))).refused
    assert peer.log.time_bins.earlier(survival) == [(16.0, 32.0)]


@pytest.mark.parametrize("bins", ["(2,)", "(58, 59)", "(4, 8, 12, 16, 20, 24, 28, 32, 36, 40)"])
def test_a_cox_model_has_no_bins_of_few_rows(tmp_path: Path, bins: str) -> None:
    """Attack: ask for the sums of a Cox model over those who died in one month."""
    peer = TablePeer(tmp_path, persons(120))
    told = ask(peer, f'cox(months, died ~ C(sex, "f", "m"), bins={bins}, at=(0,))')
    assert "in some time bin" in told.refused or "too many coefficients" in told.refused


def test_categories_of_few_rows_have_no_name(tmp_path: Path) -> None:
    """Attack: list the values of a column of names."""
    rows = [row | {"name": f"person {number}"} for number, row in enumerate(persons())]
    rows[7]["city"] = "Vardø"
    peer = TablePeer(tmp_path, rows)
    names, cities = (ask(peer, f"levels({column})") for column in ("name", "city"))
    (state,) = names.cells[0].states
    assert isinstance(state, LevelsState | WithheldState)
    assert not isinstance(state, LevelsState) or state.counts == {}
    (state,) = cities.cells[0].states
    assert isinstance(state, LevelsState)
    assert "Vardø" not in state.counts
    assert min(state.counts.values()) >= MIN_COUNT
    # Nor do the counts that are told leave a few.
    assert 300 - sum(state.counts.values()) >= MIN_COUNT


def test_columns_that_the_owner_holds_back_have_no_name(tmp_path: Path) -> None:
    """Attack: learn the names of columns that nobody may ask for."""
    peer = TablePeer(tmp_path, persons(), data_columns=("age", "se*"))
    (state,) = ask(peer, "columns").cells[0].states
    assert state == ColumnsState(("age", "sex"))


def test_estimates_of_one_machine_need_their_owners_word(tmp_path: Path) -> None:
    """Attack: show what single machines have answered, with the consent to sums over all."""
    peer = TablePeer(tmp_path, persons())
    assert "does not let estimates" in ask(peer, "estimates, var(age)").refused
    peer.owner = msgspec.structs.replace(peer.owner, analyze_operations=("*", "estimates"))
    told = ask(peer, "estimates, var(age)")
    assert told.cells[0].states[0] == CountState(300)


def test_the_owner_approves_a_model_and_no_other(tmp_path: Path) -> None:
    """Attack: ask for another model than the one that the owner has read."""
    peer = TablePeer(tmp_path, persons(), analyze="ask")
    model = "glm(visits ~ {}, family=poisson, link=log, at=({}, 0))"
    assert "must allow" in ask(peer, model.format("months", 0)).refused
    ((digest, text, _),) = peer.log.approval_requests()
    assert text == "glm(visits ~ months, family=poisson, link=log)"
    assert peer.log.decide(digest, True)
    for step in range(3):
        assert fit_of(ask(peer, model.format("months", step / 10))) is not None
    assert "must allow" in ask(peer, model.format("age", 0)).refused
    assert "must allow" in ask(peer, model.format("months", 0), "age > 50").refused


def test_interactions_count_no_rows_of_three_categories(tmp_path: Path) -> None:
    """Attack: read from the products of an interaction how many ill women of Oslo died."""
    rows = persons(800)
    few = [row for row in rows if (row["sex"], row["city"], row["died"]) == ("f", "Oslo", 1)]
    gone = {id(row) for row in few[3:]}
    rows = [row for row in rows if id(row) not in gone]
    sex, city = 'C(sex, "f", "m")', 'C(city, "Bergen", "Oslo")'
    peer = TablePeer(tmp_path, rows)
    main = ask(peer, f"glm(visits ~ {sex} + {city} + died, link=identity, at=(0, 0, 0, 0))")
    assert fit_of(main) is not None, "no two of the three columns have a rare combination"
    told = ask(
        peer, f"glm(visits ~ {sex} + {city} + died + sex:city, link=identity, at=(0, 0, 0, 0, 0))"
    )
    assert "some combination of 'city' and 'died' and 'sex'" in told.refused
    told = ask(
        peer,
        f"glm(died ~ {sex} + {city} + sex:city, family=binomial, link=logit, at=(0, 0, 0, 0))",
    )
    assert "some combination of 'city' and 'died' and 'sex'" in told.refused, "the outcome, too"


def test_one_person_dominates_no_interaction(tmp_path: Path) -> None:
    """Attack: multiply two columns in each of which one person is only large."""
    chance = np.random.default_rng(5)
    rows = [
        row | {"income": float(chance.uniform(0, 2)), "debt": float(chance.uniform(0, 2))}
        for row in persons()
    ]
    rows[-1] |= {"income": 60.0, "debt": 60.0}
    peer = TablePeer(tmp_path, rows)
    told = ask(peer, "glm(visits ~ income + debt, link=identity, at=(0, 0, 0))")
    assert fit_of(told) is not None, "alone, neither outweighs the others"
    told = ask(peer, "glm(visits ~ income + debt + income:debt, link=identity, at=(0, 0, 0, 0))")
    assert "most of the weight" in told.refused


def test_interactions_count_as_sums_about_a_column(tmp_path: Path) -> None:
    """Attack: ask for more sums about a column than it has rows, by its interactions."""
    rows = persons(60)
    terms = "visits + months + visits:months"
    plain = TablePeer(tmp_path / "a", rows)
    model = f"glm(age ~ {terms}, link=identity, at=({{}}, 0, 0, 0))"
    answered = sum(fit_of(ask(plain, model.format(n))) is not None for n in range(12))
    assert 0 < answered * (2 * 4 + 2) < len(rows)


def test_a_category_with_one_dominating_person_is_in_no_model(tmp_path: Path) -> None:
    """Attack: read the sum over a category in which one person has nearly all from a model's
    products of a column and a category; a mean by category does not tell it."""
    rows = [row | {"income": float(100 + number)} for number, row in enumerate(persons())]
    for row in rows:
        if row["city"] == "Oslo":
            row["income"] = 0.01 * row["age"]
    poor = [row for row in rows if row["city"] == "Oslo"]
    poor[0]["income"] = 3_000.0
    peer = TablePeer(tmp_path, rows)
    by_city = ask(peer, "mean(income) by city")
    assert {cell.group[0]: type(cell.states[0]) for cell in by_city.cells}["Oslo"] is WithheldState
    for model in (
        'glm(age ~ income + C(city, "Bergen", "Oslo"), link=identity, at=(0, 0, 0))',
        'glm(income ~ age + C(city, "Bergen", "Oslo"), link=identity, at=(0, 0, 0))',
    ):
        assert "in some category here" in ask(peer, model).refused


def test_a_time_bin_tells_no_combination_of_few_rows(tmp_path: Path) -> None:
    """Attack: read from the products of two categories how many women of Oslo died in a year."""
    chance = np.random.default_rng(3)
    rows = [row | {"sex": str(chance.choice(["f", "m"]))} for row in persons(900)]

    def is_rare(row: dict[str, Any]) -> bool:
        return (row["sex"], row["city"], row["died"]) == ("f", "Oslo", 1) and row["months"] < 16

    gone = {id(row) for row in [row for row in rows if is_rare(row)][2:]}
    rows = [row for row in rows if id(row) not in gone]
    peer = TablePeer(tmp_path, rows)
    sex, city = 'C(sex, "f", "m")', 'C(city, "Bergen", "Oslo")'
    alone = ask(peer, f"cox(months, died ~ {sex}, bins=(16,), at=(0,))")
    assert not alone.refused
    told = ask(peer, f"cox(months, died ~ {sex} + {city}, bins=(16,), at=(0, 0))")
    assert "a combination of categories" in told.refused


def test_combinations_of_a_model_are_rows_that_were_told(tmp_path: Path) -> None:
    """Attack: ask a model for the rows of each combination of two categories, and then a question
    about the same rows and one more: the difference is one person."""
    rows = persons(400)
    for number, row in enumerate(rows):
        row["visits"] = 1 + number % 7
    women = [row for row in rows if (row["sex"], row["city"]) == ("f", "Oslo")]
    others = [row for row in rows if (row["sex"], row["city"]) == ("m", "Oslo")]
    for row in rows:
        row["flag"] = 0.5
    for row in [*women, others[0]]:
        row["flag"] = 2.5
    peer = TablePeer(tmp_path, rows)
    sex, city = 'C(sex, "f", "m")', 'C(city, "Bergen", "Oslo")'
    told = ask(peer, f"glm(visits ~ {sex} + {city}, link=identity, at=(0, 0, 0))")
    assert fit_of(told) is not None
    after = ask(peer, "count, mean(age)", "flag > 1")
    exact = [cell.rows for cell in after.cells]
    assert after.refused or exact != [len(women) + 1], "one person more would be known"
