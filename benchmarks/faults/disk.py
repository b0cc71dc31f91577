"""Full disks and damaged files."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults import checker
from benchmarks.faults.results import Row
from benchmarks.faults.site import Site, site
from tests.support.waiting import wait_for

SEED = 1
PEERS = ("ada", "bob")
_ROOM_BYTES = 24 * 1024 * 1024


def can_mount() -> bool:
    """Whether a folder can have a small disk of its own: only for root on Linux."""
    return sys.platform == "linux" and os.geteuid() == 0


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """Mount a tmpfs at `folder` during the block."""
    folder.mkdir(exist_ok=True)
    options = f"size={_ROOM_BYTES},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, leave_bytes: int) -> Path:
    """Write a file that leaves only this much free space."""
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:  # other programs write meanwhile, so the free space is not known exactly
                file.write(bytes(1 << 16))
        except OSError as err:
            if err.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, file.tell() - leave_bytes))
    return ballast


def _ordered(fleet: Site, rounds: int = 3) -> str:
    return fleet.order(seed=SEED, rounds=rounds, quorum=2, deadline_s=5.0)


def full_coordinator(folder: Path) -> Row:
    """The coordinator's disk fills during a run; it says so, and continues when there is room."""
    row = Row("14 disk full, coordinator", "versions lost")
    with small_disk(folder / "coordinator"), site(folder) as fleet:
        fleet.rise()
        fleet.enlist(*PEERS)
        undisturbed = checker.digests(fleet.outcome(_ordered(fleet)))
        for leave in (0, 100_000, 900_000):
            run = _ordered(fleet)
            fleet.until_versions(run)
            ballast = fill(fleet.home, leave)
            _until_told(fleet, run)
            ballast.unlink()
            facts = fleet.outcome(run)
            found = fleet.violations(PEERS)
            if checker.digests(facts) != undisturbed:
                found.append(f"{run} {checker.ended(facts)} with other versions")
            row.add(
                f"{leave:,} bytes left", SEED, found, len(undisturbed) - len(checker.digests(facts))
            )
    row.figure = f"{row.worst:.0f}"
    return row


def _until_told(fleet: Site, run: str) -> None:
    """Wait until the run stops and says why, or has ended in the remaining space."""

    def told() -> bool:
        waits = "space on the coordinator's disk" in fleet.ask("run", "show", run).stdout
        return waits or bool(fleet.ended(run))

    wait_for(told, "the full disk is reported")


def full_agent(folder: Path) -> Row:
    """An agent's disk fills; it survives, and works again when there is room."""
    row = Row("15 disk full, agent", "steps lost")
    with small_disk(folder / "ada"), site(folder) as fleet:
        fleet.rise()
        fleet.enlist(*PEERS)
        undisturbed = checker.digests(fleet.outcome(_ordered(fleet)))
        for leave in (0, 100_000, 500_000):
            ballast = fill(folder / "ada", leave)
            run = _ordered(fleet)
            fleet.until_agent("ada", "is paused", lambda told: told["reason"] == "disk full")
            ballast.unlink()
            facts = fleet.outcome(run)
            found = fleet.violations(PEERS)
            if checker.digests(facts) != undisturbed:
                found.append(f"{run} has other weights than without the fault")
            row.add(f"{leave:,} bytes left", SEED, found)
    row.figure = "0: an update is made whole or not at all"
    return row


def spoilt_versions(folder: Path) -> Row:
    """The newest version is damaged, at the coordinator or in an agent's cache."""
    row = Row("16 truncated or flipped checkpoint", "runs that went on, of cases")
    for how in (_truncate, _flip):
        for where in ("coordinator/versions", "ada/cache"):
            case = folder / f"{how.__name__}-{where.replace('/', '-')}"
            case.mkdir()
            with site(case) as fleet:
                row.add(f"{how.__name__.strip('_')} in {where}", SEED, _spoilt(fleet, how, where))
    row.figure = f"{row.passed} of {row.cases}"
    return row


