"""What the path of the data names, and tables of SQLite, which need no further package."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from agent.data import open_table, sources
from agent.data.change_watch import file_stamps
from agent.data.settings import DataSettings, is_spooled, uses_network
from agent.data.sources import Source
from agent.home import settings
from protocols.errors import DataError, UsageError


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/data/visits.csv", Source("files", "/data/visits.csv")),
        ("/data/visits-?.csv", Source("files", "/data/visits-?.csv")),
        ("s3://bucket/visits", Source("files", "s3://bucket/visits")),
        ("/data/v.xlsx", Source("excel", "/data/v.xlsx")),
        ("/data/v.XLSX?sheet=May 2026", Source("excel", "/data/v.XLSX", sheet="May 2026")),
        ("/data/v.duckdb?table=a.b", Source("duckdb", "/data/v.duckdb", table="a.b")),
        (
            "postgresql://me@db:5433/ehr?sslmode=on&query=SELECT a FROM t WHERE b='x&table=y?'",
            Source(
                "sql",
                "postgresql://me@db:5433/ehr?sslmode=on",
                query="SELECT a FROM t WHERE b='x&table=y?'",
            ),
        ),
        ("sqlite:////d/c.db?table=v", Source("sql", "sqlite:////d/c.db", table="v")),
    ],
)
def test_a_path_names_its_source(path: str, expected: Source) -> None:
    assert sources.parse(path) == expected


def test_who_reads_a_source() -> None:
    """A trainer reads files itself. A database needs connections, a sheet does not."""
    assert (is_spooled("/d/a.csv", "arrow"), uses_network("/d/a.csv", "arrow")) == (False, False)
    assert (is_spooled("/d/a.xlsx", "arrow"), uses_network("/d/a.xlsx", "arrow")) == (True, False)
    assert uses_network("postgresql://h/d?table=t", "arrow")
    assert not uses_network("sqlite:////d/c.db?table=t", "arrow")


@pytest.mark.parametrize(
    "path",
    [
        "postgresql://me:secret@db/ehr?table=visits",
        "mysql://me@db/ehr?password=secret&table=visits",
    ],
)
def test_no_password_reaches_the_settings(tmp_path: Path, path: str) -> None:
    with pytest.raises(UsageError, match="has a password") as refused:
        settings.data_path(path)
    assert "secret" not in f"{refused.value.message} {refused.value.hint}"
    with pytest.raises(UsageError, match="has a password"):
        settings.parse_value("data", path)


def test_files_of_sources_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings.data_path("v.xlsx?sheet=A") == f"{tmp_path}/v.xlsx?sheet=A"
    assert settings.data_path("sqlite:///c.db?table=t") == f"sqlite:///{tmp_path}/c.db?table=t"
    assert settings.data_path("postgresql://h/d?table=t") == "postgresql://h/d?table=t"


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "clinic.db"
    with sqlite3.connect(path) as made:
        made.execute("CREATE TABLE visits (age INTEGER, dose REAL, sex TEXT, photo BLOB)")
        rows = [(30, 0.1, "f", b"x"), (None, 2.5, "m", None), (41, None, None, b"y")]
        made.executemany("INSERT INTO visits VALUES (?, ?, ?, ?)", rows)
    return path


def open_path(path: str) -> dict[str, list[str | None]]:
    reader = open_table(DataSettings(path=path))
    columns: dict[str, list[str | None]] = {name: [] for name in reader.columns()}
    for batch in reader.batches(reader.columns()):
        for name in columns:
            columns[name] += batch.column(name).to_pylist()
    return columns


def test_a_table_of_a_database_is_read_as_text(database: Path) -> None:
    assert open_path(f"sqlite:///{database}?table=visits") == {
        "age": ["30", None, "41"],
        "dose": ["0.1", "2.5", None],
        "sex": ["f", "m", None],
        "photo": [None, None, None],
    }


def test_a_query_chooses_rows_and_columns(database: Path) -> None:
    query = "SELECT age, sex || ':x' AS who FROM visits WHERE sex LIKE '%f%'"
    assert open_path(f"sqlite:///{database}?query={query}") == {"age": ["30"], "who": ["f:x"]}


def test_the_fingerprint_changes_with_a_value(database: Path) -> None:
    path = f"sqlite:///{database}?table=visits"
    before, stamps = open_table(DataSettings(path=path)).fingerprint(), list(file_stamps(path))
    assert open_table(DataSettings(path=path)).fingerprint() == before
    with sqlite3.connect(database) as changed:
        changed.execute("UPDATE visits SET dose = 0.2 WHERE age = 30")
    assert open_table(DataSettings(path=path)).fingerprint() != before
    assert list(file_stamps(path)) != stamps


def test_reading_changes_nothing(database: Path) -> None:
    before = database.read_bytes()
    with pytest.raises(DataError, match="cannot be read"):
        open_path(f"sqlite:///{database}?query=DELETE FROM visits RETURNING age")
    assert database.read_bytes() == before


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("sqlite:///{}", "names no table"),
        ("sqlite:///{}?table=nothing", "cannot be read"),
        ("sqlite:///{}.no?table=visits", "cannot be read"),
        ("sqlite:///{}?query=SELECT 1 AS a, 2 AS a", "same name"),
        ("mysql+nonsense://h/d?table=t", "address of the database cannot be used"),
    ],
)
def test_what_cannot_be_read_is_said(database: Path, path: str, why: str) -> None:
    with pytest.raises(DataError, match=why):
        open_path(path.format(database))


def test_a_database_is_read_again_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not say whether it has changed, and deleted rows must not be used for ever."""
    path = "postgresql://h/d?table=t"
    monkeypatch.setattr("time.time", lambda: 7200.0)
    before = list(file_stamps(path))
    assert list(file_stamps(path)) == before
    monkeypatch.setattr("time.time", lambda: 10800.0)
    assert list(file_stamps(path)) != before
