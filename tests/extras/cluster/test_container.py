"""What the container of a replica runs: keys from a backup at the first start, then it leads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from coordinator.storage.ledger_place import VARIABLE
from tests.support import postgres
from tests.support.fleet_harness import COORDINATOR, HOST, environment, free_port, run_program
from tests.support.waiting import wait_for

CONTAINERFILE = Path(__file__).parents[3] / "deploy" / "Containerfile"


def test_a_replica_starts_twice_from_a_backup_of_keys(tmp_path: Path, address: str) -> None:
    first = environment(tmp_path, COMMONWEIGHT_HOME=str(tmp_path / "first"))
    backup = tmp_path / "keys.backup"
    assert run_program([COORDINATOR, "init"], first).returncode == 0
    made = run_program([COORDINATOR, "admin", "backup", str(backup)], first)
    assert made.returncode == 0, made.stderr
    (command,) = (
        json.loads(line.removeprefix("CMD "))
        for line in CONTAINERFILE.read_text().splitlines()
        if line.startswith("CMD") and "--replica" in line
    )
    words = {"/keys/keys.backup": str(backup), "commonweight": f"{sys.executable} -m {COORDINATOR}"}
    for theirs, ours in words.items():
        command[-1] = command[-1].replace(f"{theirs} ", f"{ours} ")
    (tmp_path / "versions").mkdir()
    settings = environment(
        tmp_path,
        **{VARIABLE: address},
        COMMONWEIGHT_HOME=str(tmp_path / "home"),
        COMMONWEIGHT_VERSIONS=(tmp_path / "versions").as_uri(),
        COMMONWEIGHT_HOST=HOST,
        COMMONWEIGHT_PORT=str(free_port()),
        PGPASSWORD=postgres.PASSWORD,
    )
    for start in ("first", "second"):
        log = tmp_path / f"{start}.log"
        with log.open("wb") as out:
            replica = subprocess.Popen(command, env=settings, stdout=out, stderr=out)
        try:
            wait_for(lambda log=log: "is up" in log.read_text(), f"the {start} start")
            replica.terminate()
            assert replica.wait(60) == 0
        finally:
            replica.kill()
        assert ("restored" in log.read_text()) is (start == "first")
        backup.unlink(missing_ok=True)
