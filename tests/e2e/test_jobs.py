"""Jobs on real agents, through the command line: rows spread, and wrong ones."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.speed import rows_task
from tests.support.fleet_harness import Fleet, closing

SETTINGS = {
    "COMMONWEIGHT_AGENT_TASK_FILES": f"rows={Path(rows_task.__file__)}:Rows",
    "COMMONWEIGHT_AGENT_JOBS_SCATTER": "on",
}


def table(path: Path, rows: int, columns: int) -> np.ndarray:  # type: ignore[type-arg]
    x = np.random.default_rng(rows).normal(size=(rows, columns)).astype(np.float32)
    names = ",".join(f"x{n}" for n in range(columns))
    np.savetxt(path, x, delimiter=",", header=names, comments="", fmt="%.9g")
    return x


def trained(site: Fleet, *words: str) -> str:
    run = site.start_run(*words, "--rounds", "1")
    site.ended_run(run)
    return run


@pytest.mark.long
def test_rows_are_spread_and_wrong_ones_harm_nobody(tmp_path: Path) -> None:
    site = Fleet(tmp_path, SETTINGS)
    with closing(site):
        site.up()
        site.join("ann", "bob")
        site.start("ann", "bob")
        run = trained(site, "rows")
        rows = tmp_path / "rows.csv"
        table(rows, 3000, 10)
        few = tmp_path / "few.csv"
        table(few, 100, 2)
        # Of a table that the task cannot take both peers say so, and take other work at once.
        words = ("infer", "--yes", "--model", run, "--scatter")
        wrong = site.ask(*words, str(few), "--out", str(tmp_path / "none.csv"))
        assert wrong.returncode == 1
        assert "no peer can do it: the task raised an error" in wrong.stderr
        assert not (tmp_path / "none.csv").exists()
        told = site.data(*words, str(rows), "--out", str(tmp_path / "out.csv"))
        assert told["rows"] == 3000
        shown = site.data("job", "show", told["job"])
        assert {p for unit in shown["units"].values() for p in unit["given"]} == {
            peer["peer"] for peer in site.data("peers", "list")
        }
        with (tmp_path / "out.csv").open(newline="") as file:
            found = [(int(row["row"]), int(row["class"])) for row in csv.DictReader(file)]
        model = rows_task.Rows().init(0, {})
        expected, _ = rows_task.answers((model, rows)).T
        assert found == list(enumerate(expected.astype(int).tolist()))
        again = site.ask(*words, str(rows), "--out", str(tmp_path / "out.csv"))
        assert (again.returncode, "exists already" in again.stderr) == (2, True)
        for name in ("ann", "bob"):
            assert "unexpected error" not in site.programs[name].log
            site.until_agent(name, "is idle", lambda told: told["state"] == "idle")


@pytest.mark.long
def test_a_job_repeats_what_the_run_has_told(tmp_path: Path) -> None:
    """`infer --private` of the tutorial: no owner has to allow it, and a newcomer is excused."""
    site = Fleet(tmp_path, {})
    with closing(site):
        site.up()
        site.join("ann", "bob", "cyd")
        site.start("ann", "bob")
        run = site.start_run("mnist", "--rounds", "2", "--quorum", "2")
        site.ended_run(run)
        site.start("cyd")
        told = site.data("infer", "--private", "--model", run)
        assert told["peers"]["answered"] == 2, told
        assert "took part in no run" in json.dumps(told["peers"]), told
        metrics = {matrix["metric"] for matrix in told["metrics"]}
        assert metrics == {"accuracy", "loss"}
        evaluated = site.run(run)["history"][-1]["metrics"]
        for matrix in told["metrics"]:
            assert list(matrix["weighted"].values()) == [pytest.approx(evaluated[matrix["metric"]])]
