"""Conversations of JSONL and Parquet files: what is read, what is held out, what is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from agent.data import conversations
from agent.data.conversations import Message
from agent.data.settings import DataSettings
from agent.tasks import data_checks
from protocols.errors import DataError
from tests.agent.cli.test_main import agent

ASKED = [Message("user", "one and two?"), Message("assistant", "three")]


def row(question: str, answer: str) -> dict[str, Any]:
    turns = [("system", "be short"), ("user", question), ("assistant", answer)]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows) + "\n")
    return path


@pytest.mark.parametrize(
    "line",
    [
        {"messages": [{"role": m.role, "content": m.content} for m in ASKED], "source": "x"},
        {"prompt": "one and two?", "completion": "three"},
        {
            "prompt": [{"role": "user", "content": "one and two?"}],
            "completion": [{"role": "assistant", "content": "three"}],
        },
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_every_form_is_read(line: dict[str, Any], kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"said.{kind}"
    if kind == "jsonl":
        write(path, [line, line])
    else:
        pa = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pa.Table.from_pylist([line] * 2), path)
    assert conversations.are_in(str(path))
    assert "lora" in data_checks.fitting_tasks(DataSettings(path=str(path)))
    for place in (path, tmp_path):
        assert list(conversations.read(str(place))) == [tuple(ASKED)] * 2


@pytest.mark.parametrize(
    "line",
    [
        "no JSON",
        "[]",
        "{}",
        '{"messages": []}',
        '{"messages": [{"role": "user", "content": "secret"}]}',
        '{"messages": [{"role": "assistant", "content": ""}]}',
        '{"messages": [{"role": "king", "content": "secret"}]}',
        '{"messages": [{"role": "assistant", "content": 7}]}',
        '{"messages": [{"role": "assistant"}]}',
        '{"prompt": "secret"}',
    ],
)
def test_what_is_none_is_named_by_its_line_alone(line: str, tmp_path: Path) -> None:
    """The message goes to the coordinator: it has no word of the data. The hint stays."""
    path = write(tmp_path / "said.jsonl", [row("a", "b")])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(DataError) as caught:
        list(conversations.read(str(path)))
    assert "secret" not in str(caught.value.message)
    assert str(tmp_path) not in caught.value.message
    assert f"{path}, number 3" in caught.value.hint


def test_a_new_conversation_moves_no_other_and_equal_ones_stay_together(tmp_path: Path) -> None:
    rows = [row(f"{n} and 1?", str(n + 1)) for n in range(400)]
    before = {
        said: conversations.is_held_out(said)
        for said in conversations.read(str(write(tmp_path / "said.jsonl", rows)))
    }
    assert 20 <= sum(before.values()) <= 60
    more = [row("new", "one"), *rows[::-1], *rows[:50]]
    after = list(conversations.read(str(write(tmp_path / "said.jsonl", more))))
    assert all(conversations.is_held_out(said) == before.get(said, False) for said in after[1:])


def test_an_owner_sees_how_long_they_are(agent_home: Path, tmp_path: Path) -> None:
    rows = [row("x" * n, "y" * (n % 7 + 1)) for n in range(1, 101)]
    path = write(tmp_path / "said.jsonl", [*rows, rows[0]])
    before = sorted(agent_home.rglob("*"))
    code, said, errors = agent(agent_home, "data", "check", str(path), "--json")
    assert code == 0, errors
    found = json.loads(said)["data"]
    assert (found["conversations"], found["repeated"], found["files"]) == (101, 1, 1)
    assert found["answers"] == {"least": 1, "median": 4, "p95": 7, "most": 7}
    assert found["turns"] == {"least": 3, "median": 3, "p95": 3, "most": 3}
    code, said, errors = agent(agent_home, "data", "check", str(path))
    assert code == 0, errors
    assert "101 conversations" in said
    assert "yyy" not in said
    assert sorted(agent_home.rglob("*")) == before
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="there are no conversations"):
        conversations.files(str(tmp_path / "none"))
