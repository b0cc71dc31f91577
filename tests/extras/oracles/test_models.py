"""Models over three peers' tables: equal to statsmodels and lifelines on the rows together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.jobs.methods.meta import pool
from tests.support.table_peers import TableFleet, records

pd = pytest.importorskip("pandas")
sm = pytest.importorskip("statsmodels.api")
smf = pytest.importorskip("statsmodels.formula.api")


def patients(count: int = 2400, seed: int = 8) -> list[dict[str, Any]]:
    chance = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        age, bmi = chance.normal(62, 11), chance.normal(26, 4)
        sex, treatment = chance.choice(["f", "m"]), chance.choice(["control", "drug a", "drug b"])
        risk = 0.03 * (age - 62) + 0.4 * (sex == "m") - 0.5 * (treatment == "drug b")
        time = chance.exponential(24 * np.exp(-risk))
        end = chance.uniform(6, 60)
        rows.append(
            {
                "age": round(age, 1),
                "bmi": round(bmi, 2),
                "sex": str(sex),
                "treatment": str(treatment),
                "outcome": int(chance.random() < 1 / (1 + np.exp(-risk))),
                "visits": int(chance.poisson(np.exp(0.8 + 0.5 * risk))),
                "cost": round(float(chance.gamma(2.0, np.exp(5 + 0.3 * risk))), 2),
                "months": round(float(min(time, end)), 3),
                "died": int(time <= end),
            }
        )
    return rows


ROWS = patients()


@pytest.fixture
def site(tmp_path: Path) -> TableFleet:
    return TableFleet(tmp_path, [ROWS[:750], ROWS[750:1550], ROWS[1550:]])


@pytest.mark.parametrize(
    ("outcome", "family", "options"),
    [
        ("bmi", "gaussian", ""),
        ("outcome", "binomial", ""),
        ("visits", "poisson", ""),
        ("cost", "gamma", ", link=log"),
        ("cost", "gamma", ""),
        ("cost", "gaussian", ", link=log"),
    ],
)
def test_a_generalized_linear_model(
    site: TableFleet, outcome: str, family: str, options: str
) -> None:
    terms = "age + C(sex) + C(treatment)"
    found = site.ask(f"glm({outcome} ~ {terms}, family={family}{options})")
    families = sm.families
    links = {", link=log": {"link": families.links.Log()}}.get(options, {})
    known = {"gaussian": "Gaussian", "gamma": "Gamma", "binomial": "Binomial", "poisson": "Poisson"}
    kind = getattr(families, known[family])(**links)
    expected = smf.glm(f"{outcome} ~ {terms}", pd.DataFrame(ROWS), family=kind)
    expected = expected.fit(tol=1e-13, maxiter=200, tol_criterion="params")
    order = ["Intercept", "age", "C(sex)[T.m]", *(f"C(treatment)[T.drug {x}]" for x in "ab")]
    ends = expected.conf_int().loc[order]
    wanted = np.stack(
        [
            expected.params[order], expected.bse[order], expected.tvalues[order],
            expected.pvalues[order], ends[0], ends[1],
        ],
        1,
    )  # fmt: skip
    got = np.array([row[1:7] for row in found.tables[0].rows], float)
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-12)
    (fit,) = records(found.tables[1])
    np.testing.assert_allclose(
        [fit["deviance"], fit["Pearson chi2"], fit["scale"], fit["log-likelihood"], fit["AIC"]],
        [expected.deviance, expected.pearson_chi2, expected.scale, expected.llf, expected.aic],
        rtol=1e-8,
    )
    np.testing.assert_allclose(fit["null deviance"], expected.null_deviance, rtol=1e-8)
    if family in ("binomial", "poisson"):
        wanted = expected.pseudo_rsquared(kind="mcf")
        np.testing.assert_allclose(fit["pseudo R²"], wanted, rtol=1e-8)
    elif family == "gaussian" and not options:
        wanted = 1 - expected.deviance / expected.null_deviance
        np.testing.assert_allclose(fit["R²"], wanted, rtol=1e-8)
    else:
        assert fit["pseudo R²"] is None
    assert fit["rows"] == len(ROWS)
    assert len(site.questions) <= 12


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("age * bmi + sex", "age * bmi + sex"),
        ("age * sex", "age * sex"),
        ("age + sex + treatment + sex:treatment", "age + sex + treatment + sex:treatment"),
        ("age * sex + age:treatment + treatment", "age * sex + age:treatment + treatment"),
    ],
)
@pytest.mark.parametrize("family", ["binomial", "gaussian"])
def test_interactions(site: TableFleet, text: str, formula: str, family: str) -> None:
    outcome = {"binomial": "outcome", "gaussian": "cost"}[family]
    found = site.ask(f"glm({outcome} ~ {text}, family={family})")
    kind = {"binomial": sm.families.Binomial(), "gaussian": sm.families.Gaussian()}[family]
    expected = smf.glm(f"{outcome} ~ {formula}", pd.DataFrame(ROWS), family=kind)
    expected = expected.fit(tol=1e-13, maxiter=200, tol_criterion="params")
    assert found.left_out == {}
    rows = records(found.tables[0])
    assert len(rows) == len(expected.params)
    for row in rows:
        name = row["term"].replace("intercept", "Intercept").replace("[", "[T.")
        np.testing.assert_allclose(
            [row["coef"], row["SE"], row["p"]],
            [expected.params[name], expected.bse[name], expected.pvalues[name]],
            rtol=1e-8,
            atol=1e-12,
        )
    (fit,) = records(found.tables[1])
    np.testing.assert_allclose(fit["deviance"], expected.deviance, rtol=1e-8)


def test_interactions_in_a_cox_model(site: TableFleet) -> None:
    lifelines = pytest.importorskip("lifelines")
    found = site.ask("cox(months, died ~ age * sex)")
    edges = [row["from"] for row in records(found.tables[2])][1:]
    frame = pd.DataFrame(ROWS)
    male = (frame["sex"] == "m").astype(float)
    design = pd.DataFrame({"age": frame["age"], "sex[m]": male, "age:sex[m]": frame["age"] * male})
    design["time"] = np.searchsorted(edges, frame["months"], side="right") + 1
    design["died"] = frame["died"]
    fitter = lifelines.CoxPHFitter()
    fitter.fit(design, "time", "died", fit_options={"precision": 1e-12})
    for row in records(found.tables[0]):
        np.testing.assert_allclose(row["coef"], fitter.params_[row["term"]], rtol=1e-7, atol=1e-10)
        np.testing.assert_allclose(
            row["SE"], fitter.standard_errors_[row["term"]], rtol=1e-7, atol=1e-10
        )


def bins_of(table: Any) -> np.ndarray[Any, Any]:
    """The number of each row's time bin, from 1, by the bins of a table of survival."""
    edges = sorted({row["from"] for row in records(table)} - {0.0})
    return np.searchsorted(edges, [row["months"] for row in ROWS], side="right") + 1


