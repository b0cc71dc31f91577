"""The walk-through of docs/clinic.md: what its questions find equals the same over all rows."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.cli.demo import trial_tables
from coordinator.jobs.methods.results import Statistics
from tests.docs import pages
from tests.support.table_peers import TableFleet, TablePeer, records

pd = pytest.importorskip("pandas")
lifelines = pytest.importorskip("lifelines")

PAGE = pages.ROOT / "docs" / "clinic.md"
#: What the owners set in the page, by clinic.
SETTINGS: dict[str, dict[str, Any]] = {
    "lund": {"data_values": {"smoker": {"NO": "0", "YES": "1"}}},
    "turku": {"data_formats": {"bmi": "1.234,5", "time": "1.234,5"}},
}


def question(method: str) -> str:
    """The question of the page that asks for a method."""
    lines = [line for block in pages.blocks_of(PAGE) for line in block.lines]
    (found,) = [line for line in lines if line.startswith(f'commonweight analyze "{method}(')]
    return found.split('"')[1]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trial")
    trial_tables.write(folder)
    return folder


@pytest.fixture(scope="module")
def site(trial: Path) -> TableFleet:
    fleet = TableFleet(trial, [])
    for name in trial_tables.CLINICS:
        fleet.peers[name] = TablePeer(trial / name, trial / f"{name}.csv", **SETTINGS.get(name, {}))
    return fleet


@pytest.fixture(scope="module")
def frame(trial: Path) -> pd.DataFrame:
    """All rows together, as a person reads them without the product."""
    bergen = pd.read_csv(trial / "bergen.csv")
    lund = pd.read_csv(trial / "lund.csv").replace({"smoker": {"YES": 1.0, "NO": 0.0}})
    turku = pd.read_csv(trial / "turku.csv", sep=";", decimal=",")
    return pd.concat([bergen, lund, turku], ignore_index=True).astype({"smoker": float})


@pytest.fixture(scope="module")
def found(site: TableFleet) -> dict[str, Statistics]:
    """What the questions of the page find, in their order: the time bins depend on it."""
    answers = {method: site.ask(question(method)) for method in ("table1", "km", "cox")}
    assert all(answer.left_out == {} for answer in answers.values())
    return answers


def test_table_1(found: dict[str, Statistics], frame: pd.DataFrame) -> None:
    rows = {(row["column"], row["value"]): row for row in records(found["table1"].tables[0])}
    for group, theirs in (("all", frame), *frame.groupby("treatment")):
        title = group if group == "all" else f"treatment = {group}"
        assert rows["rows", ""][title] == len(theirs)
        for name in ("age", "bmi"):
            mean, deviation = map(float, re.findall(r"[\d.]+", rows[name, ""][title]))
            assert mean == pytest.approx(theirs[name].mean(), abs=0.02)
            assert deviation == pytest.approx(theirs[name].std(), abs=0.02)
        count = int(rows["sex", "male"][title].split()[0])
        assert count == (theirs["sex"] == "male").sum()


def test_survival(found: dict[str, Statistics], frame: pd.DataFrame) -> None:
    curves, _, test = found["km"].tables
    edges = sorted({row["from"] for row in records(curves)})[1:]
    time = np.searchsorted(edges, frame["time"], side="right") + 1
    for group, theirs in frame.groupby("treatment"):
        rows = [row for row in records(curves) if row["treatment"] == group]
        curve = lifelines.KaplanMeierFitter().fit(time[theirs.index], theirs["event"])
        expected = curve.predict(range(1, len(rows) + 1))
        np.testing.assert_allclose([row["survival"] for row in rows], expected, rtol=1e-8)
    expected = lifelines.statistics.multivariate_logrank_test(
        time, frame["treatment"], frame["event"]
    )
    assert records(test)[0]["p"] == pytest.approx(expected.p_value, rel=1e-8)


def test_hazard_ratios_as_the_page_shows_them(
    found: dict[str, Statistics], frame: pd.DataFrame
) -> None:
    coefficients, _, bins = found["cox"].tables
    edges = [row["from"] for row in records(bins)][1:]
    columns = pd.DataFrame(
        {
            "age": frame["age"],
            "sex[male]": (frame["sex"] == "male").astype(float),
            "treatment[drug]": (frame["treatment"] == "drug").astype(float),
            "time": np.searchsorted(edges, frame["time"], side="right") + 1,
            "event": frame["event"],
        }
    )
    expected = lifelines.CoxPHFitter().fit(
        columns, "time", "event", fit_options={"precision": 1e-13, "r_precision": 1e-16}
    )
    page = PAGE.read_text().partition("hazard ratio\n")[2]
    for row in records(coefficients):
        theirs = expected.summary.loc[row["term"]]
        assert row["coef"] == pytest.approx(theirs["coef"], rel=1e-8)
        assert row["SE"] == pytest.approx(theirs["se(coef)"], rel=1e-8)
        (shown,) = re.findall(rf"^{re.escape(row['term'])} .* ([\d.]+)$", page, re.MULTILINE)
        assert float(shown) == pytest.approx(theirs["exp(coef)"], rel=1e-5)
