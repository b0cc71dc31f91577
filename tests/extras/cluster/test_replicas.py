"""Two coordinators over one ledger: the second one takes over when the first one is killed."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import pytest

from coordinator.storage import run_events
from coordinator.storage.ledger_place import VARIABLE, open_ledger
from coordinator.storage.run_events import VersionCommitted
from protocols.errors import ExitCode
from tests.support import postgres
from tests.support.fleet_harness import (
    COORDINATOR,
    HOST,
    Program,
    fleet,
    run_program,
    two_free_ports,
)
from tests.support.waiting import wait_for

ROUNDS = 25


def test_a_replica_takes_over_and_the_run_goes_on(
    tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, address)
    (tmp_path / "shared").mkdir()
    settings = {
        VARIABLE: address,
        "COMMONWEIGHT_VERSIONS": (tmp_path / "shared").as_uri(),
        "PGPASSWORD": postgres.PASSWORD,
    }
    port, other = two_free_ports()
    settings["COMMONWEIGHT_PUBLIC_ADDRESSES"] = json.dumps([f"{HOST}:{port}", f"{HOST}:{other}"])
    with fleet(tmp_path, **settings) as site:
        first = site.up("--replica", port=port)
        file, home = tmp_path / "keys.backup", tmp_path / "second"
        assert site.ask("admin", "backup", str(file)).returncode == 0
        environment = site._env() | {"COMMONWEIGHT_HOME": str(home)}
        done = run_program([COORDINATOR, "admin", "restore", str(file), "--replica"], environment)
        assert done.returncode == 0, done.stderr
        assert not (home / "ledger.db").exists()
        refused = run_program([COORDINATOR, "up", "--host", HOST], environment)
        assert refused.returncode == ExitCode.FAILED
        assert "another program writes to this ledger" in refused.stderr
        words = [COORDINATOR, "up", "--replica", "--host", HOST, "--port", str(other)]
        second = site.programs["second"] = Program(words, environment, tmp_path / "second.log")
        wait_for(lambda: "is led by" in second.log, "the second one waits")
        site.join("ann", "bob")
        site.start("ann", "bob")
        run = site.start_run("ping", "--rounds", str(ROUNDS), "--quorum", "2")
        wait_for(lambda: len(site.run(run)["history"]) >= 2, "two rounds")
        first.kill()
        killed = time.monotonic()
        assert len(rounds_of(home, run)) < ROUNDS
        (site.home / "up.json").unlink()
        wait_for(lambda: (home / "up.json").exists(), "the second one leads")
        print(f"took over after {time.monotonic() - killed:.1f} s")

        def is_finished() -> bool:
            show = [COORDINATOR, "run", "show", run, "--json"]
            shown = json.loads(run_program(show, environment).stdout)["data"]
            assert shown["state"] not in ("failed", "stopped"), shown
            return bool(shown["state"] == "finished")

        wait_for(is_finished, "the run ended", within_s=120.0, every_s=0.5)
        # And back: the first one waits until the second one is stopped.
        again = site.background("up", *words[1:-1], str(port))
        wait_for(lambda: again.log.count("is led by") == 1, "the first one waits")
        assert second.stop() == 0
        wait_for(lambda: (site.home / "up.json").exists(), "the first one leads again")
    assert rounds_of(home, run) == list(range(1, ROUNDS + 1)), "each round once"


def rounds_of(home: Path, run: str) -> list[int]:
    """The rounds that were committed, from a ledger whose hashes are right."""
    with contextlib.closing(open_ledger(home, read_only=True)) as ledger:
        assert ledger.verify() is None
        events = [run_events.decode(entry.body) for entry in ledger.entries(run)]
    return [one.round for one in events if isinstance(one, VersionCommitted)]