def _spoilt(fleet: Site, how: Callable[[Path], None], where: str) -> list[str]:
    fleet.rise()
    fleet.enlist(*PEERS)
    undisturbed = checker.digests(fleet.outcome(_ordered(fleet)))
    run = _ordered(fleet)
    fleet.until_versions(run)
    for name in ("up", "ada"):
        fleet.programs[name].kill()
    newest = fleet.folder / where / f"{checker.digests(fleet.facts(run))[-1]}.safetensors"
    if newest.exists():  # an agent may not have downloaded it yet
        how(newest)
    try:
        fleet.rise()
        fleet.come_back("ada")
        facts = fleet.outcome(run)
    except AssertionError as err:
        return [str(err)[:200]]
    found = fleet.violations(PEERS)
    if checker.digests(facts)[-1:] != undisturbed[-1:]:
        found.append(f"{run} {checker.ended(facts)} with other weights")
    return found


def lost_disk(folder: Path) -> Row:
    """The coordinator and its disk are gone in round 4; there is a backup of round 1, without any
    weights. A new coordinator takes the newest version from the agents."""
    row = Row("14 coordinator's disk gone, backup and agents left", "rounds lost; s to the version")
    with site(folder) as fleet:
        fleet.rise()
        fleet.enlist(*PEERS)
        undisturbed = checker.digests(fleet.outcome(_ordered(fleet, rounds=12)))
        run = _ordered(fleet, rounds=12)
        fleet.until_versions(run)
        backup = folder / "backup.tar"
        assert fleet.ask("backup", str(backup)).returncode == 0
        fleet.until_versions(run, 4)
        fleet.programs["up"].kill()
        reached = len(checker.digests(fleet.facts(run)))
        shutil.rmtree(fleet.home)
        assert fleet.ask("restore", str(backup), "--from-peers").returncode == 0
        began = time.monotonic()
        fleet.rise()
        wait_for(lambda: fleet.facts(run, "VersionRecalled"), "a version is back", 120)
        took = time.monotonic() - began
        facts = fleet.outcome(run)
        found = fleet.violations([])
        recalled = next(f["version"] for f in facts if f["type"] == "VersionRecalled")
        if undisturbed[recalled["round"] - 1] != recalled["digest"]:
            found.append(f"{run} continues from a digest that was never its version")
        if checker.digests(facts)[-1:] != undisturbed[-1:]:
            found.append(f"{run} {checker.ended(facts)} with other weights")
        lost = reached - recalled["round"]
        if lost > 1:
            found.append(f"{lost} rounds are lost")
        row.add(f"round {recalled['round']} of {reached}", SEED, found, lost)
    row.figure = f"{lost}; {took:.0f} s"
    return row


def spoilt_ledger(folder: Path) -> Row:
    """A ledger that is damaged or locked: refused with a clear error, never written to."""
    row = Row("17 ledger corrupt or locked", "clear refusals of cases")
    with site(folder) as fleet:
        fleet.rise()
        fleet.enlist(*PEERS)
        fleet.outcome(_ordered(fleet))
        fleet.programs["up"].stop()
        path = fleet.home / "ledger.db"
        whole = path.read_bytes()
        places = {"header": 20, "an entry": whole.index(b"TrainingClosed"), "page": 4096}
        for name, at in places.items():
            spoilt = bytearray(whole)
            spoilt[at : at + 16] = bytes(byte ^ 0xFF for byte in spoilt[at : at + 16])
            path.write_bytes(spoilt)
            found = _refusal(fleet)
            if path.read_bytes() != bytes(spoilt):
                found.append("the spoilt ledger was written to")
            row.add(f"{name} flipped", SEED, found)
        path.write_bytes(whole)
        lock = sqlite3.connect(path, isolation_level=None)
        lock.execute("BEGIN EXCLUSIVE")
        row.add("locked by another", SEED, _refusal(fleet))
        lock.execute("ROLLBACK")
        lock.close()
        fleet.rise()
        row.add("whole again: it is up", SEED, fleet.violations(PEERS))
    row.figure = f"{row.passed} of {row.cases}"
    return row


def _refusal(fleet: Site) -> list[str]:
    """Start the coordinator, which must fail with the reason and the next step."""
    try:
        fleet.rise()
    except AssertionError as err:
        said = str(err)
        clear = "error: the ledger" in said and "try:" in said and "Traceback" not in said
        return [] if clear else [f"unclear: {said[-200:]!r}"]
    fleet.programs["up"].stop()
    return ["it started"]


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
