"""Backup of the coordinator's home to one file, and restore.

A backup is a tar: first `manifest.json`, which names every other member with its SHA-256 and size,
then these members. It contains the private keys, so its mode is 0600. A restore unpacks it into a
folder beside the home and checks everything there, before it moves the folder into place.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shutil
import sqlite3
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import msgspec
import tomli_w
from msgspec import Struct

from coordinator.fleet.fleet_events import SUBJECT
from coordinator.fleet.registry import Registry
from coordinator.runs import transitions
from coordinator.storage import job_events, ledger_place, run_events, seen_heads, settings
from coordinator.storage.ca_files import CA_FILE, CA_KEY_FILE, CHAIN_FILE, ISSUER_FILE, PENDING_FILE
from coordinator.storage.ledger_place import LEDGER_FILE
from coordinator.storage.seen_heads import SeenHeads
from coordinator.storage.sqlite_ledger import SqliteLedger
from coordinator.storage.weight_store import WeightStore
from protocols import VERSION
from protocols.errors import CommonweightError, HomeError, HomeTooNew, UsageError
from protocols.local import homes, settings_file
from protocols.local.atomic_files import fsync_folder, write_private
from protocols.local.settings_file import SETTINGS_FILE
from protocols.messages.decoding import MALFORMED
from protocols.messages.states import RunState

FORMAT = 1
MANIFEST = "manifest.json"
_KEYS = (CA_FILE, "coordinator.key", "operator.key")
#: A home has one of these: the CA's key, or an issuer while the CA's key is offline.
_SIGNERS = (CA_KEY_FILE, ISSUER_FILE)
_REQUIRED = ("home.json", *_KEYS, LEDGER_FILE)
#: `mqtt.json`: homes of earlier versions have it, with a login that is not used any more.
_OPTIONAL = (SETTINGS_FILE, "mqtt.json", CHAIN_FILE, PENDING_FILE, seen_heads.FILE, *_SIGNERS)
_WEIGHTS = re.compile(r"(versions|states)/([0-9a-f]{64})\.safetensors")
_MAX_MANIFEST_BYTES = 64 * 1024 * 1024
_PIECE_BYTES = 1 << 20


class File(Struct, frozen=True):
    sha256: str
    nbytes: int


class Manifest(Struct, frozen=True, kw_only=True):
    """The contents of a backup. `head` is the hash of the ledger's last entry, `at` is Unix s."""

    format: int = FORMAT
    written_by: str
    at: float
    fleet: str
    entries: int
    head: str
    files: dict[str, File]


def write(home: Path, out: Path, *, with_versions: bool) -> Manifest:
    """Write a backup of the home, also while its coordinator runs. Raises UsageError, HomeError.

    `with_versions`: include the shared weights and the strategies' states on disk.
    """
    if out.exists():
        raise UsageError(
            f"{out} exists already", "choose another name: a backup never replaces a file"
        )
    keys = settings.open_keys(home)
    part = out.with_name(f".{out.name}.{os.getpid()}.part")
    with tempfile.TemporaryDirectory(prefix=".backup-", dir=home) as folder:
        sources = {name: home / name for name in (*_REQUIRED, *_OPTIONAL) if (home / name).exists()}
        # The statements of peers come first, so that none is about later entries of the ledger.
        for name in (seen_heads.FILE, LEDGER_FILE):
            if name in sources:
                sources[name] = Path(folder) / name
                _snapshot(home / name, sources[name])
        if ledger_place.address_of(home):  # then the backup has a copy as a file
            sources[LEDGER_FILE] = Path(folder) / LEDGER_FILE
            ledger_place.copy_to_file(home, sources[LEDGER_FILE])
        elif LEDGER_FILE not in sources:  # before the first start
            sources[LEDGER_FILE] = Path(folder) / LEDGER_FILE
            SqliteLedger(sources[LEDGER_FILE]).close()
        entries, head = _newest(sources[LEDGER_FILE])
        if with_versions:
            for path in sorted([*home.glob("versions/*"), *home.glob("states/*")]):
                name = path.relative_to(home).as_posix()
                if _WEIGHTS.fullmatch(name):
                    sources[name] = path
        try:
            with contextlib.ExitStack() as stack:
                # Open files survive when a round closes and deletes a version.
                files = {n: stack.enter_context(path.open("rb")) for n, path in sources.items()}
                manifest = Manifest(
                    written_by=VERSION,
                    at=time.time(),
                    fleet=keys.fleet,
                    entries=entries,
                    head=head,
                    files={name: _describe(file) for name, file in files.items()},
                )
                _pack(part, manifest, files)
            os.link(part, out)  # unlike a rename, this never replaces a file
            fsync_folder(out.parent)
        except OSError as err:
            raise HomeError(
                f"cannot write the backup {out}: {err.strerror}", "name a file in a folder of yours"
            ) from err
        finally:
            part.unlink(missing_ok=True)
    return manifest


