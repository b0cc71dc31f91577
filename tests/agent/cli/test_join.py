"""The questions of a first join."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from agent.cli import prompts, task
from agent.home import settings
from agent.setup import consents, own_data
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
    assert prompts.ask(name) == answers[-1]
    assert next(given, None) is None
    errors = capsys.readouterr().err
    assert errors.count("error: ") == len(answers) - 1
    assert told in errors


@pytest.mark.parametrize("name", list(prompts._PROMPTS))
def test_the_default_answer_is_one_that_is_taken(agent_home: Path, name: str) -> None:
    prompts.check_answer(name, prompts._PROMPTS[name][1])


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
    assert prompts.ask("columns", there) == "age,sex"
    told = capsys.readouterr().err
    assert "the data have no column 'sx'" in told
    assert "did you mean sex?" in told
    assert consents.parse_columns("all") == ["*"]
    assert consents.parse_columns("age, sex") == ["age", "sex"]
    prompts.check_answer("columns", "all", there)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ("agee", "the data have no column 'agee'; did you mean age?"),
        ("NAME,NAME", "the data have no column 'NAME'\n  try: name columns of the data: age, sex"),
        ("age,sx", "the data have no column 'sx'; did you mean sex?"),
        ("", "--columns names no column"),
    ],
)
@pytest.mark.parametrize("command", ["join", "task"])
def test_columns_are_those_of_the_data_without_a_terminal_too(
    agent_home: Path, tmp_path: Path, columns: str, told: str, command: str
) -> None:
    table = write_csv(tmp_path / "a.csv", [{"age": 1, "sex": "f"}])
    words = ["join", "cw1.x", "--data", str(table), "--allow", "tabular"]
    if command == "task":
        settings.change(agent_home, data=str(table))
        words = ["task", "allow", "tabular"]
    code, said, err = agent(agent_home, *words, "--columns", columns)
    assert told in said + err
    assert code == (0 if command == "task" and columns == "age,sx" else 2)


@pytest.mark.parametrize(
    "words", [("join", "cw1.x", "--data"), ("policy", "set", "data")], ids=["join", "policy"]
)
def test_data_that_are_not_there_are_refused_at_once(
    agent_home: Path, tmp_path: Path, words: tuple[str, ...]
) -> None:
    nope = str(tmp_path / "nope.csv")
    code, _, err = agent(agent_home, *words, nope)
    assert code == 2
    assert f"there are no data at {nope}\n  try: name a file or a folder" in err
    assert settings.read(agent_home).data == ""


def test_without_a_terminal_no_column_may_be_used_before_the_owner_names_it(
    agent_home: Path, tmp_path: Path
) -> None:
    table = str(write_csv(tmp_path / "a.csv", [{"age": 1, "sex": "f"}]))
    name_them = "commonweight-agent task allow tabular --columns NAME,NAME (or all)"
    settings.change(agent_home, data=table)
    _, said, err = agent(agent_home, "task", "allow", "tabular")
    assert "allowed tabular, awaiting columns\n" in said + err
    assert f"no column of {table} may be used yet; to name them: {name_them}" in said + err
    assert settings.read(agent_home).columns_of("tabular") == ()
    assert f"awaiting columns: {name_them}" in agent(agent_home, "task", "list")[1]
    assert name_them in agent(agent_home, "doctor")[1]
    _, said, err = agent(agent_home, "task", "allow", "tabular", "--columns", "age")
    assert "allowed tabular, columns age" in said + err
    _, said, err = agent(agent_home, "task", "allow", "tabular", "--columns", "all")
    assert "allowed tabular, all columns" in said + err
    assert settings.read(agent_home).columns_of("tabular") == ("*",)


def test_on_a_terminal_the_owner_is_asked_which_columns_a_task_may_use(
    agent_home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = str(write_csv(tmp_path / "a.csv", [{"age": 1, "sex": "f", "surname": "x"}]))
    settings.change(agent_home, data=table)
    answers = iter(["agee", "age,sex"])
    monkeypatch.setattr(prompts, "can_ask", lambda: True)
    monkeypatch.setattr(typer, "prompt", lambda *_, **__: next(answers))
    task.allow("tabular")
    told = capsys.readouterr().err
    assert f"the columns of {table}: age, sex, surname" in told
    assert "did you mean age?" in told
    assert "allowed tabular, columns age, sex" in told
    assert settings.read(agent_home).columns_of("tabular") == ("age", "sex")
    task.allow("tabular", purpose="a study")  # what is decided is not asked again
    assert settings.read(agent_home).columns_of("tabular") == ("age", "sex")


def test_policy_set_is_no_way_around_the_names_of_columns(agent_home: Path, tmp_path: Path) -> None:
    table = str(write_csv(tmp_path / "a.csv", [{"age": 1, "sex": "f"}]))
    agent(agent_home, "policy", "set", "tasks", "*")
    _, said, err = agent(agent_home, "policy", "set", "data", table)
    assert "no column may be used yet" in said + err
    assert settings.read(agent_home).standing_of("tabular") == "columns"
    assert settings.read(agent_home).allows("mnist"), "it reads no columns"
    assert "did you mean age?" in agent(agent_home, "policy", "set", "data.columns", "agee")[2]
    assert agent(agent_home, "policy", "set", "data.columns", "all")[0] == 0
    assert settings.read(agent_home).columns_of("tabular") == ("*",)
