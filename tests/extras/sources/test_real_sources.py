"""Real workbooks of Excel, files of DuckDB and a PostgreSQL server as the owner's data."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import duckdb
import openpyxl
import psycopg
import pytest
from msgspec.structs import replace

from agent.analytics import job_handler
from agent.data import open_table
from agent.data.settings import DataSettings
from agent.data.sources import PASSWORD
from agent.home import settings
from agent.home.settings_schema import AgentSettings
from agent.setup import own_data
from agent.trainer import sandbox_rules
from agent.trainer.spooled_table import SpooledTable
from protocols.errors import CommonweightError, DataError, UsageError
from tests.support import postgres

ROWS = [
    (1, 0.1, "f", True, datetime.date(2026, 5, 1), Decimal("12.50")),
    (2, None, "YES; or no", False, datetime.date(2026, 5, 2), Decimal("-1.00")),
    (3, -2.5e-9, None, None, None, None),
]
NAMES = ("id", "dose", "sex", "smoker", "seen", "cost")
TEXTS = [
    ("1", "0.1", "f", "true", "2026-05-01", "12.50"),
    ("2", None, "YES; or no", "false", "2026-05-02", "-1.00"),
    ("3", "-2.5e-09", None, None, None, None),
]
TABLE = (
    "CREATE TABLE visits (id INTEGER, dose DOUBLE PRECISION, sex VARCHAR, smoker BOOLEAN, "
    "seen DATE, cost NUMERIC(8, 2))"
)


def read(path: str) -> list[tuple[str | None, ...]]:
    reader = open_table(DataSettings(path=path))
    assert reader.columns() == NAMES
    rows: list[tuple[str | None, ...]] = []
    for batch in reader.batches(NAMES):
        rows += zip(*(column.to_pylist() for column in batch.columns), strict=True)
    return rows


def test_a_sheet_of_a_workbook(tmp_path: Path) -> None:
    book = openpyxl.Workbook()
    book.active.title = "Notes"
    book.active.append(["nothing"])
    sheet = book.create_sheet("May 2026")
    sheet.append([*NAMES, None])
    for row in ROWS:
        sheet.append([None if value is None else value for value in row])
        sheet.append([None] * 6)  # an empty line is no row
    path = tmp_path / "visits.xlsx"
    book.save(path)
    found = read(f"{path}?sheet=May 2026")
    # Excel has times, and numbers without trailing zeros.
    assert [row[:4] for row in found] == [row[:4] for row in TEXTS]
    assert [row[4] for row in found] == ["2026-05-01 00:00:00", "2026-05-02 00:00:00", None]
    assert open_table(DataSettings(path=str(path))).columns() == ("nothing",)
    with pytest.raises(DataError, match="no such sheet") as wrong:
        open_table(DataSettings(path=f"{path}?sheet=June")).columns()
    assert "Notes, May 2026" in wrong.value.hint
    (tmp_path / "text.xlsx").write_text("id,dose\n1,2\n")
    with pytest.raises(DataError, match="no workbook of Excel"):
        open_table(DataSettings(path=str(tmp_path / "text.xlsx"))).columns()
    with pytest.raises(UsageError, match="there are no data at"):
        own_data.check_setting(AgentSettings(data=str(tmp_path / "none.xlsx?sheet=A")))


def test_sheets_as_people_have_them(tmp_path: Path) -> None:
    """Dates and numbers in texts are read; a title or merged header cells are refused."""

    def saved(name: str, *rows: list[object]) -> str:
        book = openpyxl.Workbook()
        for row in rows:
            book.active.append(row)
        book.save(tmp_path / name)
        return str(tmp_path / name)

    def batches(path: str) -> list[list[str | None]]:
        reader = open_table(DataSettings(path=path))
        return [c.to_pylist() for batch in reader.batches(reader.columns()) for c in batch.columns]

    path = saved("good.xlsx", ["n", "d", "e"], ["12", datetime.date(2026, 3, 1), "#DIV/0!"])
    assert batches(path) == [["12"], ["2026-03-01 00:00:00"], ["#DIV/0!"]]
    for name, rows in (
        ("title", [["Report of May"], [None, None], ["age", "ill"], [41, "no"]]),
        ("merged", [["age", "lab", None], [None, "a", "b"], [41, 1.5, 2.5]]),
    ):
        with pytest.raises(DataError, match="values in a column without a name") as wrong:
            batches(saved(f"{name}.xlsx", *rows))
        assert "delete a title above the header" in wrong.value.hint


def test_a_duckdb_file(tmp_path: Path) -> None:
    path = tmp_path / "clinic.duckdb"
    with duckdb.connect(str(path)) as made:
        made.execute("CREATE SCHEMA ward")
        made.execute(TABLE.replace("visits", "ward.visits"))
        made.executemany("INSERT INTO ward.visits VALUES (?, ?, ?, ?, ?, ?)", ROWS)
    before = path.read_bytes()
    assert read(f"{path}?table=ward.visits") == TEXTS
    assert read(f"{path}?query=SELECT * FROM ward.visits WHERE id < 3") == TEXTS[:2]
    for wrong in ("table=nothing", "query=DELETE FROM ward.visits RETURNING id"):
        with pytest.raises(DataError, match="the database cannot be read"):
            open_table(DataSettings(path=f"{path}?{wrong}")).columns()
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    if (programs := postgres.programs()) is None:
        pytest.skip("PostgreSQL is not on this machine (apt install postgresql)")
    with postgres.running(programs) as started:
        made = psycopg.connect(started.url, password=postgres.PASSWORD, autocommit=True)
        made.execute(TABLE)
        with made.cursor() as cursor:
            cursor.executemany("INSERT INTO visits VALUES (%s, %s, %s, %s, %s, %s)", ROWS)
            cursor.execute(
                "CREATE TABLE numbers AS SELECT i, i * 2 AS j FROM generate_series(1, 100000) AS i"
            )
        made.close()
        yield started


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PASSWORD, postgres.PASSWORD)


@pytest.mark.usefixtures("login")
def test_a_table_of_postgresql(server: postgres.Server) -> None:
    assert read(f"{server.url}?table=visits") == TEXTS
    assert read(f"{server.url}?table=public.visits") == TEXTS
    query = "SELECT *, '50%'::text FROM visits WHERE sex LIKE 'Y%' ORDER BY id"
    reader = open_table(DataSettings(path=f"{server.url}?query={query}"))
    assert [batch.column(0).to_pylist() for batch in reader.batches(["id"])] == [["2"]]
    whole = open_table(DataSettings(path=f"{server.url}?table=numbers"))
    assert sum(len(batch) for batch in whole.batches(["j"])) == 100_000
    assert max(len(batch) for batch in whole.batches(["j"])) < 20_000, "a part at a time"


@pytest.mark.usefixtures("login")
def test_postgresql_is_only_read(server: postgres.Server) -> None:
    for query in ("DELETE FROM visits RETURNING *", "SELECT setval('x', 1) FROM visits"):
        with pytest.raises(DataError, match="the database cannot be read"):
            open_table(DataSettings(path=f"{server.url}?query={query}")).columns()
    assert read(f"{server.url}?table=visits") == TEXTS


def test_a_wrong_login_is_said_without_the_password(
    server: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD, "not the secret")
    with pytest.raises(UsageError, match="the database cannot be read") as refused:
        own_data.check_setting(AgentSettings(data=f"{server.url}?table=visits"))
    assert "password authentication failed" in refused.value.hint
    assert "not the secret" not in f"{refused.value.message}{refused.value.hint}"
    nobody = "postgresql://owner@127.0.0.1:1/postgres?table=visits"
    with pytest.raises(UsageError, match="the database cannot be read"):
        own_data.check_setting(AgentSettings(data=nobody))


@pytest.mark.usefixtures("login")
@pytest.mark.skipif(sys.platform != "linux", reason="the helper is of Linux")
def test_the_helper_reads_it_for_a_trainer_in_the_sandbox(
    server: postgres.Server, tmp_path: Path
) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    chosen = AgentSettings(data=f"{server.url}?table=visits")
    rules = replace(sandbox_rules.make_rules(chosen, write=(), spool=spool), reader="arrow")
    assert rules.table == chosen.data
    assert not rules.network, "the trainer itself has no connection"
    watch = os.pidfd_open(os.getpid())
    try:
        table = SpooledTable(rules, watch)
        assert read(str(table.folder())) == TEXTS
        table.delete()
        broken = SpooledTable(replace(rules, table=f"{server.url}?table=nothing"), watch)
        with pytest.raises(CommonweightError, match="the database cannot be read"):
            broken.folder()
    finally:
        os.close(watch)


@pytest.mark.usefixtures("login")
def test_questions_reach_the_database_from_their_sandbox(
    server: postgres.Server, tmp_path: Path
) -> None:
    """The process that answers has a connection and the password; a trainer has neither."""
    home = tmp_path / "home"
    home.mkdir()
    chosen = settings.change(home, data=f"{server.url}?table=visits")
    program, environment = job_handler.child_program(home)
    assert environment[PASSWORD] == postgres.PASSWORD
    done = subprocess.run(
        [sys.executable, "-m", *program[:-1], "tests.support.table_columns", chosen.data],
        env=environment,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert done.stdout.strip() == str(NAMES), done.stderr


def test_the_password_comes_from_the_keyring(
    server: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    import keyring
    from keyring.backend import KeyringBackend

    class Memory(KeyringBackend):
        priority = 1.0

        def get_password(self, service: str, username: str) -> str | None:
            known = (service, username) == ("commonweight", server.url)
            return postgres.PASSWORD if known else None

        def set_password(self, service: str, username: str, password: str) -> None:
            raise NotImplementedError

        def delete_password(self, service: str, username: str) -> None:
            raise NotImplementedError

    monkeypatch.delenv(PASSWORD, raising=False)
    before = keyring.get_keyring()
    keyring.set_keyring(Memory())
    try:
        assert read(f"{server.url}?table=visits") == TEXTS
    finally:
        keyring.set_keyring(before)