def test_survival_curves_and_the_log_rank_test(site: TableFleet) -> None:
    lifelines = pytest.importorskip("lifelines")
    found = site.ask("km(months, died by treatment)")
    table, summary, test = found.tables
    time, frame = bins_of(table), pd.DataFrame(ROWS)
    assert time.max() >= 3
    for group in ("control", "drug a", "drug b"):
        rows = [row for row in records(table) if row["treatment"] == group]
        chosen = (frame["treatment"] == group).to_numpy()
        curve = lifelines.KaplanMeierFitter().fit(time[chosen], frame["died"][chosen])
        places = range(1, time.max() + 1)
        np.testing.assert_allclose(
            [row["survival"] for row in rows], curve.predict(places), rtol=1e-8
        )
        ends = curve.confidence_interval_.loc[1:].to_numpy()
        got = [[row["2.5 %"], row["97.5 %"]] for row in rows]
        np.testing.assert_allclose(got, ends, rtol=1e-8)
    assert [row["rows"] for row in records(summary)] == (frame.groupby("treatment").size().tolist())
    expected = lifelines.statistics.multivariate_logrank_test(
        time, frame["treatment"], frame["died"]
    )
    (row,) = records(test)
    np.testing.assert_allclose(
        [row["log-rank chi2"], row["p"]],
        [expected.test_statistic, expected.p_value],
        rtol=1e-8,
    )
    assert len(found.plot) == 16


def test_a_cox_model(site: TableFleet) -> None:
    lifelines = pytest.importorskip("lifelines")
    found = site.ask("cox(months, died ~ age + sex + treatment)")
    coefficients, fit, bins = found.tables
    edges = [row["from"] for row in records(bins)][1:]
    assert len(edges) >= 2
    assert found.left_out == {}
    frame = pd.DataFrame(
        {
            "age": [row["age"] for row in ROWS],
            "m": [float(row["sex"] == "m") for row in ROWS],
            "a": [float(row["treatment"] == "drug a") for row in ROWS],
            "b": [float(row["treatment"] == "drug b") for row in ROWS],
            "time": np.searchsorted(edges, [row["months"] for row in ROWS], side="right") + 1,
            "died": [row["died"] for row in ROWS],
        }
    )
    expected = lifelines.CoxPHFitter().fit(
        frame, "time", "died", fit_options={"precision": 1e-13, "r_precision": 1e-16}
    )
    summary = expected.summary[["coef", "se(coef)", "z", "p"]].to_numpy()
    got = np.array([row[1:5] for row in coefficients.rows], float)
    np.testing.assert_allclose(got, summary, rtol=1e-8, atol=1e-12)
    (row,) = records(fit)
    likelihood = [expected.log_likelihood_, expected.log_likelihood_ratio_test().test_statistic]
    np.testing.assert_allclose([row["log-likelihood"], row["likelihood ratio"]], likelihood, 1e-8)
    binned = sm.PHReg(frame["time"], frame[["age", "m", "a", "b"]], frame["died"], ties="efron")
    np.testing.assert_allclose(got[:, 0], binned.fit().params, rtol=1e-5)


def test_a_meta_analysis() -> None:
    analysis = pytest.importorskip("statsmodels.stats.meta_analysis")
    variances = [0.04, 0.02, 0.03, 0.09]
    for estimates, model in (([0.3, 0.9, -0.2, 0.5], "re"), ([0.3, 0.31, 0.29, 0.3], "fe")):
        mine = pool(estimates, variances)
        theirs = analysis.combine_effects(np.array(estimates), np.array(variances), "dl")
        # Peers that differ less than by chance have the fixed-effect estimate.
        expected = [getattr(theirs, f"{name}_{model}") for name in ("mean_effect", "sd_eff_w")]
        expected += [max(0, theirs.tau2), theirs.q, max(0, theirs.i2)]
        found = [mine.estimate, mine.error, mine.tau2, mine.q, mine.i2]
        np.testing.assert_allclose(found, expected, rtol=1e-8)
