"""Agents with tables, without a network: the agent's answers and the coordinator's merging."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from agent.analytics.answer import answer_question
from agent.analytics.query_log import QueryLog, log_file
from agent.data.table_memory import TableMemory
from agent.home.settings_schema import AgentSettings
from coordinator.jobs.analysis import Merged, merge_answers, validate_bytes
from coordinator.jobs.methods.plans import follow
from coordinator.jobs.methods.requests import parse_method
from coordinator.jobs.methods.results import Statistics
from protocols.analytics.mergeable_states import PeerAnswer
from protocols.analytics.query import Query
from tests.support.tables import write_csv

Row = Mapping[str, Any]


class TablePeer:
    """A table on a disk, and what its owner allows."""

    def __init__(self, folder: Path, rows: Path | Sequence[Row], **allowed: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.file = rows if isinstance(rows, Path) else write_csv(folder / "table.csv", rows)
        self.owner = AgentSettings(**({"analyze": "on", "data": str(self.file)} | allowed))
        self.log = QueryLog(log_file(folder))
        self.memory = TableMemory(folder / "told.db")

    def answer(self, query: Query) -> PeerAnswer:
        """The answer after it has been encoded and checked, as by the coordinator."""
        asked = msgspec.json.encode(query).decode()
        query = msgspec.json.decode(asked, type=Query)
        body = answer_question(query, self.owner, self.file.parent, self.log, self.memory)
        assert validate_bytes(asked, body) == ""
        return msgspec.json.decode(body, type=PeerAnswer)


class TableFleet:
    """Peers p0, p1 and so on, each with some of the rows."""

    def __init__(self, folder: Path, parts: Sequence[Sequence[Row]], **allowed: Any) -> None:
        self.peers = {
            f"p{number}": TablePeer(folder / f"p{number}", part, **allowed)
            for number, part in enumerate(parts)
        }
        self.questions: list[str] = []

    def put(self, query: Query, peers: Sequence[str]) -> Merged:
        self.questions.append(str(query))
        asked = peers or [*self.peers]
        return merge_answers({peer: self.peers[peer].answer(query) for peer in asked}, asked)

    def ask(self, text: str, where: str = "") -> Statistics:
        method = parse_method(text, where)
        assert method is not None
        return follow(method, self.put)


def records(table: Any) -> list[dict[str, Any]]:
    """The rows of a table by its titles."""
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]
