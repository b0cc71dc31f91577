"""Agents of one owner in several fleets, over the same rows."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from agent.analytics.answer import answer_question
from agent.analytics.query_log import QueryLog, log_file
from agent.cli.policy import set_policy
from agent.data.table_memory import TableMemory
from agent.home import settings
from protocols.analytics.mergeable_states import PeerAnswer
from protocols.analytics.parser import parse_query
from protocols.errors import UsageError
from tests.hostile.test_growing_tables import VICTIM, Home, add_one, people, total


def _ask(home: Path, text: str) -> float | None:
    log, memory = QueryLog(log_file(home)), TableMemory(settings.memory_file(home))
    told = answer_question(parse_query(text, ""), settings.read(home), home, log, memory)
    log.close()
    memory.close()
    return total(msgspec.json.decode(told, type=PeerAnswer))


@pytest.mark.attack("20.3", by="requester")
def test_two_fleets_do_not_tell_one_row_together(tmp_path: Path) -> None:
    """Attack: ask in one fleet before a row was added, and in another one afterwards, where the
    owner's agents share the memory of what was told (`told_folder`)."""
    table, rows = Home(tmp_path), people(104)
    table.write(rows)
    answers = []
    for name in ("first", "second"):
        home = tmp_path / name
        home.mkdir()
        folder = tmp_path / "told"
        folder.mkdir(exist_ok=True)
        settings.change(home, data=str(table.file), analyze="on", told_folder=str(folder))
        answers.append(_ask(home, "sum(pay)"))
        table.write(add_one(rows))
    before, after = answers
    assert before is not None
    assert after is None or round(after - before) != VICTIM["pay"]


@pytest.mark.attack("20.3")
def test_an_owner_forgets_nothing_by_another_folder(agent_home: Path, tmp_path: Path) -> None:
    """Control: `policy set told_folder` says what to copy, and does not split a memory."""
    new = tmp_path / "shared"
    set_policy("told_folder", str(new))
    set_policy("told_folder", "")
    TableMemory(settings.memory_file(agent_home)).close()
    with pytest.raises(UsageError, match=r"and .*shared does not") as refused:
        set_policy("told_folder", str(new))
    assert refused.value.hint.endswith(f"cp -a {agent_home / 'told'} {new}")
    TableMemory(new / "told.db").close()
    with pytest.raises(UsageError, match="cannot be merged"):
        set_policy("told_folder", str(new))
    (agent_home / "told").rename(tmp_path / "away")
    set_policy("told_folder", str(new))
    assert settings.memory_file(agent_home) == new / "told.db"
    assert settings.scores_file(agent_home) == new / "scores.db"
