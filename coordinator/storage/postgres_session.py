"""PostgreSQL for the ledger: its address, connections, tables and rights.

The address is a URL of libpq, without a password. The parameters of TLS and others pass through:
postgresql://user@host/database?sslmode=verify-full&options=-csearch_path%3Dfleet_a
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from coordinator.storage.ledger import FORMAT
from protocols.errors import (
    CommonweightError,
    HomeError,
    HomeTooNew,
    NotRunning,
    Refused,
    Unreachable,
    UsageError,
)
from protocols.extras import needs_extra

if TYPE_CHECKING:
    from psycopg import Connection

SCHEMES = ("postgresql://", "postgres://")
#: The service name of the password in the system's keyring; its user name is the address.
KEYRING = "commonweight"
PASSWORD = "PGPASSWORD"
#: A partition is noticed after this time. An address can have values of its own.
_CONNECTION = {
    "connect_timeout": "3",
    "tcp_user_timeout": "6000",
    "keepalives_idle": "3",
    "keepalives_interval": "2",
    "keepalives_count": "2",
    "application_name": "commonweight",
    "client_encoding": "utf8",
}
#: `commonweight_fleet` has one row: which fleet this is, and who leads it until when.
TABLES = f"""
CREATE TABLE commonweight_fleet (
    one boolean PRIMARY KEY DEFAULT true CHECK (one),
    fleet text NOT NULL, format integer NOT NULL DEFAULT {FORMAT},
    holder text NOT NULL DEFAULT '', epoch bigint NOT NULL DEFAULT 0,
    expires timestamptz NOT NULL DEFAULT '-infinity', moved_to text NOT NULL DEFAULT '');
CREATE TABLE commonweight_log (
    seq bigint PRIMARY KEY CHECK (seq > 0), at double precision NOT NULL, subject text NOT NULL,
    body bytea NOT NULL, hash bytea NOT NULL);
