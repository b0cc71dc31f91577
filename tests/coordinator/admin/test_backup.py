"""A coordinator with a lost disk is restored from a backup and the versions of its peers."""

from __future__ import annotations

import contextlib
import io
import shutil
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from flwr.app import RecordDict

from agent.clientapp.interfaces import Queries
from coordinator.admin import backup
from coordinator.admin.backup import Manifest
from coordinator.runs import recovery
from coordinator.storage import run_events, settings
from coordinator.storage.seen_heads import SeenHeads, StoredStatement
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.errors import HomeError, HomeTooNew, UsageError
from protocols.messages.states import RunState
from protocols.messages.version_log import LogHead
from protocols.messages.work import Work
from tests.support.in_process_fleet import Fleet, fleet_of, some_data
from tests.support.waiting import until

DATA = [some_data(20 + 10 * seed, seed) for seed in (1, 2)]


@pytest.fixture(autouse=True)
def _short_wait(coordinator_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "LISTEN_S", 0.3)


async def joined(fleet: Fleet) -> None:
    for number, part in enumerate(DATA):
        fleet.join(f"agent{number}", part)
    await fleet.online(len(DATA))


def kept_rounds(fleet: Fleet, run_id: str) -> list[int]:
    return [closed.round for closed in fleet.hub.runs.find(run_id).history]


@pytest.mark.parametrize(
    ("strategy", "with_versions"), [("fedavg", False), ("fedavgm", False), ("fedavgm", True)]
)
async def test_the_disk_is_lost_in_the_middle_and_the_newest_version_comes_from_a_peer(
    tmp_path: Path, strategy: str, with_versions: bool
) -> None:
    """The backup is of round 2, the disk is lost in round 5 or later."""
    file = tmp_path / "backup.tar"
    fleet = Fleet(tmp_path)
    spec = {"rounds": 9, "quorum": 2, "seed": 5, "strategy": strategy}
    try:
        async with fleet.up():
            await joined(fleet)
            undisturbed = await fleet.finished(fleet.start(**spec))
            run_id = fleet.start(**spec)
            await until(lambda: len(kept_rounds(fleet, run_id)) >= 2)
            backup.write(fleet.home, file, with_versions=with_versions)
            await until(lambda: len(kept_rounds(fleet, run_id)) >= 5)
            before = fleet.hub.runs.find(run_id)
        shutil.rmtree(fleet.home)
        backup.restore(file, fleet.home, from_peers=True)
        async with fleet.up():
            run = await fleet.finished(run_id)
            (recalled,) = fleet.facts(run_id, run_events.VersionRecalled)
            # At most the round that was under way is done again.
            assert recalled.version.round >= before.round - 1
            assert recalled.version.digest in {c.digest for c in undisturbed.history}
            assert run.state is RunState.FINISHED
            if strategy == "fedavg":  # momentum is not with the peers: it begins anew
                assert run.head == undisturbed.head
            assert fleet.hub.weight_store.verify_digest(run.head)
            await fleet.close()
    finally:
        await fleet.close()


def test_a_backup_has_what_peers_have_signed(tmp_path: Path) -> None:
    home, _ = settings.init(["localhost"])
    SqliteLedger(home / "ledger.db").close()
    head = LogHead("f" * 16, 0, 1, bytes(32), 7, bytes(32), 1.0)
    with contextlib.closing(SeenHeads(home)) as seen:
        seen.add("ada", head, b"a statement")
        backup.write(home, tmp_path / "backup.tar", with_versions=False)  # while it is open
    backup.restore(tmp_path / "backup.tar", tmp_path / "again")
    with contextlib.closing(SeenHeads(tmp_path / "again")) as seen:
        assert seen.all() == [StoredStatement("ada", 7, b"a statement")]
    (home / "seen.db").write_bytes(b"no database" * 1000)
    with pytest.raises(HomeError, match=r"seen\.db"):
        backup.write(home, tmp_path / "other.tar", with_versions=False)


async def test_a_finished_run_gets_its_model_back(tmp_path: Path) -> None:
    file = tmp_path / "backup.tar"
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            await joined(fleet)
            run = await fleet.finished(fleet.start(rounds=2, quorum=2))
            backup.write(fleet.home, file, with_versions=False)
        shutil.rmtree(fleet.home)
        backup.restore(file, fleet.home, from_peers=True)
        async with fleet.up():
            await until(lambda: fleet.hub.weight_store.has(run.head))
            again = await fleet.finished(run.id)
            assert (again.state, again.head, again.best) == (run.state, run.head, run.best)
            await fleet.close()
    finally:
        await fleet.close()


