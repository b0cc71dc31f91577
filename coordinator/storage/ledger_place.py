"""Where the ledger of a home is: in its own `ledger.db`, or in the database that `ledger` names."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from coordinator.storage import ca_files, postgres_session
from coordinator.storage.ledger import Ledger
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.enrollment import ca_chain
from protocols.errors import HomeError, NotRunning, UsageError
from protocols.local import settings_file

LEDGER_FILE = "ledger.db"
SETTING, VARIABLE = "ledger", "COMMONWEIGHT_LEDGER"


def address_of(home: Path) -> str:
    """The address of the database with the ledger; empty if it is a file of the home.

    Raises UsageError if it cannot be an address, or has a password.
    """
    address = os.environ.get(VARIABLE, settings_file.read_file(home).get(SETTING, ""))
    return check_address(address) if address else ""


def check_address(address: object) -> str:
    """The address, if it is one of a database. Raises UsageError, MissingPackage."""
    if not isinstance(address, str) or not address.startswith(postgres_session.SCHEMES):
        raise UsageError(
            f"{SETTING} cannot be {address!r}",
            "write it as postgresql://user@host:5432/database; without it, the ledger is "
            f"{LEDGER_FILE} in the home",
        )
    return postgres_session.check_address(address)


def exists(home: Path) -> bool:
    """True if the home has a ledger, or names a database for it."""
    return bool(address_of(home)) or (home / LEDGER_FILE).exists()


def open_ledger(home: Path, *, read_only: bool = False, patient: bool = False) -> Ledger:
    """The ledger of this home. Raises HomeError and its kin, Unreachable, Refused, UsageError.

    `read_only`: for readers beside the one writer; NotRunning if there is no ledger yet.
    `patient`: wait until no other process writes to it.
    """
    address, file = address_of(home), home / LEDGER_FILE
    if not address:
        if read_only and not file.exists():
            raise NotRunning(f"there is no ledger in {home} yet", "start it: commonweight up")
        return SqliteLedger(file, read_only=read_only)
    if file.exists():
        raise HomeError(
            f"this home has two ledgers: {file} and the database of the setting {SETTING!r}",
            f"copy the file there: commonweight admin ledger move --to ADDRESS; or "
            f"rename {LEDGER_FILE} if the database has the newer one",
        )
    return open_database(home, address, read_only=read_only, patient=patient)


@contextlib.contextmanager
def reading(home: Path) -> Iterator[Ledger]:
    """The ledger of this home for a reader beside the writer. Raises as `open_ledger`."""
    with contextlib.closing(open_ledger(home, read_only=True)) as ledger:
        yield ledger


def open_database(
    home: Path, address: str, *, read_only: bool = False, patient: bool = False
) -> Ledger:
    """The ledger of this home's fleet in a database. Raises as `open_ledger`."""
    from coordinator.storage.postgres_ledger import PostgresLedger

    return PostgresLedger(address, fleet_of(home), read_only=read_only, patient=patient)


def copy_to_file(home: Path, file: Path) -> None:
    """Copy the ledger in the database as it is at one moment to a new file."""
    with (
        reading(home) as ledger,
        contextlib.closing(SqliteLedger(file)) as copy,
    ):
        copy.load(ledger.entries())


def fleet_of(home: Path) -> str:
    """The id of the fleet, which a new CA does not change. Raises HomeError."""
    try:
        return ca_chain.fleet_of(*ca_files.read_public(home))
    except OSError as err:
        raise HomeError(f"{home} has no CA", "make one: commonweight init") from err
