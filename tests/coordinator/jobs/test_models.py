"""Models over three peers' tables, beside formulas and scipy. tests/extras has statsmodels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.jobs.methods.glm import MAX_STEPS
from protocols.errors import CannotBeMet
from tests.support.table_peers import TableFleet, records

pytest.importorskip("pyarrow", reason="tables are read by the extra analyze")
stats = pytest.importorskip("scipy.stats", reason="the oracle")


def patients(count: int = 900, seed: int = 8) -> list[dict[str, Any]]:
    chance = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for _ in range(count):
        age, drug = float(chance.integers(40, 80)), str(chance.choice(["no", "yes"]))
        risk = 0.03 * (age - 60) - 0.6 * (drug == "yes")
        time, end = chance.exponential(20 * math.exp(-risk)), chance.uniform(6, 60)
        rows.append(
            {
                "age": age,
                "drug": drug,
                "ill": int(chance.random() < 1 / (1 + math.exp(-risk))),
                "months": round(float(min(time, end)), 2),
                "died": int(time <= end),
            }
        )
    return rows


ROWS = patients()


@pytest.fixture
def site(tmp_path: Path) -> TableFleet:
    return TableFleet(tmp_path, [ROWS[:250], ROWS[250:550], ROWS[550:]])


def test_a_logistic_model_of_two_groups_is_an_odds_ratio(site: TableFleet) -> None:
    found = site.ask("glm(ill ~ drug, family=binomial)")
    counts = {
        (drug, ill): sum(row["drug"] == drug and row["ill"] == ill for row in ROWS)
        for drug in ("no", "yes")
        for ill in (0, 1)
    }
    base = math.log(counts["no", 1] / counts["no", 0])
    ratio = math.log(counts["yes", 1] / counts["yes", 0]) - base
    intercept, drug = records(found.tables[0])
    assert [intercept["coef"], drug["coef"]] == pytest.approx([base, ratio], rel=1e-9)
    assert drug["SE"] == pytest.approx(math.sqrt(sum(1 / n for n in counts.values())), rel=1e-9)
    assert drug["term"] == "drug[yes]"
    assert drug["odds ratio"] == pytest.approx(math.exp(ratio))
    assert len(site.questions) < MAX_STEPS
    assert found.left_out == {}
    assert found.label == "3 of 3 peers, 900 rows"
    assert "drug: compared with no." in found.notes


def test_a_linear_model_is_least_squares(site: TableFleet) -> None:
    found = site.ask("glm(months ~ age + C(died))")
    x = np.array([[1.0, row["age"], row["died"]] for row in ROWS])
    y = np.array([row["months"] for row in ROWS])
    expected = np.linalg.lstsq(x, y, rcond=None)[0]
    np.testing.assert_allclose([r["coef"] for r in records(found.tables[0])], expected, rtol=1e-9)


def test_survival_is_scipys_in_the_same_bins(site: TableFleet) -> None:
    table, summary, test = site.ask("km(months, died by drug)").tables
    edges = sorted({row["from"] for row in records(table)} - {0.0})
    assert len(edges) >= 2
    place = np.searchsorted(edges, [row["months"] for row in ROWS], side="right") + 1
    groups = {}
    for drug in ("no", "yes"):
        chosen = np.array([row["drug"] == drug for row in ROWS])
        died = np.array([bool(row["died"]) for row in ROWS])
        groups[drug] = stats.CensoredData.right_censored(place[chosen], ~died[chosen])
        curve = stats.ecdf(groups[drug]).sf
        rows = [row for row in records(table) if row["drug"] == drug]
        np.testing.assert_allclose(
            [row["survival"] for row in rows],
            curve.evaluate(np.arange(1, len(edges) + 2)),
            rtol=1e-9,
        )
    expected = stats.logrank(groups["no"], groups["yes"])
    (row,) = records(test)
    np.testing.assert_allclose(
        [row["log-rank chi2"], row["p"]], [expected.statistic**2, expected.pvalue], rtol=1e-8
    )
    assert [row["rows"] for row in records(summary)] == [
        sum(row["drug"] == drug for row in ROWS) for drug in ("no", "yes")
    ]


def test_a_cox_model_has_the_greatest_likelihood(site: TableFleet) -> None:
    found = site.ask("cox(months, died ~ age + drug)")
    coefficients, fit, bins = (records(table) for table in found.tables)
    edges = [row["from"] for row in bins][1:]
    assert found.left_out == {}
    assert edges
    place = np.searchsorted(edges, [row["months"] for row in ROWS], side="right")
    died = np.array([row["died"] for row in ROWS])
    x = np.array([[row["age"], row["drug"] == "yes"] for row in ROWS], float)

    def likelihood(at: np.ndarray[Any, Any]) -> float:
        """Efron's, row by row."""
        risk, total = np.exp(x @ at), 0.0
        for number in range(len(edges) + 1):
            tied = (place == number) & (died == 1)
            total += float((x[tied] @ at).sum())
            for step in range(tied.sum()):
                rest = risk[place >= number].sum() - step / tied.sum() * risk[tied].sum()
                total -= math.log(rest)
        return total

    at = np.array([row["coef"] for row in coefficients])
    best = likelihood(at)
    assert fit[0]["log-likelihood"] == pytest.approx(best, rel=1e-10)
    ratio = 2 * (best - likelihood(np.zeros(2)))
    assert fit[0]["likelihood ratio"] == pytest.approx(ratio, rel=1e-8)
    for step in np.diag([row["SE"] * 1e-3 for row in coefficients]):
        assert max(likelihood(at + step), likelihood(at - step)) < best


