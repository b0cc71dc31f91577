"""The ledger: what is appended stays, in order, and a change is found."""

from __future__ import annotations

import os
import sqlite3
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.storage.ledger import FORMAT
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.errors import DiskFull, HomeError, HomeTooNew


@pytest.fixture
def ledger(tmp_path: Path) -> SqliteLedger:
    made = SqliteLedger(tmp_path / "ledger.db")
    for number in range(6):
        made.append("run" if number % 2 else "fleet", [f'{{"n":{number}}}'.encode()])
    return made


def bodies(ledger: SqliteLedger, subject: str | None = None) -> list[bytes]:
    return [entry.body for entry in ledger.entries(subject)]


def tamper(ledger: SqliteLedger, *statements: str) -> None:
    """Change the file as somebody else would, behind the ledger's back."""
    with sqlite3.connect(ledger._path) as other:
        for statement in statements:
            other.execute(statement)
    other.close()


def test_entries_come_back_in_order(ledger: SqliteLedger) -> None:
    assert [entry.seq for entry in ledger.entries()] == [1, 2, 3, 4, 5, 6]
    assert bodies(ledger, "run") == [b'{"n":1}', b'{"n":3}', b'{"n":5}']
    assert ledger.subjects() == ["fleet", "run"]
    assert bodies(ledger, "nobody") == []
    assert ledger.verify() is None


def test_a_new_ledger_is_empty_and_private(tmp_path: Path) -> None:
    made = SqliteLedger(tmp_path / "new.db")
    assert made.verify() is None
    assert made.subjects() == []
    made.append("run", [])
    assert bodies(made) == []
    if os.name == "posix":
        assert (tmp_path / "new.db").stat().st_mode & 0o777 == 0o600


@settings(max_examples=15)
@given(lives=st.lists(st.lists(st.lists(st.binary(max_size=20), max_size=3), max_size=3)))
def test_it_survives_every_reopening(
    lives: list[list[list[bytes]]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("ledger") / "ledger.db"
    expected: list[bytes] = []
    for life in lives:
        ledger = SqliteLedger(path)
        for group in life:
            ledger.append("run", group)
            expected += group
        assert bodies(ledger) == expected
        assert ledger.verify() is None
        ledger.close()


@pytest.mark.parametrize(
    ("statements", "found"),
    [
        (("UPDATE log SET body = X'7B7D' WHERE seq = 3",), 3),
        (("UPDATE log SET at = at + 1 WHERE seq = 2",), 2),
        (("UPDATE log SET subject = 'other' WHERE seq = 6",), 6),
        (("UPDATE log SET hash = zeroblob(32) WHERE seq = 4",), 4),
        (("DELETE FROM log WHERE seq = 2",), 2),
        (("DELETE FROM log WHERE seq = 1",), 1),
        (
            (
                "UPDATE log SET seq = 99 WHERE seq = 3",
                "UPDATE log SET seq = 3 WHERE seq = 4",
                "UPDATE log SET seq = 4 WHERE seq = 99",
            ),
            3,
        ),
        (
            (
                "DELETE FROM log WHERE seq = 3",
                "UPDATE log SET seq = seq - 1 WHERE seq > 3",
            ),
            3,
        ),
        (("INSERT INTO log SELECT 7, at, subject, body, hash FROM log WHERE seq = 6",), 7),
    ],
)
def test_a_changed_line_is_found(
    ledger: SqliteLedger, statements: tuple[str, ...], found: int
) -> None:
    tamper(ledger, *statements)
    assert ledger.verify() == found


def test_a_damaged_ledger_is_refused_at_the_start_and_not_touched(
    ledger: SqliteLedger, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.db"
    ledger.append("run", [b'{"find":"me"}'])
    ledger.close()
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'{"find":"me"}', b'{"find":"ne"}'))
    spoilt = path.read_bytes()
    with pytest.raises(HomeError, match=r"damaged: entry 7 .*"):
        SqliteLedger(path)
    assert path.read_bytes() == spoilt
    path.write_bytes(whole)
    assert SqliteLedger(path).verify() is None


def test_a_first_start_that_was_cut_short_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    sqlite3.connect(path).execute("PRAGMA journal_mode=WAL")
    assert path.stat().st_size
    assert bodies(SqliteLedger(path)) == []


def test_a_full_disk_is_said_and_the_ledger_goes_on(ledger: SqliteLedger, tmp_path: Path) -> None:
    before = bodies(ledger)
    (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
    ledger._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(DiskFull, match="full") as caught:
        ledger.append("run", [b"small", b"x" * 100_000])
    assert "free some space" in caught.value.hint
    assert bodies(ledger) == before  # all of a group or nothing of it
    ledger._db.execute(f"PRAGMA max_page_count = {pages + 1000}")
    ledger.append("run", [b"small", b"x" * 100_000])
    assert bodies(ledger)[len(before) :] == [b"small", b"x" * 100_000]
    assert ledger.verify() is None
    ledger.close()
    again = SqliteLedger(tmp_path / "ledger.db")
    assert again.verify() is None
    assert len(bodies(again)) == len(before) + 2


def test_many_threads_make_one_chain(ledger: SqliteLedger) -> None:
    threads = [
        threading.Thread(
            target=lambda: [ledger.append("run", [b"a", b"b"]) for _ in range(10)]  # type: ignore[func-returns-value]
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.verify() is None
    assert bodies(ledger)[6:] == [b"a", b"b"] * 40


def test_a_newer_format_is_refused_and_kept(ledger: SqliteLedger, tmp_path: Path) -> None:
    ledger.close()
    tamper(ledger, f"PRAGMA user_version = {FORMAT + 1}")
    with pytest.raises(HomeTooNew, match=f"format {FORMAT + 1}"):
        SqliteLedger(tmp_path / "ledger.db")


def test_what_is_no_database_is_said(tmp_path: Path) -> None:
    (tmp_path / "junk.db").write_bytes(b"this is no database" * 100)
    (tmp_path / "folder.db").mkdir()
    for name in ("junk.db", "folder.db", "missing/ledger.db"):
        with pytest.raises(HomeError, match="cannot be used"):
            SqliteLedger(tmp_path / name)
    assert (tmp_path / "junk.db").read_bytes() == b"this is no database" * 100
