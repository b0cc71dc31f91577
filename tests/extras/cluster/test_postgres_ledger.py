"""The ledger in a real PostgreSQL: the same entries as in a file, also when both sides crash."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql

from coordinator.storage.ledger import FORMAT, Ledger
from coordinator.storage.postgres_ledger import PostgresLedger
from coordinator.storage.postgres_session import GRANTS, TABLES, check_address
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.errors import (
    HomeError,
    HomeLocked,
    HomeTooNew,
    LeadershipLost,
    LedgerUnreachable,
    NotRunning,
    Refused,
    Unreachable,
    UsageError,
)
from tests.extras.cluster.conftest import FLEET
from tests.support import postgres
from tests.support.environments import ROOT
from tests.support.fault_proxy import BLACKHOLE, CLEAR, Fault, Proxy
from tests.support.waiting import wait_for

Open = Callable[..., PostgresLedger]
Admin = psycopg.Connection[Any]


def schema_of(address: str) -> str:
    return address.rpartition("%3D")[2]


def bodies(ledger: Ledger) -> list[bytes]:
    return [entry.body for entry in ledger.entries()]


def numbers(ledger: Ledger) -> list[int]:
    """The numbers that writers have added, each of whose groups is whole."""
    found = bodies(ledger)
    assert found[1::2] == [body + b" again" for body in found[::2]]
    return [int(body) for body in found[::2]]


def append_patiently(ledger: Ledger, body: bytes) -> None:
    while True:
        try:
            return ledger.append("run", [body])
        except LedgerUnreachable:
            time.sleep(0.1)


@contextlib.contextmanager
def writing(address: str, failpoint: str = "") -> Iterator[subprocess.Popen[str]]:
    """A process that appends, which is killed at the end of the block."""
    words = [sys.executable, "-m", "tests.extras.cluster.writer", address]
    environment = {**os.environ, "COMMONWEIGHT_FAILPOINT": failpoint, "PYTHONPATH": str(ROOT)}
    pipe = subprocess.PIPE
    with subprocess.Popen(words, env=environment, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        try:
            yield process
        finally:
            process.kill()


def test_it_reads_as_a_file_does(opened: Open, tmp_path: Path) -> None:
    ours, theirs = opened(), SqliteLedger(tmp_path / "ledger.db")
    both: tuple[Ledger, Ledger] = (ours, theirs)
    for ledger in both:
        for number in range(100):
            group = [b"%d" % number, b"\x00\xff\\x41'"][: number % 3]
            ledger.append("run-é" if number % 2 else "fleet", group)
        assert ledger.verify() is None
    questions: list[Callable[[Ledger], Any]] = [
        lambda one: [(entry.seq, entry.subject, entry.body) for entry in one.entries()],
        lambda one: [entry.seq for entry in one.entries("fleet", before=50)],
        lambda one: [[e.seq for e in one.entries_after(n, 7)] for n in range(-1, 110)],
        lambda one: [one.entry(n) and one.entry(n).body for n in (0, 1, 50, 99, 101, 2**70)],  # type: ignore[union-attr]
        lambda one: one.subjects(),
        lambda one: one.newest() and one.newest().seq,  # type: ignore[union-attr]
    ]
    reader = opened(read_only=True)
    for ask in questions[:-2]:
        assert ask(ours) == ask(reader)
    assert ours.newest() == reader.newest()
    for place, ask in enumerate(questions):
        if place != 3:
            assert ask(ours) == ask(theirs)
    ours.close()
    again = opened()
    again.append("fleet", [b"later"])
    assert again.verify() is None
    assert [entry.body for entry in again.entries_after(ask(theirs), 5)] == [b"later"]


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("UPDATE commonweight_log SET body = '{}' WHERE seq = 3", 3),
        ("UPDATE commonweight_log SET at = at + 1 WHERE seq = 2", 2),
        ("DELETE FROM commonweight_log WHERE seq = 1", 1),
        ("UPDATE commonweight_log SET hash = 'x' WHERE seq = 4", 4),
    ],
)
def test_a_changed_entry_is_found(
    opened: Open, admin: Admin, address: str, statement: str, found: int
) -> None:
    ledger = opened()
    ledger.append("run", [b"a", b"b", b"c", b"d"])
    admin.execute(f"SET search_path = {schema_of(address)}")
    admin.execute(statement)
    assert ledger.verify() == found
    ledger.close()
    with pytest.raises(HomeError, match=f"damaged: entry {found} "):
        opened()


@pytest.mark.parametrize("nth", [1, 3])
def test_a_writer_that_is_killed_loses_and_doubles_nothing(
    opened: Open, address: str, nth: int
) -> None:
    with writing(address, f"ledger.inserted:{nth}=kill") as process:
        assert process.stdout is not None
        told = process.stdout.read().split()
        assert process.wait(60) == -signal.SIGKILL
    assert told == [str(number) for number in range(nth - 1)]
    again = opened()  # after the end of the lease of the other one
    assert numbers(again) == list(range(nth - 1))
    assert again.verify() is None


def test_a_server_that_is_killed_loses_and_doubles_nothing(
    server: postgres.Server, opened: Open, address: str
) -> None:
    with writing(address) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        told: list[str] = []
        reader = threading.Thread(target=lambda: told.extend(process.stdout or ()))
        reader.start()
        for crash in range(3):
            wait_for(lambda seen=len(told): len(told) > seen + 20, f"work before crash {crash}")
            server.crash()
            time.sleep(0.2 * crash)
            server.start()
        wait_for(lambda seen=len(told): len(told) > seen + 20, "work after the last crash")
        process.stdin.close()
        reader.join(120)
        assert process.wait(60) == 0
    assert [int(line) for line in told] == list(range(len(told)))
    again = opened()
    assert numbers(again) == list(range(len(told)))
    assert again.verify() is None


def test_a_commit_without_an_answer_is_found_and_not_repeated(
    server: postgres.Server, address: str, admin: Admin
) -> None:
    """Lose the connection after the request was sent, before its answer."""
    with Proxy(server.port) as proxy:
        ledger = PostgresLedger(address.replace(str(server.port), str(proxy.port)), FLEET)
        ledger.append("run", [b"0"])
        admin.execute(f"SET search_path = {schema_of(address)}")
        count = "SELECT count(*) FROM commonweight_log"
        unanswered = 0
        for number in range(1, 4):
            body = b"%d" % number
            # A connection that ends before the server has read the request is replaced at once.
            proxy.hold_answers()
            thread = threading.Thread(target=append_patiently, args=(ledger, body))
            thread.start()
            wait_for(
                lambda n=number: admin.execute(count).fetchone() == (n + 1,), "it was committed"
            )
            unanswered += thread.is_alive()
            proxy.fault = Fault(refuse=True)
            proxy.reset()
            time.sleep(0.3)  # the writer finds the server away and asks again
            proxy.fault = CLEAR
            thread.join(60)
            assert not thread.is_alive()
        assert unanswered
        assert bodies(ledger) == [b"0", b"1", b"2", b"3"]
        assert ledger.verify() is None
        # A caller that gives up, and another one that goes on, would no longer agree.
        proxy.hold_answers()
        refused: list[Exception] = []

        def give_up() -> None:
            try:
                ledger.append("fleet", [b"x"])
            except LedgerUnreachable as err:
                refused.append(err)

        gave_up = threading.Thread(target=give_up)
        gave_up.start()
        wait_for(lambda: admin.execute(count).fetchone() == (5,), "it was committed")
        proxy.fault = Fault(refuse=True)
        proxy.reset()
        gave_up.join(60)
        assert refused
        proxy.fault = CLEAR
        append_patiently(ledger, b"4")
        with pytest.raises(LeadershipLost, match="taken for lost"):
            ledger.append("fleet", [b"y"])
        assert bodies(ledger) == [b"0", b"1", b"2", b"3", b"x", b"4"]
        ledger.close()


def test_a_server_that_hangs_is_given_up_and_found_again(
    server: postgres.Server, address: str
) -> None:
    with Proxy(server.port) as proxy:
        ledger = PostgresLedger(address.replace(str(server.port), str(proxy.port)), FLEET)
        ledger.append("run", [b"0"])
        proxy.fault = BLACKHOLE
        with pytest.raises(LedgerUnreachable, match="does not answer"):
            ledger.append("run", [b"1"])
        proxy.fault = CLEAR
        proxy.reset()
        append_patiently(ledger, b"1")
        assert bodies(ledger) == [b"0", b"1"]
        ledger.close()


def test_a_second_writer_is_refused_while_the_first_one_lives(opened: Open) -> None:
    first = opened()
    first.append("run", [b"a"])
    with pytest.raises(HomeLocked, match="another program writes to this ledger"):
        opened()
    first.append("run", [b"b"])
    first.close()
    assert bodies(opened()) == [b"a", b"b"]


def test_a_writer_that_stands_still_is_overtaken_and_writes_no_more(
    opened: Open, address: str
) -> None:
    """Stop a process in the middle of an append, and let another one lead."""
    with writing(address, "ledger.inserted:3=stop") as stopped:
        assert stopped.stdout is not None
        assert [stopped.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
        second = opened(patient=True)
        second.append("run", [b"9", b"9 again"])
        stopped.send_signal(signal.SIGCONT)
        assert stopped.wait(60) == 1, "it ends: another one leads"
        assert numbers(second) == [0, 1, 9]
        assert second.verify() is None


# --- bad input: a clear error before anything is changed ---


def test_addresses_that_cannot_be_used() -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        check_address("postgresql://[half")
    with pytest.raises(UsageError, match="has a password") as told:
        check_address("postgresql://user:secret@host/database")
    assert "secret" not in told.value.message + told.value.hint


def test_a_server_that_is_away_or_refuses(
    address: str, server: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(Unreachable, match="cannot be opened"):
        PostgresLedger(address.replace(str(server.port), "1"), FLEET)
    with pytest.raises(Refused, match='database "nothing" does not exist'):
        PostgresLedger(address.replace("/postgres", "/nothing"), FLEET)
    monkeypatch.setenv("PGPASSWORD", "not the secret")
    with pytest.raises(Refused, match="password authentication failed") as told:
        PostgresLedger(address, FLEET)
    assert "not the secret" not in str(told.value)
    monkeypatch.delenv("PGPASSWORD")
    with pytest.raises(Refused, match="no password supplied"):
        PostgresLedger(address, FLEET)


def test_a_ledger_of_another_fleet_or_a_newer_version(
    opened: Open, admin: Admin, address: str
) -> None:
    """Give two fleets one schema by mistake."""
    opened().close()
    admin.execute(f"SET search_path = {schema_of(address)}")
    rows = "SELECT * FROM commonweight_fleet"
    before = admin.execute(rows).fetchall()
    with pytest.raises(HomeError, match=f"is that of another fleet, {FLEET}; this home has OTHER"):
        opened("OTHER")
    with pytest.raises(HomeError, match="another fleet"):
        opened("OTHER", read_only=True)
    assert admin.execute(rows).fetchall() == before
    admin.execute("UPDATE commonweight_fleet SET format = %s", (FORMAT + 1,))
    with pytest.raises(HomeTooNew, match=f"format {FORMAT + 1}"):
        opened()
    admin.execute("DROP TABLE commonweight_log")
    with pytest.raises(HomeError, match="only a part"):
        opened()


def test_a_reader_creates_nothing(opened: Open, admin: Admin, address: str) -> None:
    with pytest.raises(NotRunning, match="no ledger"):
        opened(read_only=True)
    found = "SELECT count(*) FROM pg_tables WHERE schemaname = %s"
    assert admin.execute(found, (schema_of(address),)).fetchone() == (0,)
    with pytest.raises(HomeError, match="no schema"):
        PostgresLedger(address + "nothing", FLEET)


def test_a_role_that_can_neither_change_nor_delete_entries_is_enough(
    admin: Admin, address: str
) -> None:
    """Change an entry with the login of the coordinator."""
    schema = schema_of(address)
    role = f"role_{schema}"
    words = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
    admin.execute(words.format(sql.Identifier(role), sql.Literal(postgres.PASSWORD)))
    admin.execute(f"GRANT USAGE ON SCHEMA {schema} TO {role}")
    theirs = address.replace("owner@", f"{role}@")
    with pytest.raises(HomeError, match="cannot create tables"):
        PostgresLedger(theirs, FLEET)
    admin.execute(f"SET search_path = {schema}")
    admin.execute(TABLES)
    with pytest.raises(HomeError, match="lacks the right SELECT on commonweight_fleet"):
        PostgresLedger(theirs, FLEET)
    admin.execute(GRANTS.format(role=role))
    ledger = PostgresLedger(theirs, FLEET)
    ledger.append("run", [b"a"])
    for change in ("UPDATE commonweight_log SET body = ''", "DELETE FROM commonweight_log"):
        assert ledger._db is not None
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            ledger._db.execute(change)
    assert bodies(ledger) == [b"a"]
    admin.execute(f"REVOKE SELECT ON commonweight_log FROM {role}")
    with pytest.raises(HomeError, match="lacks the right SELECT on commonweight_log"):
        PostgresLedger(theirs, FLEET, read_only=True)
    ledger.close()
