"""Questions to real agents with tables of their own, through the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

import commonweight as cw
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
        assert "allows no questions" in next(iter(told["left_out"].values()))
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


@pytest.mark.long
def test_methods_ask_three_agents(tmp_path: Path) -> None:
    """Several questions of a method, through the command line and from Python."""
    chance = np.random.default_rng(3)
    rows = [
        {
            "age": int(chance.integers(40, 80)),
            "sex": str(chance.choice(["f", "m"])),
            "months": int(chance.integers(1, 60)),
            "died": int(chance.random() < 0.5),
        }
        for _ in range(600)
    ]
    names = ("ann", "bob", "cyd")
    with fleet(tmp_path) as site:
        site.up()
        site.join(*names)
        for number, name in enumerate(names):
            file = tmp_path / f"{name}.csv"
            with file.open("w", newline="") as out:
                writer = csv.DictWriter(out, ["age", "sex", "months", "died"])
                writer.writeheader()
                writer.writerows(rows[number::3])
            for key, value in (("data", str(file)), ("analyze", "on")):
                assert site.ask_agent(name, "policy", "set", key, value).returncode == 0
        allowed = site.ask_agent("ann", "policy", "set", "analyze_operations", "*,estimates")
        assert allowed.returncode == 0
        site.start(*names)
        fit = site.data("analyze", "glm(died ~ age + sex, family=binomial)")["answer"]
        assert fit["label"] == "3 of 3 peers, 600 rows"
        assert [row[0] for row in fit["tables"][0]["rows"]] == ["intercept", "age", "sex[m]"]
        curves = site.ask("analyze", "km(months, died by sex)")
        assert "log-rank" in curves.stdout + curves.stderr
        assert "● f" in curves.stdout + curves.stderr
        assert "survival" in curves.stdout
        table = site.ask("analyze", "table1(by=sex)", "--latex").stdout
        assert table.startswith("\\begin{tabular}")
        assert "sex = f" in table
        lines = site.ask("analyze", "ttest(age by sex)", "--csv").stdout.splitlines()
        assert lines[0].startswith("test,difference,SE,t,df,p")
        alone = site.ask("analyze", "meta(age by sex)")
        assert alone.returncode == 2
        assert "fewer than two peers" in alone.stderr
        frame = cw.connect(site.home).analyze("cox(months, died ~ age + sex)").frame()
        assert list(frame["term"]) == ["age", "sex[m]"]
        assert (frame["SE"] > 0).all()
        for name in names:
            assert "unexpected error" not in site.programs[name].log


@pytest.mark.long
def test_secure_questions_to_three_agents(tmp_path: Path) -> None:
    """The coordinator gets sums alone, and refuses in words what has none."""
    names = ("ann", "bob", "cyd")
    with fleet(tmp_path) as site:
        site.up()
        site.join(*names)
        rows = []
        ids = {}
        for number, name in enumerate(names):
            file = tmp_path / f"{name}.csv"
            rows += table(file, 60 + 20 * number, number)
            for key, value in (("data", str(file)), ("analyze", "on"), ("secure_min", "3")):
                assert site.ask_agent(name, "policy", "set", key, value).returncode == 0
            ids[name] = json.loads(site.ask_agent(name, "status", "id", "--json").stdout)["data"]
        for owner in names:
            for other in names:
                if other != owner:
                    done = site.ask_agent(owner, "trust", "add", ids[other]["peer"])
                    assert done.returncode == 0, done.stderr
        site.start(*names)
        told = site.data("analyze", "count, mean(age) by sex", "--secure")["answer"]
        for group in told["groups"]:
            ages = [float(str(row["age"])) for row in rows if row["sex"] == group["group"][0]]
            assert group["figures"] == [len(ages), pytest.approx(np.mean(ages), rel=1e-12)]
        assert (told["peers"], told["asked"], told["rows"]) == (3, 3, 240)
        fit = site.ask("analyze", "glm(age ~ sex)", "--secure")
        said = fit.stdout + fit.stderr
        assert "3 of 3 peers, 240 rows" in said
        assert "secure sums of 3 peers, each off by at most 4e-39" in said
        listed = site.ask_agent("ann", "questions", "list").stdout
        assert "for glm(age ~ sex), as the requester says:\n  2" in listed
        assert "in sums with other machines alone" in listed
        plain = site.ask("analyze", "mean(age)")
        assert "secure questions alone" in plain.stderr
        no_sums = site.ask("analyze", "meta(age)", "--secure")
        assert "--secure hides them" in no_sums.stderr
        frame = cw.connect(site.home).analyze("ttest(age by sex)", secure=True).frame()
        assert len(frame) == 2
        asked = site.data("analyze", "list")
        assert {one["state"] for one in asked} == {"finished"}
        counts = {one["text"]: len(one["steps"]) for one in asked}
        assert len(counts) == len(asked) == 4, "each question once"
        assert (counts["mean(age)"], counts["ttest(age by sex)"]) == (1, 6)
        assert counts["glm(age ~ sex)"] % 6 == 0, "it asks several questions"
        jobs = site.data("analyze", "list", "--steps")
        assert len(jobs) == sum(len(one["steps"]) for one in asked) > len(asked)
        left = json.loads(site.ask_agent("ann", "ledger", "-n", "500", "--json").stdout)["data"]
        steps = [json.loads(entry["told"])["step"] for entry in left if '"step"' in entry["told"]]
        assert steps[:5] == ["ready", "share", "mask", "agree", "unmask"]
        for name in names:
            assert "unexpected error" not in site.programs[name].log