async def test_a_forged_or_damaged_version_is_refused_and_the_next_holder_asked(
    tmp_path: Path,
) -> None:
    file = tmp_path / "backup.tar"
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            await joined(fleet)
            run = await fleet.finished(fleet.start(rounds=2, quorum=2))
            backup.write(fleet.home, file, with_versions=False)
        shutil.rmtree(fleet.home)
        backup.restore(file, fleet.home, from_peers=True)
        # The one that is asked first tells of the version, and has lost it when it is to send it.
        first = min(fleet.agents, key=lambda agent: agent.peer)
        copy = fleet.folder / first.machine.name / "cache" / f"{run.head}.safetensors"
        assert first.client is not None
        answer = first.client._queries.recall

        def forgetful(work: Work) -> RecordDict:
            if work.kind == "recall":
                copy.write_bytes(copy.read_bytes()[:-1] + b"?")
            return answer(work)

        first.client._queries = Queries(recall=forgetful)
        async with fleet.up():
            await until(lambda: fleet.hub.weight_store.has(run.head))
            again = await fleet.finished(run.id)
            assert again.head == run.head
            (recalled,) = fleet.facts(run.id, run_events.VersionRecalled)
            assert recalled.by != first.peer
            await fleet.close()
    finally:
        await fleet.close()


# --- the file --------------------------------------------------------------------------------


async def a_backup(tmp_path: Path) -> tuple[Path, Path]:
    """A home with a run in it, and its backup."""
    file = tmp_path / "backup.tar"
    async with fleet_of(tmp_path, *DATA) as fleet:
        await fleet.finished(fleet.start(rounds=1, quorum=2))
        backup.write(fleet.home, file, with_versions=True)
        return fleet.home, file


async def test_a_restored_home_equals_the_original(tmp_path: Path) -> None:
    home, file = await a_backup(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    again = tmp_path / "again"
    made = backup.restore(file, again)
    for name in made.files:
        assert (again / name).stat().st_mode & 0o077 == 0
        if name not in (backup.LEDGER_FILE, "seen.db"):
            assert (again / name).read_bytes() == (home / name).read_bytes()
    ledgers = [
        SqliteLedger(folder / backup.LEDGER_FILE, read_only=True) for folder in (home, again)
    ]
    first, second = (list(ledger.entries())[: made.entries] for ledger in ledgers)
    assert first == second
    assert any(b'"type":"Restored"' in entry.body for entry in ledgers[1].entries())
    for ledger in ledgers:
        ledger.close()
    with pytest.raises(UsageError, match="not empty"):
        backup.restore(file, again)
    with pytest.raises(UsageError, match="exists already"):
        backup.write(home, file, with_versions=False)


def repacked(
    file: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]
) -> list[tuple[tarfile.TarInfo, bytes]]:
    """Write the backup again with its members changed."""
    with tarfile.open(file) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    change(members)
    with tarfile.open(file, "w") as tar:
        for member, data in members:
            tar.addfile(member, io.BytesIO(data))
    return members


def _named(members: list[tuple[tarfile.TarInfo, bytes]], name: str) -> int:
    return next(n for n, (member, _) in enumerate(members) if member.name == name)


def flip(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    at = _named(members, "ca.key")
    member, data = members[at]
    members[at] = member, data[:-10] + b"?" + data[-9:]


def drop(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    del members[_named(members, "operator.key")]


def add(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    member = tarfile.TarInfo("../escaped")
    member.size = 1
    members.append((member, b"x"))


def link(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    member = members[_named(members, "ca.key")][0]
    member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"


def twice(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members.append(members[_named(members, "ca.key")])


def manifest_last(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members.append(members.pop(0))


def _with_manifest(change: Callable[[Manifest], Manifest]) -> Callable[..., None]:
    def changed(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        member, data = members[0]
        data = msgspec.json.encode(change(msgspec.json.decode(data, type=Manifest)))
        member.size = len(data)
        members[0] = member, data

    changed.__name__ = change.__name__
    return changed


def outside(found: Manifest) -> Manifest:
    escaped = {"versions/../../x": found.files["ca.key"]}
    return msgspec.structs.replace(found, files=found.files | escaped)


def another_ledger(found: Manifest) -> Manifest:
    return msgspec.structs.replace(found, head="0" * 64)


def another_fleet(found: Manifest) -> Manifest:
    return msgspec.structs.replace(found, fleet="0" * 16)


def listing(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


async def test_a_damaged_or_hostile_file_changes_nothing(tmp_path: Path) -> None:
    _, file = await a_backup(tmp_path)
    whole = file.read_bytes()
    again = tmp_path / "again"
    before = listing(tmp_path)
    changes = [flip, drop, add, link, twice, manifest_last]
    changes += [_with_manifest(c) for c in (outside, another_ledger, another_fleet)]
    for change in changes:
        file.write_bytes(whole)
        repacked(file, change)
        with pytest.raises(HomeError):
            backup.restore(file, again)
        assert listing(tmp_path) == before, change.__name__
    for cut in (0, 100, 5000, len(whole) // 2):
        file.write_bytes(whole[:cut])
        with pytest.raises(HomeError):
            backup.restore(file, again)
        assert listing(tmp_path) == before
    file.write_bytes(whole)
    repacked(file, _with_manifest(lambda found: msgspec.structs.replace(found, format=2)))
    with pytest.raises(HomeTooNew):
        backup.restore(file, again)
    assert listing(tmp_path) == before