def _snapshot(file: Path, to: Path) -> None:
    """Copy a database as it is at one moment, while the coordinator may write to it."""
    try:
        source = sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)
        with contextlib.closing(source), contextlib.closing(sqlite3.connect(to)) as copy:
            source.backup(copy)
    except sqlite3.DatabaseError as err:
        raise HomeError(f"cannot read {file}: {err}") from err


def _newest(path: Path, *, verify: bool = False) -> tuple[int, str]:
    """The number and the hash of a ledger's last entry. `verify`: check every entry."""
    with contextlib.closing(SqliteLedger(path, read_only=not verify)) as ledger:
        newest = ledger.newest()
    return (newest.seq, newest.hash.hex()) if newest else (0, "")


def _describe(file: IO[bytes]) -> File:
    digest = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    nbytes = file.tell()
    file.seek(0)
    return File(digest, nbytes)


def _pack(part: Path, manifest: Manifest, files: Mapping[str, IO[bytes]]) -> None:
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as out:
        with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
            text = msgspec.json.encode(manifest)
            tar.addfile(_member(MANIFEST, len(text)), io.BytesIO(text))
            for name, file in files.items():
                tar.addfile(_member(name, manifest.files[name].nbytes), file)
        out.flush()
        os.fsync(out.fileno())


def _member(name: str, nbytes: int) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.size, member.mode = nbytes, 0o600
    return member


def restore(file: Path, home: Path, *, from_peers: bool = False, replica: bool = False) -> Manifest:
    """Restore a home from a backup, without its open tickets. Nothing is changed unless the whole
    backup is good.

    `from_peers`: the newest versions of its runs are fetched from the peers, because the
    coordinator's disk is lost and the backup is older. `replica`: only keys and settings are
    restored, for `up --replica` beside the others; the ledger is the one in the database.
    Raises UsageError (the home is not empty), HomeTooNew, HomeError (not a backup, or damaged).
    """
    if home.exists() and (not home.is_dir() or any(home.iterdir())):
        raise UsageError(
            f"{home} is not empty: a restore never replaces files",
            "set COMMONWEIGHT_HOME to another folder, or move this one away",
        )
    home.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=".restoring-", dir=home.parent))
    try:
        with file.open("rb") as source:
            manifest = _unpack(source, fresh)
        _check(fresh, manifest)
        if replica:
            _use_database(fresh)
        else:
            _use_own_ledger(fresh)
            _record_restore(fresh, manifest)
        if from_peers:
            _begin_recall(fresh)
        os.replace(fresh, home)
        fsync_folder(home.parent)
    except (OSError, tarfile.TarError, EOFError) as err:
        raise HomeError(f"cannot restore {file}: {err}", "nothing was changed") from err
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return manifest


def _unpack(source: IO[bytes], folder: Path) -> Manifest:
    """Check each member and write it to the folder. Read as a stream: do not trust the file."""
    with tarfile.open(fileobj=source, mode="r|") as tar:
        members = iter(tar)
        manifest = _manifest(tar, next(members, None))
        missing = dict(manifest.files)
        for member in members:
            expected = missing.pop(member.name, None)
            if expected is None or not member.isreg() or member.size != expected.nbytes:
                raise _damaged(f"{member.name!r} is not what the manifest says")
            path = folder / member.name
            path.parent.mkdir(mode=0o700, exist_ok=True)
            sha = hashlib.sha256()
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                for piece in _pieces(tar, member):
                    sha.update(piece)
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            if sha.hexdigest() != expected.sha256:
                raise _damaged(f"{member.name!r} has other bytes than the manifest says")
    if missing:
        raise _damaged(f"{min(missing)!r} is missing")
    return manifest