CREATE INDEX commonweight_log_subject ON commonweight_log (subject, seq);
"""
#: What a role needs that did not create the tables: it can neither change nor delete entries.
_RIGHTS = {
    "commonweight_fleet": ("SELECT", "INSERT", "UPDATE"),
    "commonweight_log": ("SELECT", "INSERT"),
}
GRANTS = "".join(f"GRANT {', '.join(r)} ON {t} TO {{role}};\n" for t, r in _RIGHTS.items())
#: Held while tables are created, so that two starts do not create them twice.
_CREATION = 0x636F6D6D
#: Otherwise `hang_up` could end another connection, which has got the number of a closed one.
_ending = threading.Lock()
#: A new connection is usable within this time after it was opened.
_SET_WITHIN_S = 3.0


def check_address(address: str) -> str:
    """The address. Raises UsageError if libpq cannot read it, or it has a password."""
    with needs_extra("cluster", "a ledger in PostgreSQL"):
        from psycopg import ProgrammingError, conninfo
    try:
        given = conninfo.conninfo_to_dict(address)
    except ProgrammingError as err:
        raise UsageError(
            f"the address of the ledger cannot be read: {first_line(err)}",
            "write it as postgresql://user@host:5432/database",
        ) from err
    if given.get("password"):
        raise UsageError(
            "the address of the ledger has a password, which every reader of the settings sees",
            f"leave it out; set {PASSWORD}, or use ~/.pgpass or the system's keyring",
        )
    return address


def shown(address: str) -> str:
    """The address for a person: host and database, without parameters."""
    return address.partition("?")[0]


def connect(address: str) -> Connection[Any]:
    """A connection in which each statement is a durable transaction of its own.

    Raises Unreachable (no answer), Refused (the server refuses the user or the database).
    """
    import psycopg
    from psycopg import conninfo

    words: dict[str, Any] = {**_CONNECTION, **conninfo.conninfo_to_dict(address)}
    if password := _keyring_password(address):
        words["password"] = password
    try:
        db = psycopg.connect(**words, autocommit=True)
    except psycopg.Error as err:
        text = f"the ledger {shown(address)} cannot be opened: {first_line(err)}"
        if "FATAL" in str(err) or "no password supplied" in str(err):
            raise Refused(
                text, f"correct the address, or the password ({PASSWORD}, ~/.pgpass)"
            ) from err
        raise Unreachable(text, "start the database, or correct the address") from err
    try:
        with answered_within(db, _SET_WITHIN_S):
            if db.execute("SHOW synchronous_commit").fetchone() == ("off",):
                db.execute("SET synchronous_commit = on")
            db.execute("SET lock_timeout = '5s'")
    except psycopg.Error as err:
        close(db)
        raise Unreachable(f"the ledger {shown(address)} does not answer: {err}") from err
    return db


@contextlib.contextmanager
def answered_within(db: Connection[Any], limit_s: float) -> Iterator[None]:
    """End the connection if the statement in the block takes longer, which raises psycopg.Error.

    A server that hangs, or a proxy in between, keeps a connection alive without an answer.
    """
    timer = threading.Timer(limit_s, hang_up, (db,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def hang_up(db: Connection[Any] | None) -> None:
    """End a connection from another thread: its statement, if any, raises psycopg.Error."""
    if db is None:
        return
    with _ending, contextlib.suppress(Exception):  # it may be closed by now
        hung = socket.socket(fileno=os.dup(db.fileno()))
        hung.shutdown(socket.SHUT_RDWR)
        hung.close()


def close(db: Connection[Any]) -> None:
    """Close a connection that another thread may be ending."""
    with _ending:
        db.close()


def _keyring_password(address: str) -> str:
    """Empty if libpq finds the password itself, or the keyring has none."""
    if os.environ.get(PASSWORD):
        return ""
    try:
        import keyring
        from keyring.errors import KeyringError
    except ImportError:
        return ""
    try:
        return keyring.get_password(KEYRING, address) or ""
    except (KeyringError, OSError):
        return ""


def prepare(db: Connection[Any], address: str, fleet: str) -> None:
    """Check that a coordinator of this fleet can write here, and create what is missing.

    Raises HomeError and its kin before anything is changed.
    """
    row = db.execute("SELECT current_schema(), pg_is_in_recovery()").fetchone()
    schema, is_standby = row or (None, False)
    if is_standby:
        raise HomeError(
            f"{shown(address)} is a standby server, which takes no entries",
            "name the primary, or all servers with target_session_attrs=read-write",
        )
    if schema is None:
        raise HomeError(
            f"{shown(address)} has no schema that this user may use",
            "let its owner run CREATE SCHEMA NAME and GRANT USAGE ON SCHEMA NAME TO USER, and name "
            "it in the address: ?options=-csearch_path%3DNAME",
        )
    if _has_tables(db, address):
        _check_rights(db, address, _RIGHTS)
        _check_format(db, address)
        found = _fleet_of(db)
        if found is None and db.execute("SELECT 1 FROM commonweight_log LIMIT 1").fetchone():
            raise HomeError(f"the ledger {shown(address)} names no fleet", _RESTORE)
        if found is None:
            db.execute(_ENTER, (fleet,))
        check_fleet(db, address, fleet)
        return
    may_create = db.execute("SELECT has_schema_privilege(%s, 'CREATE')", (schema,)).fetchone()
    if may_create != (True,):
        raise HomeError(
            f"this user cannot create tables in the schema {schema} of {shown(address)}",
            "let its owner run the SQL of: commonweight admin ledger schema --grant USER",
        )
    with db.transaction():
        db.execute("SELECT pg_advisory_xact_lock(%s)", (_CREATION,))
        if not _has_tables(db, address):
            db.execute(TABLES)
            db.execute(_ENTER, (fleet,))
    check_fleet(db, address, fleet)


_ENTER = "INSERT INTO commonweight_fleet (fleet) VALUES (%s) ON CONFLICT DO NOTHING"
_RESTORE = "restore the database from a backup, or name an empty schema"


def _has_tables(db: Connection[Any], address: str) -> bool:
    query = "SELECT to_regclass(name) IS NOT NULL FROM unnest(%s::text[]) AS name"
    found = {is_there for (is_there,) in db.execute(query, (list(_RIGHTS),))}
    if found == {True, False}:
        raise HomeError(f"{shown(address)} has only a part of the ledger's tables", _RESTORE)
    return found == {True}


def _check_rights(db: Connection[Any], address: str, needed: Mapping[str, Sequence[str]]) -> None:
    for table, rights in needed.items():
        for right in rights:
            row = db.execute("SELECT has_table_privilege(%s, %s)", (table, right)).fetchone()
            if row != (True,):
                raise HomeError(
                    f"this user lacks the right {right} on {table} of {shown(address)}",
                    "let its owner run the SQL of: commonweight admin ledger schema --grant USER",
                )


def _check_format(db: Connection[Any], address: str) -> None:
    row = db.execute("SELECT max(format) FROM commonweight_fleet").fetchone()
    found = (row and row[0]) or FORMAT
    if found > FORMAT:
        raise HomeTooNew(
            f"the ledger {shown(address)} has format {found}; this version writes {FORMAT}",
            "update commonweight on this machine",
        )


def _fleet_of(db: Connection[Any]) -> tuple[str, str] | None:
    row = db.execute("SELECT fleet, moved_to FROM commonweight_fleet").fetchone()
    return (row[0], row[1]) if row else None


def check_fleet(db: Connection[Any], address: str, fleet: str) -> None:
    """Raise HomeError unless the ledger is this fleet's and was not moved away."""
    found, moved_to = _fleet_of(db) or (fleet, "")
    if found != fleet:
        raise HomeError(
            f"the ledger {shown(address)} is that of another fleet, {found}; this home has {fleet}",
            "give each fleet a schema of its own: ?options=-csearch_path%3DNAME",
        )
    if moved_to:
        raise HomeError(
            f"the ledger {shown(address)} was moved to {moved_to}", "use that one, or a new schema"
        )


def check_readable(db: Connection[Any], address: str, fleet: str) -> None:
    """Raise NotRunning (no ledger yet), HomeError or HomeTooNew unless it can be read."""
    if not _has_tables(db, address):
        raise NotRunning(f"there is no ledger in {shown(address)} yet", "start it: commonweight up")
    _check_rights(db, address, dict.fromkeys(_RIGHTS, ("SELECT",)))
    _check_format(db, address)
    check_fleet(db, address, fleet)


def first_line(err: object) -> str:
    """An error of the database as one line."""
    return str(err).strip().partition("\n")[0][:500]


def error_of(err: Exception, address: str) -> CommonweightError:
    """The error of the database as ours, at the start."""
    from psycopg import OperationalError

    if isinstance(err, OperationalError):
        return Unreachable(f"the ledger {shown(address)} does not answer: {first_line(err)}")
    return HomeError(f"the ledger {shown(address)} cannot be used: {first_line(err)}", _RESTORE)
