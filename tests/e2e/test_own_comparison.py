"""After a run each owner sees, on rows held out at home, whether taking part was worth it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from protocols.messages.comparisons import Comparison, without_blend
from tests.support.fleet_harness import ALLOW, Fleet, fleet
from tests.support.tables import patients
from tests.support.waiting import wait_for

SIZES = {"bern": 600, "uri": 60, "lugano": 120}
RUN = ("--target", "ill", "--rounds", "6", "--quorum", "3", "--set", "model=linear")


def joined(site: Fleet, folder: Path) -> None:
    for seed, (name, rows) in enumerate(SIZES.items()):
        table = patients(folder / f"{name}.csv", rows, seed, turn=-1.0 if name == "lugano" else 1.0)
        words = ("join", "-", "--name", name, "--data", str(table), *ALLOW)
        done = site.ask_agent(name, *words, given=site.ticket())
        assert done.returncode == 0, done.stderr


def right_of(answers: str, table: str) -> float:
    """The share of rows of a table whose answer is right."""
    rows = list(csv.DictReader(Path(table).read_text().splitlines()))
    found = list(csv.DictReader(answers.splitlines()))
    return sum(a["ill"] == b["ill"] for a, b in zip(found, rows, strict=True)) / len(rows)


@pytest.mark.long
def test_a_peer_with_few_rows_sees_that_it_gains(tmp_path: Path) -> None:
    with fleet(tmp_path) as site:
        assert site.ask("init").returncode == 0
        site.up()
        joined(site, tmp_path)
        site.start(*SIZES)
        run = site.ended_run(site.start_run("tabular", *RUN))
        assert run["state"] == "finished", run["ended_because"]
        seen = {}

        def all_know() -> bool:
            for name in SIZES:
                done = site.ask_agent(name, "status")
                if "held-out rows of yours" in done.stdout:
                    seen[name] = done.stdout
            return len(seen) == len(SIZES)

        wait_for(all_know, "each owner sees the comparison")
        assert f"run {run['id']}, model linear, on 12 held-out rows of yours" in seen["uri"]
        assert "→ alone" not in seen["uri"], "it has few rows"
        assert "→ shared" not in seen["lugano"], "its patients are others"

        def told() -> bool:
            return len(site.data("run", "show", run["id"])["comparisons"]) == len(SIZES)

        wait_for(told, "the coordinator is told")
        shown = site.ask("run", "show", run["id"]).stdout
        assert "uri: " in shown
        assert " is recommended; accuracy: alone " in shown

        table = str(tmp_path / "lugano.csv")
        done = site.ask_agent("lugano", "predict", table, "--out", str(tmp_path / "own.csv"))
        assert done.returncode == 0, done.stderr
        assert f" of {run['id']}, which is recommended on this machine" in done.stderr
        shared = site.ask_agent("lugano", "predict", table, "--use", "shared")
        assert "recommended" not in shared.stderr
        own = right_of((tmp_path / "own.csv").read_text(), table)
        assert own > 0.8 > 0.5 > right_of(shared.stdout, table)


@pytest.mark.long
def test_a_run_does_not_wait_for_a_comparison(tmp_path: Path) -> None:
    """The trainer of one agent hangs while it compares, which is the longest part that there is."""
    words = ("--target", "ill", "--rounds", "2", "--quorum", "2", "--best-metric", "auc")
    slow = ("--set", "model=mlp", "--set", "hidden=512,512", "--set", "epochs=2")
    marker = tmp_path / "hangs"
    with fleet(tmp_path, COMMONWEIGHT_FAILPOINT=f"trainer.begun:9=hang@{marker}") as site:
        assert site.ask("init").returncode == 0
        site.up()
        names = ("bern", "uri")
        for seed, name in enumerate(names):
            table = patients(tmp_path / f"{name}.csv", 900, seed)
            join = ("join", "-", "--name", name, "--data", str(table), *ALLOW)
            assert site.ask_agent(name, *join, given=site.ticket()).returncode == 0
        site.start(*names)
        first = site.ended_run(site.start_run("tabular", *words, *slow))
        wait_for(marker.exists, "a part of a comparison hangs")
        wait_for(
            lambda: any(site.agent(name)["reason"] == "comparing" for name in names), "it is shown"
        )
        assert {peer["state"] for peer in site.data("peers", "list")} <= {"idle"}
        assert len(site.data("run", "show", first["id"])["comparisons"]) < 2
        quick = site.ended_run(site.start_run("tabular", *words, "--set", "model=linear"))
        assert quick["state"] == "finished", quick["ended_because"]
        assert {len(closed["contributors"]) for closed in quick["history"]} == {2}

        def told(run: str) -> bool:
            return len(site.data("run", "show", run)["comparisons"]) == 2

        wait_for(lambda: told(first["id"]) and told(quick["id"]), "both are compared", 240)
        found = site.data("run", "show", quick["id"])["comparisons"]
        assert {one["metric"] for one in found.values()} == {"auc"}
        status = json.loads(site.ask_agent("bern", "status", "--json").stdout)["data"]
        own = status["compared"]["comparison"]
        assert own["models"].keys() == {"alone", "shared", "personal", "blend"}
        sent = json.loads(msgspec.json.encode(without_blend(msgspec.convert(own, Comparison))))
        assert sent in found.values(), "the blend stays on its machine"
