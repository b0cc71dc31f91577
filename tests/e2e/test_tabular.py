"""Tables of three owners, one in a database, train together without code; one that does not fit is
named, and waits."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.support.fleet_harness import ALLOW, Fleet, fleet
from tests.support.tables import MIXED, write_csv, write_sqlite
from tests.support.waiting import wait_for


def joined(site: Fleet, name: str, table: Path | str) -> None:
    words = ("join", "-", "--name", name, "--data", str(table), *ALLOW)
    done = site.ask_agent(name, *words, given=site.ticket())
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_a_row_that_its_owner_deletes_stops_answers_until_more_have_gone(tmp_path: Path) -> None:
    tables = {
        "bern": write_csv(tmp_path / "bern.csv", MIXED[:90]),
        "basel": write_csv(tmp_path / "basel.csv", MIXED[90:]),
    }
    words = ("--target", "label", "--rounds", "1", "--quorum", "2", "--follow")
    with fleet(tmp_path) as site:
        assert site.ask("init").returncode == 0
        site.up()
        for name, table in tables.items():
            joined(site, name, table)
        site.start(*tables)
        assert site.ask("run", "start", "tabular", *words).returncode == 0
        write_csv(tmp_path / "bern.csv", MIXED[:90] + MIXED[90:93])
        site.programs["bern"].stop()
        site.start("bern")
        done = site.ask("run", "start", "tabular", *words)
        assert done.returncode == 0, done.stderr
        assert "3 new rows wait until 5 have come" in site.ask_agent("bern", "status").stdout

        write_csv(tmp_path / "bern.csv", MIXED[1:90])
        site.programs["bern"].stop()
        site.start("bern")
        run = site.start_run("tabular", *words[:-1])
        limit = "would reveal a few rows alone, and the owner's data_min_count is 5"
        wait_for(lambda: any(limit in text for text in site.events()), "the operator hears of it")
        logs = (file.read_text() for file in (tmp_path / "bern").glob("*.log"))
        failed = "the work failed: together with an earlier answer this "
        assert "".join(logs).count(failed + limit) == 1
        assert site.ask("run", "stop", run).returncode == 0

        write_csv(tmp_path / "bern.csv", MIXED[20:90])
        site.programs["bern"].stop()
        site.start("bern")
        done = site.ask("run", "start", "tabular", *words)
        assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_tables_train_together_and_a_misfit_is_named_in_time(tmp_path: Path) -> None:
    tables = {
        "bern": write_sqlite(tmp_path / "bern.db", MIXED[:90]),
        "basel": write_csv(tmp_path / "basel.csv", MIXED[90:], sorted(MIXED[0]), ";"),
        "odd": write_csv(tmp_path / "odd.csv", [row | {"age": "old"} for row in MIXED[:60]]),
    }
    with fleet(tmp_path) as site:
        assert site.ask("init").returncode == 0
        site.up()
        for name, table in tables.items():
            joined(site, name, table)
        site.start(*tables)
        checked = site.ask("run", "check", "tabular", "--target", "label")
        assert checked.returncode == 1
        assert [line.split()[:3] for line in checked.stdout.splitlines()[1:]] == [
            ["basel", "✓", "fits"], ["bern", "✓", "fits"], ["odd", "✗", "60"],
        ]  # fmt: skip
        assert "✗ text" in checked.stdout
        assert "odd: column age: expected number, found text" in checked.stderr
        assert "2 of 3 peers could train now" in checked.stderr
        assert site.data("run", "list") == [], "a check is no run"
        told = "the coordinator says: run tabular-"
        site.until_agent("odd", "hears why", lambda status: told in status["last_error"])
        words = ("--target", "label", "--rounds", "3", "--quorum", "2", "--set", "model=mlp")
        run = site.ended_run(site.start_run("tabular", *words, "--set", "epochs=5"))
        assert run["state"] == "finished", run["ended_because"]
        assert {len(closed["contributors"]) for closed in run["history"]} == {2}
        assert run["history"][-1]["metrics"]["accuracy"] > 0.9
        rules = json.loads(run["preprocessing"])
        assert [feature["name"] for feature in rules["features"]] == [
            "age", "city", "income", "member", "since",
        ]  # fmt: skip
        assert run["card"]["traits"]["classes"] == ["no", "yes"]
        said = site.events()
        assert "refused odd: column age: expected number, found text" in said
        assert any("column note is left out" in text for text in said)
        # No row left: a value that one row alone has is nowhere in what the coordinator keeps.
        kept = b"".join(file.read_bytes() for file in site.home.glob("ledger.db*"))
        assert b"only once" not in kept
        assert b"1000.5" not in kept

        # Each owner can see what left, word for word, and ask the model without anybody.
        done = site.ask_agent("bern", "ledger", "--json")
        left = json.loads(done.stdout)["data"]
        # Twice for the check before the run, and twice for the run itself.
        assert [one["what"] for one in left[:4]] == ["description"] * 4
        assert json.loads(left[0]["told"])["rows"] == 90
        known = {"first weights", "weights", "evaluation", "comparison"}
        assert {one["what"] for one in left[4:]} <= known
        assert sum(one["what"] == "weights" for one in left) == 3
        out = tmp_path / "answers.csv"
        table = str(write_csv(tmp_path / "new.csv", [row | {"label": ""} for row in MIXED[:30]]))
        done = site.ask_agent("bern", "predict", table, "--out", str(out))
        assert done.returncode == 0, done.stderr
        answers = list(csv.DictReader(out.read_text().splitlines()))
        right = sum(a["label"] == row["label"] for a, row in zip(answers, MIXED[:30], strict=True))
        assert right >= 27
        listed = json.loads(site.ask_agent("bern", "models", "list", "--json").stdout)["data"]
        assert listed[0]["digest"] == run["head"]
        assert listed[0]["version"] == f"{run['id']}, after round 3"
        words = ("--run", "tabular", "--which", "best", "--id-column", "note")
        done = site.ask_agent("bern", "predict", table, *words)
        assert done.returncode == 0, done.stderr
        assert f"that is the best version of {run['id']}, after round" in done.stderr
        named = list(csv.DictReader(done.stdout.splitlines()))
        assert [answer["note"] for answer in named] == [row["note"] for row in MIXED[:30]]
        done = site.ask_agent("bern", "predict", table, "--model", "0" * 12)
        assert done.returncode == 2
        assert run["head"][:12] in done.stderr

        done = site.ask(
            "run", "start", "tabular", "--target", "Labels", "--quorum", "2", "--follow"
        )
        assert done.returncode == 1
        assert "column Labels: expected a column of this name" in done.stderr
        assert "found a similar one: label" in done.stderr
        assert "refused " in done.stderr


@pytest.mark.long
@pytest.mark.parametrize("quorum", [2, 3])
def test_a_run_chooses_its_model_although_an_agent_is_killed(tmp_path: Path, quorum: int) -> None:
    """`kill -9` when it is asked to compare models: the others go on, or wait for the quorum."""
    marker = tmp_path / "killed"
    point = f"agent.message.taken:2=kill@{marker}"
    with fleet(tmp_path, COMMONWEIGHT_FAILPOINT=point) as site:
        assert site.ask("init").returncode == 0
        site.up()
        names = ("bern", "basel", "chur")
        for number, name in enumerate(names):
            rows = [MIXED[(7 * number + at) % len(MIXED)] for at in range(100)]
            joined(site, name, write_csv(tmp_path / f"{name}.csv", rows))
        site.start(*names)
        words = ("--target", "label", "--rounds", "2", "--quorum", str(quorum))
        run = site.start_run("tabular", *words)
        wait_for(marker.exists, "one is killed")
        (dead,) = wait_for(
            lambda: [n for n in names if site.programs[n].process.poll() is not None], "it is gone"
        )
        if quorum == 3:
            wait_for(lambda: site.data("run", "show", run)["choice"], "the others have chosen")
            site.start(dead)
        found = site.ended_run(run)
        assert found["state"] == "finished", found["ended_because"]
        assert len(found["choice"]["peers"]) == 2, "two have told scores"
        assert {len(closed["contributors"]) for closed in found["history"]} == {quorum}
