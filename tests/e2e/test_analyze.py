"""Questions to real agents with tables of their own, through the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.fleet_harness import fleet

pytest.importorskip("pyarrow", reason="tables are read by the extra analyze")


def table(file: Path, rows: int, seed: int) -> list[dict[str, object]]:
    chance = np.random.default_rng(seed)
    made: list[dict[str, object]] = [
        {"age": int(chance.integers(1, 90)), "sex": str(chance.choice(["f", "m"]))}
        for _ in range(rows)
    ]
    with file.open("w", newline="") as out:
        writer = csv.DictWriter(out, ["age", "sex"])
        writer.writeheader()
        writer.writerows(made)
    return made


@pytest.mark.long
def test_a_question_goes_to_all_and_each_owner_decides(tmp_path: Path) -> None:
    rows = []
    with fleet(tmp_path) as site:
        site.up()
        site.join("ann", "bob", "cyd")
        for number, name in enumerate(("ann", "bob", "cyd")):
            file = tmp_path / f"{name}.csv"
            made = table(file, 40 + 30 * number, number)
            rows += made if name != "cyd" else []
            assert site.ask_agent(name, "policy", "set", "data", str(file)).returncode == 0
            if name != "cyd":
                assert site.ask_agent(name, "policy", "set", "analyze", "on").returncode == 0
        site.start("ann", "bob", "cyd")
        told = site.data("analyze", "count, mean(age) by sex", "--where", "age < 60")["answer"]
        for group in told["groups"]:
            ages = [
                float(str(row["age"]))
                for row in rows
                if row["sex"] == group["group"][0] and int(str(row["age"])) < 60
            ]
            assert group["figures"] == [len(ages), pytest.approx(np.mean(ages), rel=1e-12)]
        assert (told["peers"], told["asked"]) == (2, 3)
        assert "lets nobody ask" in next(iter(told["left_out"].values()))
        # What is wrong with a question is told before anybody is asked, or by the peers.
        wrong = site.ask("analyze", "maen(age)")
        assert wrong.returncode == 2
        assert "did you mean mean" in wrong.stderr
        nobody = site.ask("analyze", "mean(agee)")
        assert nobody.returncode == 1
        assert "no peer has answered" in nobody.stderr
        listed = site.ask_agent("ann", "questions", "list", "--json")
        answers = json.loads(listed.stdout)["data"]["answers"]
        assert answers[0]["question"].startswith("count, mean(age) by sex")
        jobs = site.data("job", "list")
        assert len(jobs) == 2
        for name in ("ann", "bob", "cyd"):
            assert "unexpected error" not in site.programs[name].log
