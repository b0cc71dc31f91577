"""A table is asked, changes by a few rows, and is asked again: no row follows by subtraction."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.analytics.answer import answer_question
from agent.analytics.query_log import QueryLog
from agent.data.table_memory import TableMemory
from agent.home.settings_schema import AgentSettings
from protocols.analytics.mergeable_states import PeerAnswer
from protocols.analytics.parser import parse_query

pytest.importorskip("pyarrow", reason="tables are read by the extra analyze")

Row = dict[str, Any]
VICTIM = {"name": "victim", "age": 61, "pay": 777_777}


def people(count: int) -> list[Row]:
    return [{"name": f"p{n}", "age": 20 + n % 50, "pay": 1000 + 13 * n} for n in range(count)]


class Home:
    """A peer whose owner answers all within the limits."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "staff.csv"

    def write(self, rows: Sequence[Row]) -> None:
        with self.file.open("w", newline="") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def ask(self, text: str, where: str = "") -> PeerAnswer:
        """As a new process each time."""
        log, memory = QueryLog(self.folder / "analysis.db"), TableMemory(self.folder / "told.db")
        chosen = AgentSettings(analyze="on", data=str(self.file))
        told = answer_question(parse_query(text, where), chosen, self.folder, log, memory)
        log.close()
        memory.close()
        return msgspec.json.decode(told, type=PeerAnswer)


def total(told: PeerAnswer) -> float | None:
    """The sum in an answer to sum(pay); None if it was refused or withheld."""
    if told.refused or not told.cells:
        return None
    moments: Any = told.cells[0].states[0]
    return float(moments.moments.mean * moments.moments.count)


def add_one(rows: list[Row]) -> list[Row]:
    return [*rows, VICTIM]


def shuffle(rows: list[Row]) -> list[Row]:
    return random.Random(1).sample([*rows, VICTIM], len(rows) + 1)


def widen(rows: list[Row]) -> list[Row]:
    return [{**row, "town": "x"} for row in [*rows, VICTIM]]


def stamp(rows: list[Row]) -> list[Row]:
    return [{**row, "exported": "2026-11-30"} for row in [*rows, VICTIM]]


def narrow(rows: list[Row]) -> list[Row]:
    return [{"name": row["name"], "pay": row["pay"]} for row in [*rows, VICTIM]]


@pytest.mark.attack("20.3", by="requester")
@pytest.mark.parametrize("change", [add_one, shuffle, widen, stamp, narrow])
def test_one_more_row(tmp_path: Path, change: Callable[[list[Row]], list[Row]]) -> None:
    """Attack: ask for a sum, wait until one row is added, ask again, subtract. Also with the rows
    in another order, with another column, with one less, and with one that changes everywhere."""
    home, rows = Home(tmp_path), people(104)
    home.write([{**row, "exported": "2026-11-29"} for row in rows] if change is stamp else rows)
    before = total(home.ask("sum(pay)"))
    home.write(change(rows))
    after = total(home.ask("sum(pay)"))
    assert before is not None
    assert after is None or round(after - before) != VICTIM["pay"]


@pytest.mark.attack("20.3", by="requester")
def test_one_row_less(tmp_path: Path) -> None:
    """Attack: ask for a sum, wait until one row is deleted, ask again, subtract."""
    home, rows = Home(tmp_path), people(104)
    home.write(add_one(rows))
    before = total(home.ask("sum(pay)"))
    home.write(rows)
    after = total(home.ask("sum(pay)"))
    assert before is not None
    assert after is None or round(before - after) != VICTIM["pay"]
