"""Moves the ledger of a home between its own file and a database, while no coordinator runs.

The copy is one transaction, and every hash is checked on both sides. Then the settings change, and
only then the source is put aside. So after a crash at any step the same command continues: it finds
either no copy or a whole one.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import tomli_w
from msgspec import Struct

from coordinator.storage import ledger_place, postgres_session
from coordinator.storage.ledger import Ledger
from coordinator.storage.ledger_place import LEDGER_FILE
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.errors import HomeError, NotRunning, UsageError
from protocols.local import homes, settings_file
from protocols.local.atomic_files import fsync_folder, write_private
from protocols.local.failpoints import failpoint
from protocols.local.settings_file import SETTINGS_FILE

#: The target that is the file in the home.
FILE = "file"
#: The name of a file after the move to a database; and the file that is being written.
MOVED, _MOVING = "ledger.db.moved", "ledger.db.moving"


class Moved(Struct, frozen=True, kw_only=True):
    """How many entries were moved, the hash of the last one, and where they are now."""

    entries: int
    head: str
    place: str


def move(home: Path, to: str) -> Moved:
    """Move the ledger to the address of a database, or to FILE. If it fails, the source is as it
    was and stays in use.

    Raises UsageError, HomeLocked (a coordinator runs), HomeError, Unreachable, Refused.
    """
    if ledger_place.VARIABLE in os.environ:
        raise UsageError(
            f"{ledger_place.VARIABLE} is set, and wins over the settings that a move changes",
            "unset it for this command, and set it again afterwards if you need it",
        )
    if to != FILE:
        ledger_place.check_address(to)
    hint = "stop the coordinator first; runs continue when it starts again"
    with homes.hold(home, f"a program uses the ledger of {home}", hint):
        if to == FILE:
            return _to_file(home)
        return _to_database(home, to)


def _to_database(home: Path, to: str) -> Moved:
    file, present = home / LEDGER_FILE, ledger_place.address_of(home)
    if present == to and not file.exists():
        raise UsageError("the ledger is there already", "commonweight up")
    if present and present != to:
        source = ledger_place.open_ledger(home)
    elif file.exists():  # with a setting: the end of a move that was interrupted
        source = SqliteLedger(file)
    else:
        raise NotRunning(
            f"there is no ledger in {home} yet, so there is nothing to move",
            f'write this line to {home / SETTINGS_FILE}: ledger = "{to}"',
        )
    with (
        contextlib.closing(source),
        contextlib.closing(ledger_place.open_database(home, to)) as target,
    ):
        moved = _copy(source, target, postgres_session.shown(to))
        _choose(home, to)
        if present and present != to:
            _retire(source, moved.place)
    if file.exists():
        file.replace(home / MOVED)
        fsync_folder(home)
    return moved


def _to_file(home: Path) -> Moved:
    file, moving = home / LEDGER_FILE, home / _MOVING
    if not (present := ledger_place.address_of(home)):
        raise UsageError("the ledger is a file of the home already", "commonweight up")
    for name in (_MOVING, f"{_MOVING}-wal", f"{_MOVING}-shm"):  # of a move that was interrupted
        (home / name).unlink(missing_ok=True)
    with contextlib.closing(ledger_place.open_database(home, present)) as source:
        is_there = file.exists()
        with contextlib.closing(SqliteLedger(file if is_there else moving)) as target:
            moved = _copy(source, target, str(file))
        if not is_there:
            moving.replace(file)
            fsync_folder(home)
        failpoint("ledger.renamed")
        _choose(home, "")
        _retire(source, moved.place)
    return moved


def _copy(source: Ledger, target: Ledger, place: str) -> Moved:
    """Fill the target unless it is a whole copy already, and compare both."""
    last, found = source.newest(), target.newest()
    if found is None:
        target.load(source.entries())
    failpoint("ledger.loaded")
    if target.newest() != last or target.verify() is not None:
        raise HomeError(
            f"{place} has entries of another ledger, or newer ones",
            "nothing was changed; name an empty schema, or move that file away",
        )
    return Moved(entries=last.seq if last else 0, head=last.hash.hex() if last else "", place=place)


def _choose(home: Path, address: str) -> None:
    """Write the place of the ledger to the settings."""
    with settings_file.locked(home):
        values = settings_file.read_file(home)
        values.pop(ledger_place.SETTING, None)
        if address:
            values[ledger_place.SETTING] = address
        write_private(home / SETTINGS_FILE, tomli_w.dumps(values).encode())
    failpoint("ledger.chosen")


def _retire(source: Ledger, to: str) -> None:
    """Mark the database, which then refuses to be opened, so that its log gets no new entry."""
    from coordinator.storage.postgres_ledger import PostgresLedger

    if isinstance(source, PostgresLedger):
        source.mark_moved(to)
