"""A PostgreSQL server, and addresses of ledgers in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest

from coordinator.storage.postgres_ledger import PostgresLedger
from tests.support import postgres

FLEET = "ABCDEFGH"
_number = itertools.count(1)


@pytest.fixture(scope="session")
def server() -> Iterator[postgres.Server]:
    if (programs := postgres.programs()) is None:
        pytest.skip("PostgreSQL is not on this machine (make cluster-setup)")
    with postgres.running(programs) as started:
        yield started


@pytest.fixture
def admin(server: postgres.Server) -> Iterator[psycopg.Connection[Any]]:
    """A connection of the owner of the database, which an earlier test may have left dead."""
    if server.process is None or server.process.poll() is not None:
        server.start()
    with psycopg.connect(server.url, password=postgres.PASSWORD, autocommit=True) as db:
        yield db


@pytest.fixture
def address(
    server: postgres.Server, admin: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> str:
    """The address of a ledger in an empty schema; the environment has the password."""
    monkeypatch.setenv("PGPASSWORD", postgres.PASSWORD)
    schema = f"fleet{next(_number)}"
    admin.execute(f"CREATE SCHEMA {schema}")
    return f"{server.url}?options=-csearch_path%3D{schema}"


@pytest.fixture
def opened(address: str) -> Iterator[Callable[..., PostgresLedger]]:
    """Opens ledgers at the address, and closes them after the test."""
    made: list[PostgresLedger] = []

    def open_one(fleet: str = FLEET, **options: Any) -> PostgresLedger:
        made.append(PostgresLedger(address, fleet, **options))
        return made[-1]

    yield open_one
    for ledger in made:
        ledger.close()
