"""A table that another process reads for the trainer, which has no connection."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

from agent.data import column_types, open_table
from agent.data.arrow_reader import ArrowReader
from agent.data.change_watch import READ_AGAIN_AFTER_S
from agent.data.row_registry import RowRegistry
from agent.data.settings import DataSettings
from agent.data.table_spool import write_table
from agent.home.settings_schema import AgentSettings
from agent.trainer import sandbox_rules
from agent.trainer.spooled_table import SpooledTable
from protocols.errors import CommonweightError, DataError
from tests.support.tables import MIXED, write_csv, write_parquet

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the helper is of Linux")

Make = Callable[..., SpooledTable]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    watches = []

    def made(table: Path | str, reader: str = "arrow", pid: int = os.getpid()) -> SpooledTable:
        chosen = AgentSettings(data=str(table), data_reader="spark")
        spool = tmp_path / "spool"
        spool.mkdir(exist_ok=True)
        rules = sandbox_rules.make_rules(chosen, write=(), spool=spool)
        watches.append(os.pidfd_open(pid))
        from msgspec.structs import replace

        return SpooledTable(replace(rules, reader=reader), watches[-1])

    yield made
    for watch in watches:
        os.close(watch)


def test_the_rows_are_those_of_the_table(tmp_path: Path) -> None:
    """Of a folder of files with other columns and types, and of a table without rows."""
    table = tmp_path / "table"
    table.mkdir()
    write_csv(table / "a.csv", MIXED[:80])
    write_csv(table / "b.csv", [{"age": "7", "town": ""}])
    write_parquet(table / "c.parquet", MIXED[80:])
    (tmp_path / "none.csv").write_text("x,y\n")
    for path in (table, tmp_path / "none.csv"):
        out = tmp_path / f"{path.name}.out"
        out.mkdir()
        reader = ArrowReader(str(path))
        write_table(reader, out)
        spooled = open_table(DataSettings(path=str(out)))
        assert spooled.columns() == reader.columns()
        numbers = RowRegistry(tmp_path / "told.db").positions(reader)
        again = RowRegistry(tmp_path / "told.db").positions(spooled)
        assert numbers.tolist() == again.tolist(), "the memory knows the rows"
        for name in reader.columns():
            kinds = [
                column_types.possible_kinds(batch.column(0))
                for one in (reader, spooled)
                for batch in [*one.batches([name])][:1]
            ]
            assert kinds[:1] == kinds[1:] or not kinds


def test_it_is_read_once_and_again_after_a_change(tmp_path: Path, make: Make) -> None:
    path = write_csv(tmp_path / "table.csv", MIXED[:30])
    table = make(path)
    first = table.folder()
    assert table.folder() == first
    assert ArrowReader(str(first)).columns() == ArrowReader(str(path)).columns()
    files = [file for file in first.rglob("*") if file.is_file()]
    assert files
    assert {file.stat().st_mode & 0o077 for file in files} == {0}
    write_csv(path, MIXED[:40])
    second = table.folder()
    assert sum(len(batch) for batch in ArrowReader(str(second)).batches(["age"])) == 40
    assert not first.exists()
    table.delete()
    assert list((tmp_path / "spool").iterdir()) == []


def test_a_table_of_a_server_may_take_longer_than_it_is_fresh(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("agent.data.change_watch.time.time", lambda: now[0])
    table = make("postgresql://h/d?table=t", reader="arrow")
    reads = []

    def read(folder: Path) -> None:
        reads.append(folder)
        now[0] += 2 * READ_AGAIN_AFTER_S

    monkeypatch.setattr(table, "_read", read)
    first = table.folder()
    assert table.folder() != first, "it is read again when it is asked for later"
    assert len(reads) == 2


def test_what_a_crash_left_is_deleted(tmp_path: Path, make: Make) -> None:
    left = tmp_path / "spool" / "table-1" / "part-000000.parquet"
    left.parent.mkdir(parents=True)
    left.write_text("rows")
    make(tmp_path / "table.csv")
    assert not left.parent.exists()


def test_errors_come_from_the_process_that_reads(tmp_path: Path, make: Make) -> None:
    with pytest.raises(CommonweightError, match="no CSV or Parquet file was found") as missing:
        make(tmp_path / "none.csv").folder()
    assert missing.value.code == DataError.code
    path = write_csv(tmp_path / "table.csv", MIXED[:3])
    with pytest.raises(CommonweightError, match="no such reader"):
        make(path, "another").folder()


def test_it_ends_with_its_trainer(tmp_path: Path, make: Make) -> None:
    """Nobody waits for a table of a trainer that was killed."""
    path = write_csv(tmp_path / "table.csv", MIXED[:30])
    trainer = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    table = make(path, pid=trainer.pid)
    trainer.kill()
    trainer.wait()
    with pytest.raises(CommonweightError, match="the trainer has ended"):
        table.folder()
