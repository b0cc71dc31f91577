"""Three owners, each with another reader of tables, train in one run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from agent.policy import sandbox
from protocols.errors import TrainerFailed
from tests.e2e.test_tabular import joined
from tests.support.fleet_harness import fleet
from tests.support.hostile_task import own
from tests.support.tables import mixed, write_csv, write_parquet
from tests.support.waiting import wait_for


@pytest.mark.timeout(540)  # Spark's JVM starts on the cores that three agents share
def test_arrow_dask_and_spark_train_together(tmp_path: Path) -> None:
    # A third of the rows are no members. Where fewer than data.min_count of the rows held out are
    # such rows, evaluation does not see the column that decides.
    rows = mixed(800)
    tables = {
        "arrow": write_csv(tmp_path / "arrow.csv", rows[:320]),
        "dask": write_csv(tmp_path / "dask.csv", rows[320:600], sorted(rows[0])),
        "spark": write_parquet(tmp_path / "spark.parquet", rows[600:]),
    }
    with fleet(tmp_path) as site:
        assert site.ask("init").returncode == 0
        site.up()
        for name, table in tables.items():
            joined(site, name, table)
            assert site.ask_agent(name, "policy", "set", "data.reader", name).returncode == 0
        site.start(*tables)
        words = ("--target", "label", "--rounds", "3", "--quorum", "3", "--set", "epochs=5")
        started = site.start_run("tabular", *words)
        ended = ("finished", "stopped", "failed")
        wait_for(
            lambda: site.run(started)["state"] in ended,
            "the run ended",
            within_s=500.0,
            every_s=2.0,
        )
        run = site.run(started)
        assert run["state"] == "finished", run["ended_because"]
        assert {len(closed["contributors"]) for closed in run["history"]} == {3}
        assert run["history"][-1]["metrics"]["accuracy"] > 0.9
        features = {f["name"]: f for f in json.loads(run["preprocessing"])["features"]}
        ages = [float(row["age"]) for row in rows if row["age"]]
        mean = sum(ages) / len(ages)
        assert abs(features["age"]["mean"] - mean) < 1e-9 * mean


def test_a_task_has_no_network_beside_a_reader_that_has(tmp_path: Path) -> None:
    """Spark's Java reads the table in another process; the task reads it, and opens no socket."""
    made = own(tmp_path, "auto", rows=30, data_reader="spark")
    read = "from agent.data import open_table\nreader = open_table(task.data)\n"
    try:
        made.run(
            f"{read}rows = [v for b in reader.batches(['a']) for v in b.column(0).to_pylist()]\n"
            "assert rows == [str(n) for n in range(1, 31)], rows"
        )
        if sandbox.support().lacks():
            return
        for attack in (
            "socket.socket()",
            "subprocess.run(['/bin/sh', '-c', 'true'])",
            "open('/etc/passwd')",
            "open(HOME / 'spool' / 'x', 'w')",
        ):
            with pytest.raises(TrainerFailed, match="sandbox refused"):
                made.run(attack)
    finally:
        made.trainer.stop()
    wait_for(lambda: not list((tmp_path / "spool").iterdir()), "the rows are deleted")
