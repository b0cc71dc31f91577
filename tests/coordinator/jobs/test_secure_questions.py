"""Secure questions to three agents with tables: the same figures as without --secure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protocols.errors import CommonweightError, UsageError
from tests.support.secure_tables import SecureTables
from tests.support.table_peers import TableFleet

pytest.importorskip("pyarrow", reason="tables are read by the extra analyze")


def patients(count: int = 1800, seed: int = 4) -> list[dict[str, Any]]:
    chance = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        age, sex = round(float(chance.normal(60, 12)), 1), str(chance.choice(["f", "m"]))
        months = float(chance.exponential(60 if sex == "f" else 40))
        rows.append(
            {
                "age": age,
                "bmi": round(float(chance.normal(26, 4)), 2),
                "sex": sex,
                "smoker": int(chance.random() < 0.4),
                "city": str(chance.choice(["Bergen", "Oslo", "Tromsø"])),
                "born": 1.7e9 + float(chance.normal(0, 1e5)),
                "months": round(min(months, 60.0), 1),
                "died": int(months < 60),
                "ill": int(chance.random() < 1 / (1 + math.exp(-(age - 60) / 10))),
            }
        )
    return rows


ROWS = patients()
PARTS = [ROWS[0::3], ROWS[1::3], ROWS[2::3]]
QUICK = ["ttest(age by sex)", "chi2(sex, smoker)", "km(months, died by sex)"]
SLOW = [
    "anova(bmi by city)",
    "corr(age, bmi, born)",
    "pca(age, bmi, born)",
    "hist(age)",
    "table1(by=sex)",
    "glm(ill ~ age + C(city), family=binomial)",
    "cox(months, died ~ age + C(sex))",
]
METHODS = [*QUICK, *(pytest.param(text, marks=pytest.mark.long) for text in SLOW)]


def close(found: Any, expected: Any) -> bool:
    if isinstance(found, float) and isinstance(expected, float):
        return math.isclose(found, expected, rel_tol=1e-7, abs_tol=1e-9)
    return bool(found == expected)


@pytest.mark.parametrize("text", METHODS)
def test_a_method_finds_the_same_with_secure_sums(text: str, tmp_path: Path) -> None:
    plain = TableFleet(tmp_path / "plain", PARTS).ask(text)
    fleet = SecureTables(tmp_path / "secure", PARTS)
    found = fleet.method(text)
    assert found.label.startswith("3 of 3 peers, 1,800 rows")
    assert "secure sums of 3 peers, each off by at most 4e-39" in found.label
    for table, other in zip(found.tables, plain.tables, strict=True):
        assert table.columns == other.columns
        for row, expected in zip(table.rows, other.rows, strict=True):
            if text == "hist(age)" and row[-1] == 0:  # a bin of fewer peers than a sum has
                assert expected[-1] < 0.05 * len(ROWS)
                continue
            assert all(map(close, row, expected)), (row, expected)


def test_statistics_are_those_over_all_rows(tmp_path: Path) -> None:
    fleet = SecureTables(tmp_path, PARTS)
    text = "count, missing(age), sum(age), mean(born), var(born), std(age), cov(age, bmi), "
    found = fleet.ask(text + "corr(age, born), histogram(age, 4, 40, 80), levels(city) by sex")
    for group in found.groups:
        rows = [row for row in ROWS if row["sex"] == group.group[0]]
        age, bmi, born = (np.array([row[c] for row in rows]) for c in ("age", "bmi", "born"))
        counts, _ = np.histogram(age, 4, (40, 80))
        cities = [row["city"] for row in rows]
        assert group.figures[:2] == (len(rows), 0)
        assert group.figures[2:8] == (
            pytest.approx(age.sum(), rel=1e-13),
            pytest.approx(born.mean(), rel=1e-13),
            pytest.approx(born.var(ddof=1), rel=1e-9),
            pytest.approx(age.std(ddof=1), rel=1e-12),
            pytest.approx(np.cov(age, bmi)[0, 1], rel=1e-12),
            pytest.approx(np.corrcoef(age, born)[0, 1], rel=1e-8),
        )
        assert group.figures[8]["counts"] == counts.tolist()  # type: ignore[index, call-overload]
        assert group.figures[9] == {"counts": {c: cities.count(c) for c in sorted(set(cities))}}
    assert (found.peers, found.asked, found.rows) == (3, 3, 1800)


@pytest.mark.parametrize(
    "text", ["quantile(age, 0.5)", "distinct(sex)", "max(age)", "histogram(age, 5)"]
)
def test_what_has_no_sums_is_refused_in_words(text: str, tmp_path: Path) -> None:
    fleet = SecureTables(tmp_path, PARTS)
    with pytest.raises(UsageError, match="has no answer with --secure"):
        fleet.ask(text)
    assert not fleet.seen


def test_two_peers_have_no_secure_sum(tmp_path: Path) -> None:
    fleet = SecureTables(tmp_path, PARTS)
    fleet.online.discard(fleet.ids[0])
    with pytest.raises(CommonweightError, match="a secure sum needs 3"):
        fleet.ask("mean(age)")


def test_a_sum_survives_a_peer_that_goes_away(tmp_path: Path) -> None:
    """Of four peers, one goes after it has shared its keys."""
    fleet = SecureTables(tmp_path, [*PARTS, patients(200, 9)])
    gone = fleet.ids[3]

    def reply(step: str, peer: str, asked: object) -> None:
        if (step, peer) == ("mask", gone):
            raise CommonweightError("no answer in time")

    fleet.reply = reply
    found = fleet.ask("mean(age)")
    assert (found.peers, found.asked, found.rows) == (3, 4, 1800)
    assert found.groups[0].figures[0] == pytest.approx(
        np.mean([row["age"] for row in ROWS]), rel=1e-13
    )
    assert found.left_out == {gone: "no answer in time"}


def test_a_refusal_names_no_column_of_earlier_questions(tmp_path: Path) -> None:
    alone = [row | {"city": "Vardø"} if n < 60 else row for n, row in enumerate(PARTS[0])]
    fleet = SecureTables(tmp_path, [alone, *PARTS[1:]])
    for text in ("levels(smoker)", "levels(sex)", "sum(bmi)"):
        fleet.ask(text)
    with pytest.raises(CommonweightError, match="its numbers of rows from earlier ones") as refused:
        fleet.ask("sum(age)", "city != 'Vardø'")
    assert "column" not in refused.value.message