def test_a_meta_analysis_needs_consent_and_pools_the_peers(
    site: TableFleet, tmp_path: Path
) -> None:
    with pytest.raises(CannotBeMet, match="fewer than two"):
        site.ask("meta(age)")
    allowed = {"analyze_operations": ("*", "estimates")}
    parts = [ROWS[:250], ROWS[250:550], ROWS[550:]]
    site = TableFleet(tmp_path / "allowed", parts, **allowed)
    found = site.ask("meta(age by drug)")
    (row,), peers = (records(table) for table in found.tables)
    estimates, variances = [], []
    for part, peer in zip(parts, peers, strict=True):
        no, yes = (
            np.array([row["age"] for row in part if row["drug"] == drug]) for drug in ("no", "yes")
        )
        estimates.append(no.mean() - yes.mean())
        variances.append(no.var(ddof=1) / len(no) + yes.var(ddof=1) / len(yes))
        assert peer["estimate"] == pytest.approx(estimates[-1], rel=1e-9)
        assert peer["SE"] == pytest.approx(math.sqrt(variances[-1]), rel=1e-9)
    weights = 1 / (np.array(variances) + row["tau2"])
    assert row["estimate"] == pytest.approx(np.average(estimates, weights=weights), rel=1e-9)
    assert row["SE"] == pytest.approx(weights.sum() ** -0.5, rel=1e-9)
    assert [peer["peer"] for peer in peers] == ["p0", "p1", "p2"]
    assert len(found.plot) == 5
    (odds,), _ = (records(table) for table in site.ask("meta(ill by drug, measure=odds)").tables)
    assert odds["estimate"] > 0


def test_what_has_no_answer_is_said(site: TableFleet) -> None:
    with pytest.raises(CannotBeMet, match="all alike"):
        site.ask("glm(ill ~ age, family=binomial)", "ill == 1")
    with pytest.raises(CannotBeMet, match="does not allow"):
        site.ask("glm(age ~ died, family=binomial)")


def test_peers_name_why_they_do_not_fit(tmp_path: Path) -> None:
    site = TableFleet(tmp_path, [ROWS[:20], ROWS[20:500], ROWS[500:]])
    found = site.ask("glm(ill ~ age + drug, family=binomial)")
    assert list(found.left_out) == ["p0"]
    assert "2 of 3 peers, 880 rows" in found.label
