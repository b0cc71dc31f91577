"""Methods over three peers' tables: equal to scipy's and scikit-learn's on the rows together."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coordinator.cli.analysis_formats import to_csv, to_latex
from coordinator.jobs.methods import distributions
from coordinator.jobs.methods.cox import choose_edges
from coordinator.jobs.methods.plans import explain_refusal
from coordinator.jobs.methods.requests import FORMS, parse_method
from coordinator.jobs.methods.results import make_table
from protocols.analytics.model_states import SurvivalState, coarsen
from protocols.errors import CannotBeMet, UsageError
from tests.support.table_peers import TableFleet, records

pytest.importorskip("pyarrow", reason="tables are read by the extra analyze")
stats = pytest.importorskip("scipy.stats", reason="the oracle")


def patients(count: int = 600, seed: int = 4) -> list[dict[str, Any]]:
    chance = np.random.default_rng(seed)
    return [
        {
            "age": round(float(chance.normal(60, 12)), 1),
            "bmi": round(float(chance.normal(26, 4)), 2),
            "sex": str(chance.choice(["f", "m"])),
            "smoker": int(chance.random() < 0.4),
            "city": str(chance.choice(["Bergen", "Oslo", "Tromsø"])),
            "number": number,
            "income": int(chance.choice([20_000, 30_000])) if number % 3 else number,
        }
        for number in range(count)
    ]


ROWS = patients()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> TableFleet:
    parts = [ROWS[:120], ROWS[120:300], ROWS[300:]]
    return TableFleet(tmp_path_factory.mktemp("fleet"), parts)


def column(name: str, **chosen: Any) -> np.ndarray[Any, Any]:
    return np.array(
        [row[name] for row in ROWS if all(row[key] == value for key, value in chosen.items())]
    )


def test_a_t_test_is_scipys(site: TableFleet) -> None:
    found = site.ask("ttest(age by sex)")
    assert found.label == "3 of 3 peers, 600 rows"
    for row, equal in zip(records(found.tables[0]), (False, True), strict=True):
        expected = stats.ttest_ind(column("age", sex="f"), column("age", sex="m"), equal_var=equal)
        ends = expected.confidence_interval(0.95)
        np.testing.assert_allclose(
            [row["t"], row["df"], row["p"], row["2.5 %"], row["97.5 %"]],
            [expected.statistic, expected.df, expected.pvalue, *ends],
            rtol=1e-8,
        )
    with pytest.raises(UsageError, match="compares two groups"):
        site.ask("ttest(age by city)")


def test_an_analysis_of_variance_is_scipys(site: TableFleet) -> None:
    between, _ = records(site.ask("anova(bmi by city)").tables[0])
    groups = [column("bmi", city=city) for city in ("Bergen", "Oslo", "Tromsø")]
    expected = stats.f_oneway(*groups)
    np.testing.assert_allclose(
        [between["F"], between["p"]], [expected.statistic, expected.pvalue], rtol=1e-8
    )


def test_a_chi_squared_test_is_scipys(site: TableFleet) -> None:
    found = site.ask("chi2(city, smoker)")
    (row,) = records(found.tables[0])
    table = [
        [len(column("age", city=city, smoker=smoker)) for smoker in (0, 1)]
        for city in ("Bergen", "Oslo", "Tromsø")
    ]
    assert [list(one[1:]) for one in found.tables[1].rows] == table
    expected = stats.chi2_contingency(table, correction=False)
    np.testing.assert_allclose(
        [row["chi2"], row["df"], row["p"]],
        [expected.statistic, expected.dof, expected.pvalue],
        rtol=1e-8,
    )
    assert not found.notes


def test_correlations_are_scipys(site: TableFleet) -> None:
    pairs, matrix = site.ask("corr(age, bmi, number)").tables
    for row in records(pairs):
        expected = stats.pearsonr(column(row["a"]), column(row["b"]))
        ends = expected.confidence_interval(0.95)
        np.testing.assert_allclose(
            [row["r"], row["p"], row["2.5 %"], row["97.5 %"]],
            [expected.statistic, expected.pvalue, *ends],
            rtol=1e-8,
        )
    assert [row[i + 1] for i, row in enumerate(matrix.rows)] == [1.0, 1.0, 1.0]


def test_components_are_scikit_learns(site: TableFleet) -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", reason="the oracle")
    variances, loadings = site.ask("pca(age, bmi, number)").tables
    raw = np.stack([column(name) for name in ("age", "bmi", "number")], 1)
    expected = decomposition.PCA().fit((raw - raw.mean(0)) / raw.std(0, ddof=1))
    np.testing.assert_allclose(
        [row["variance"] for row in records(variances)], expected.explained_variance_, rtol=1e-8
    )
    found = np.array([row[1:] for row in loadings.rows], float).T
    np.testing.assert_allclose(abs(found), abs(expected.components_), rtol=1e-8)


def test_a_histogram_has_round_edges_and_all_counts(site: TableFleet) -> None:
    found = site.ask("hist(age, bins=8)")
    below, *bins, above = records(found.tables[0])
    edges = [row["from"] for row in bins] + [bins[-1]["to"]]
    assert {round(high - low, 9) for low, high in itertools.pairwise(edges)} == {20.0}
    assert edges[0] % 20 == 0
    counts = np.histogram(column("age"), edges)[0]
    # Few rows of a peer, at the ends, count in another bin or in none.
    assert max(abs(row["rows"] - n) for row, n in zip(bins, counts, strict=True)) < 20
    assert len(column("age")) - 20 <= sum(row["rows"] for row in bins) <= len(column("age"))
    assert len(found.plot) == 8
    assert below["from"] is None
    assert above["to"] is None


def test_table_1_has_all_columns_by_group(site: TableFleet) -> None:
    found = site.ask("table1(by=sex)")
    rows = {(row["column"], row["value"]): row for row in records(found.tables[0])}
    women, men = (column("age", sex=sex) for sex in ("f", "m"))
    assert rows["rows", ""]["sex = f"] == len(women)
    mean, deviation = women.mean(), women.std(ddof=1)
    assert rows["age", ""]["sex = f"] == f"{mean:.6g} ({deviation:.4g})"
    everybody = column("age")
    assert rows["age", ""]["all"] == f"{everybody.mean():.6g} ({everybody.std(ddof=1):.4g})"
    assert rows["age", ""]["p"] == pytest.approx(stats.f_oneway(women, men).pvalue, rel=1e-8)
    smokers = len(column("age", sex="m", smoker=1))
    assert rows["smoker", "1"]["sex = m"] == f"{smokers} ({100 * smokers / len(men):.1f} %)"
    assert {key for key, _ in rows} == {"rows", "age", "bmi", "smoker", "city", "number", "income"}
    assert "(" in rows["income", ""]["all"], "numbers are no categories because some are frequent"
    chosen = site.ask("table1(city, by=sex)", "age > 60")
    assert {row[0] for row in chosen.tables[0].rows} == {"rows", "city"}


def test_peers_that_refuse_a_later_question_are_left_out_of_all(tmp_path: Path) -> None:
    site = TableFleet(tmp_path, [ROWS[:200], ROWS[200:400], ROWS[400:]])
    peer = site.peers["p1"]
    peer.owner = msgspec.structs.replace(peer.owner, analyze_operations=("var",))
    found = site.ask("hist(age)")
    assert found.label == "2 of 3 peers, 400 rows"
    assert found.left_out == {"p1": "the owner does not let histogram be asked"}
    assert site.questions[0] == site.questions[2] == "var(age)"


def test_an_old_agent_is_named_as_such() -> None:
    words = "not a valid question: Invalid enum value 'glm' - at `$.operations[0].kind`"
    assert explain_refusal(words).startswith("this agent is too old for glm")
    words = words.replace("glm", "levels")
    assert explain_refusal(words, "table1").startswith("this agent is too old for table1")
    assert explain_refusal("the owner does not let glm be asked") == (
        "the owner does not let glm be asked"
    )


@pytest.mark.parametrize("name", FORMS)
def test_each_example_is_read(name: str) -> None:
    for example in FORMS[name].example.replace(", meta(", " or meta(").split(" or "):
        method = parse_method(example, "age > 3 and city == 'by x)'")
        assert method is not None
        assert method.name == name
        assert len(method.where) == 2


@pytest.mark.parametrize(
    "wrong",
    ["ttest(age)", "ttest(age, by sex)", "ttest(age by sex", "chi2(a)", "chi2(a, a)", "hist(a, b)",
     "ttest(age by age)", "ttest(x by g), count", "corr(a, b, c, d, e, f, g, h, i)",
     "table1(age)", "hist(a, bins=3, color=2)", "ttest(__import__('os') by g)"],
)  # fmt: skip
def test_what_is_no_method_is_refused(wrong: str) -> None:
    with pytest.raises(UsageError):
        parse_method(wrong)


@pytest.mark.parametrize("query", ["count", "corr(a, b)", "corr(a, b), mean(c)", "mean(hist)"])
def test_statistics_are_no_methods(query: str) -> None:
    assert parse_method(query) is None


def test_a_column_without_variation_is_an_error(tmp_path: Path) -> None:
    rows = [row | {"same": 1.5} for row in ROWS[:100]]
    site = TableFleet(tmp_path, [rows])
    with pytest.raises(CannotBeMet):
        site.ask("ttest(same by sex)")
    with pytest.raises(CannotBeMet):
        site.ask("corr(same, age, bmi)")


@pytest.mark.parametrize("df", [1, 2, 5, 30, 1000, 1e6])
@pytest.mark.parametrize("x", [1e-9, 0.01, 0.7, 1.0, 3.0, 40.0, 900.0])
def test_probabilities_are_scipys(x: float, df: float) -> None:
    np.testing.assert_allclose(distributions.normal_p(x / 30), 2 * stats.norm.sf(x / 30))
    near: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-300}
    np.testing.assert_allclose(distributions.t_p(x, df), 2 * stats.t.sf(x, df), **near)
    np.testing.assert_allclose(distributions.f_p(x, 3, df), stats.f.sf(x, 3, df), **near)
    near["atol"] = 1e-15
    np.testing.assert_allclose(distributions.chi2_p(x, df), stats.chi2.sf(x, df), **near)
    np.testing.assert_allclose(distributions.t_quantile(0.975, df), stats.t.ppf(0.975, df))


def test_tables_as_csv_and_latex() -> None:
    tables = [make_table(("a_1", "p"), [("=1+1", 0.1234567890123), ("x & y", float("nan"))])] * 2
    assert to_csv(tables)[:4] == ["a_1,p", "'=1+1,0.1234567890123", "x & y,", ""]
    lines = to_latex(tables)
    assert lines[:2] == [r"\begin{tabular}{lr}", r"\toprule"]
    assert r"a\_1 & p \\" in lines
    assert r"x \& y & -- \\" in lines
    assert json.loads(json.dumps(msgspec.to_builtins(tables[0])))["rows"][1] == ["x & y", None]


def test_time_bins_are_as_full_as_possible() -> None:
    """More bins have fewer rows each; a bin may have no row without the event, but not few."""
    events = (40, 30, 20, 20, 10, 10, 5, 5)
    censored = (0, 0, 3, 10, 20, 20, 30, 40)
    state = SurvivalState(tuple(map(float, range(1, 8))), events, censored)
    assert choose_edges(state, 2) == (2.0,)
    for bins in (2, 3, 4):
        edges = choose_edges(state, bins)
        coarse = coarsen(state, edges)
        assert len(edges) + 1 >= bins
        assert all(n == 0 or n >= 10 for n in (*coarse.events, *coarse.censored))
