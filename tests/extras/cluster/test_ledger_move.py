"""`commonweight admin ledger move`: to PostgreSQL and back, also when it is killed at each step."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest

from coordinator.storage import settings
from coordinator.storage.ledger import Entry
from coordinator.storage.ledger_place import LEDGER_FILE, open_ledger
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.errors import ExitCode, HomeError
from protocols.local import homes
from tests.support.environments import ROOT


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A coordinator's home with some entries."""
    made, _ = settings.init(["localhost"], at=tmp_path / "home")
    with contextlib.closing(SqliteLedger(made / LEDGER_FILE)) as ledger:
        for number in range(50):
            ledger.append("fleet" if number % 3 else "run-é", [b"%d" % number, b"\x00\\'\xff"])
    return made


def move(home: Path, to: str, failpoint: str = "") -> subprocess.CompletedProcess[str]:
    words = ["commonweight.cli", "admin", "ledger", "move", "--to", to, "--json"]
    code = f"import sys; sys.argv = {words!r}; from commonweight.cli import main; main()"
    environment = {
        **os.environ,
        "COMMONWEIGHT_HOME": str(home),
        "COMMONWEIGHT_FAILPOINT": failpoint,
        "PYTHONPATH": str(ROOT),
    }
    words = [sys.executable, "-c", code]
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)


def entries(home: Path) -> list[Entry]:
    with contextlib.closing(open_ledger(home, read_only=True)) as ledger:
        return [*ledger.entries()]


def test_there_and_back_with_the_same_hashes(home: Path, address: str) -> None:
    before = entries(home)
    data = json.loads(move(home, address).stdout)["data"]
    assert (data["entries"], data["head"]) == (100, before[-1].hash.hex())
    assert "%3D" not in data["place"], "the parameters of the address are not shown"
    assert not (home / LEDGER_FILE).exists()
    assert entries(home) == before
    with contextlib.closing(open_ledger(home)) as ledger:
        ledger.append("fleet", [b"later"])
    again = move(home, address)
    assert again.returncode == ExitCode.USAGE, again.stdout
    moved = entries(home)
    assert json.loads(move(home, "file").stdout)["data"]["entries"] == 101
    assert entries(home) == moved
    assert (home / LEDGER_FILE).exists()
    # Nobody continues the old one by mistake: the database refuses.
    refused = move(home, address)
    assert refused.returncode == ExitCode.FAILED
    assert "was moved to" in refused.stdout
    assert entries(home) == moved


@pytest.mark.parametrize("step", ["ledger.copied", "ledger.loaded", "ledger.chosen"])
def test_a_move_to_the_database_that_is_killed_goes_on(home: Path, address: str, step: str) -> None:
    before = entries(home)
    assert move(home, address, f"{step}=kill").returncode == -signal.SIGKILL
    if step == "ledger.chosen":
        with pytest.raises(HomeError, match="two ledgers"):
            open_ledger(home)
    else:
        assert entries(home) == before, "the source is in use, unchanged"
    done = move(home, address)
    assert done.returncode == 0, done.stdout
    assert entries(home) == before
    assert not (home / LEDGER_FILE).exists()


@pytest.mark.parametrize("step", ["ledger.copied", "ledger.loaded", "ledger.renamed"])
def test_a_move_to_the_file_that_is_killed_goes_on(home: Path, address: str, step: str) -> None:
    before = entries(home)
    assert move(home, address).returncode == 0
    assert move(home, "file", f"{step}=kill").returncode == -signal.SIGKILL
    if step == "ledger.renamed":
        with pytest.raises(HomeError, match="two ledgers"):
            open_ledger(home)
    else:
        assert entries(home) == before
    done = move(home, "file")
    assert done.returncode == 0, done.stdout
    assert entries(home) == before


def test_a_move_that_cannot_be_made_changes_nothing(
    home: Path, address: str, admin: psycopg.Connection[tuple[object, ...]]
) -> None:
    before, files = entries(home), sorted(home.iterdir())
    for to, code, why in (
        ("mysql://host/database", ExitCode.USAGE, "cannot be 'mysql"),
        ("postgresql://me:secret@host/database", ExitCode.USAGE, "has a password"),
        (address.replace("owner@", "nobody@"), ExitCode.REFUSED, "cannot be opened"),
        ("postgresql://owner@127.0.0.1:1/postgres", ExitCode.UNREACHABLE, "cannot be opened"),
        (f"{address}nothing", ExitCode.FAILED, "no schema"),
        ("file", ExitCode.USAGE, "already"),
    ):
        refused = move(home, to)
        assert (refused.returncode, json.loads(refused.stdout)["status"]) == (code, "error")
        assert why in refused.stdout
        assert "secret" not in refused.stdout + refused.stderr
    held = homes.lock_home(home, "coordinator")
    refused = move(home, address)
    assert refused.returncode == ExitCode.FAILED
    assert "stop the coordinator first" in refused.stdout
    held.release()
    assert entries(home) == before
    assert [*filter(lambda path: path.name != "lock", sorted(home.iterdir()))] == [
        *filter(lambda path: path.name != "lock", files)
    ]
    schema = address.rpartition("%3D")[2]
    count = admin.execute("SELECT count(*) FROM pg_tables WHERE schemaname = %s", (schema,))
    assert count.fetchone() == (0,)
    other, _ = settings.init(["localhost"], at=home.parent / "other")
    with contextlib.closing(SqliteLedger(other / LEDGER_FILE)) as ledger:
        ledger.append("fleet", [b"of the other"])
    assert move(other, address).returncode == 0
    refused = move(home, address)
    assert "is that of another fleet" in refused.stdout
    assert entries(home) == before
