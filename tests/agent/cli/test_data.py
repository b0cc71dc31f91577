"""The command with which owners look at their tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("pyarrow")

from tests.agent.cli.test_main import agent
from tests.support.tables import MIXED, write_csv


def test_a_table_is_shown_and_nothing_is_changed(agent_home: Path, tmp_path: Path) -> None:
    path = write_csv(tmp_path / "people.csv", MIXED)
    before = sorted(agent_home.rglob("*"))
    code, said, errors = agent(agent_home, "data", "check", str(path), "--target", "label")
    assert code == 0, errors
    lines = said.splitlines()
    assert f"{len(MIXED)} rows" in " ".join(lines[:3])
    named = [line.split()[0] for line in lines if line[:2] == "  " and line[2] != " "]
    assert named[: 1 + len(MIXED[0])] == ["column", *MIXED[0]]
    _, said, _ = agent(agent_home, "data", "check", str(path), "--json")
    assert json.loads(said)["data"]["rows"] == len(MIXED)
    assert sorted(agent_home.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ((), "no data are set"),
        (("nothing.csv",), "there are no data at"),
        (("postgresql://me:word@h/d?table=t",), "has a password"),
        (("/proc/self/fdinfo",), "a folder without tables"),
    ],
)
def test_what_is_no_table_is_said(agent_home: Path, words: tuple[str, ...], why: str) -> None:
    code, _, errors = agent(agent_home, "data", "check", *words)
    assert code in (1, 2), errors
    assert why in errors