def _manifest(tar: tarfile.TarFile, member: tarfile.TarInfo | None) -> Manifest:
    if member is None or member.name != MANIFEST or member.size > _MAX_MANIFEST_BYTES:
        raise _damaged("it does not begin with a manifest")
    try:
        text = b"".join(_pieces(tar, member))
        if (found := msgspec.json.decode(text, type=_Stamp).format) > FORMAT:
            raise HomeTooNew(
                f"this backup has format {found}; this version reads {FORMAT}",
                "update commonweight on this machine",
            )
        manifest = msgspec.json.decode(text, type=Manifest)
    except MALFORMED as err:
        raise _damaged(f"its manifest cannot be read: {err}") from err
    for name, file in manifest.files.items():
        weights = _WEIGHTS.fullmatch(name)
        if not weights and name not in (*_REQUIRED, *_OPTIONAL):
            raise _damaged(f"{name!r} does not belong in a home")
        if weights and weights[2] != file.sha256:
            raise _damaged(f"{name!r} is not named after its digest")
    if absent := set(_REQUIRED) - manifest.files.keys():
        raise _damaged(f"{min(absent)!r} is missing")
    if not manifest.files.keys() & set(_SIGNERS):
        raise _damaged(f"'{_SIGNERS[0]}' is missing")
    return manifest


class _Stamp(Struct, frozen=True):
    format: int


def _pieces(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[bytes]:
    file = tar.extractfile(member)
    while file is not None and (piece := file.read(_PIECE_BYTES)):
        yield piece


def _check(folder: Path, manifest: Manifest) -> None:
    """Open the unpacked files as the coordinator does. Raises HomeError and its kin."""
    homes.check_stamp(folder, "coordinator")
    try:
        fleet = settings.open_keys(folder).fleet
    except (ValueError, TypeError, CommonweightError) as err:
        raise _damaged(f"its keys cannot be used: {err}") from err
    _, head = _newest(folder / LEDGER_FILE, verify=True)
    if seen_heads.FILE in manifest.files:
        with contextlib.closing(SeenHeads(folder)) as seen:
            seen.all()
    if (fleet, head) != (manifest.fleet, manifest.head):
        raise _damaged("its keys or its ledger do not match the manifest")


def _use_own_ledger(home: Path) -> None:
    """Leave the database of the ledger out of the settings: it may have newer entries."""
    values = settings_file.read_file(home)
    if values.pop(ledger_place.SETTING, ""):
        write_private(home / SETTINGS_FILE, tomli_w.dumps(values).encode())


def _use_database(home: Path) -> None:
    """Leave out the copy of the ledger. Raises UsageError if the settings name no database."""
    if not ledger_place.address_of(home):
        raise UsageError(
            "the settings in this backup name no database of the ledger",
            "replicas share one: commonweight admin ledger move, then make a new backup",
        )
    (home / LEDGER_FILE).unlink()


def _record_restore(home: Path, manifest: Manifest) -> None:
    """Record the restore, so that agents learn why versions that they know are gone.

    Open tickets are revoked: the backup does not know which were used or revoked after it.
    """
    with contextlib.closing(SqliteLedger(home / LEDGER_FILE)) as ledger:
        registry = Registry(ledger)
        registry.record_restore(manifest.entries, manifest.at)
        for ticket in [*registry.tickets.values()]:
            if ticket.uses_left > 0 and not ticket.revoked:
                registry.revoke_ticket(ticket.id)


def _begin_recall(home: Path) -> None:
    """Record, for unfinished runs and the newest run, that peers are asked for its versions."""
    store = WeightStore(home)
    with contextlib.closing(SqliteLedger(home / LEDGER_FILE)) as ledger:
        runs = []
        for subject in ledger.subjects():
            if subject != SUBJECT and not subject.startswith(job_events.PREFIX):
                past = [run_events.decode(entry.body) for entry in ledger.entries(subject)]
                runs.append(transitions.replay(subject, past))
        runs = [run for run in runs if not run.deleted]
        for run in runs:
            if not run.ended or (run.state is RunState.FINISHED and run is runs[-1]):
                newest = run.own_rounds[-1].digest if run.own_rounds else run.first
                begun = run_events.RecallBegun(whole=bool(newest) and store.verify_digest(newest))
                ledger.append(run.id, [run_events.encode(begun)])


def _damaged(why: str) -> HomeError:
    return HomeError(
        f"this is not a complete backup: {why}", "nothing was changed; use another backup"
    )
