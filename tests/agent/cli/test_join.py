"""The questions of a first join."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from agent.cli import join
from agent.setup import own_data
from tests.agent.cli.test_main import agent
from tests.support.tables import write_csv


@pytest.mark.parametrize(
    ("name", "answers", "told"),
    [
        ("battery", ["sometimes", "always"], "battery must be one of"),
        ("hours", ["25:00-26:00", "mon-fri 18:00-08:00"], "hours"),
        ("cpu_share", ["lots", "2", "0.5"], "cpu_share must be a number, more than 0, at most 1"),
        ("allow", ["tabluar", "tabular"], "tabluar"),
    ],
)
def test_each_answer_is_checked_when_it_is_given(
    agent_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    answers: list[str],
    told: str,
) -> None:
    given: Iterator[str] = iter(answers)
    monkeypatch.setattr(typer, "prompt", lambda *_, **__: next(given))
    assert join._prompt(name) == answers[-1]
    assert next(given, None) is None
    errors = capsys.readouterr().err
    assert errors.count("error: ") == len(answers) - 1
    assert told in errors


@pytest.mark.parametrize("name", list(join._PROMPTS))
def test_the_default_answer_is_one_that_is_taken(agent_home: Path, name: str) -> None:
    join._check_answer(name, join._PROMPTS[name][1])


def test_the_columns_are_those_of_the_data_or_all(
    agent_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = write_csv(tmp_path / "a.csv", [{"age": 1, "sex": "f", "surname": "x"}])
    there = own_data.columns(str(table))
    assert there == ["age", "sex", "surname"]
    for nothing in ("", str(tmp_path / "none"), str(agent_home)):
        assert own_data.columns(nothing) == []
    answers = iter(["age,sx", "age,sex"])
    monkeypatch.setattr(typer, "prompt", lambda *_, **__: next(answers))
    assert join._prompt("columns", there) == "age,sex"
    told = capsys.readouterr().err
    assert "the data have no column 'sx'" in told
    assert "did you mean sex?" in told
    assert join._column_patterns("all") == ["*"]
    assert join._column_patterns("age, sex") == ["age", "sex"]
    join._check_answer("columns", "all", there)


def test_without_a_terminal_a_join_says_which_columns_may_be_used(
    agent_home: Path, tmp_path: Path
) -> None:
    table = write_csv(tmp_path / "a.csv", [{"age": 1, "sex": "f"}])
    code, _, err = agent(agent_home, "join", "cw1.x", "--data", str(table), "--allow", "tabular")
    assert code == 2, "the ticket is none"
    assert f"may use every column of {table}: age, sex" in err
    assert "commonweight-agent policy set data.columns" in err
