"""`commonweight-agent task new`: the file that it writes is a task that trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agent.cli.main import app
from agent.data.settings import DataSettings
from agent.tasks import registry


def test_the_written_task_learns_from_the_written_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["task", "new", "heart_rate.py"])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "heart_rate.py").read_text()
    assert "commonweight-agent task add ./heart_rate.py:HeartRate\n" in text
    assert not re.search(r"\b(CLASS|FILE|DATA)\b", text)
    task = registry.create("heart_rate.py:HeartRate", f"{tmp_path}/heart_rate.py:HeartRate")
    task.load(DataSettings(path=str(tmp_path / "heart_rate.csv")))
    first = task.init(0, {})
    trained = task.train(first, {"epochs": 20}, lambda *_: None).weights
    losses = [
        task.evaluate(each, {}, lambda *_: None).metrics["loss"]  # type: ignore[arg-type]
        for each in (first, trained)
    ]
    assert losses[1] < losses[0] / 2
    assert task.evaluate(first, {}, lambda *_: None).num_examples == 12


@pytest.mark.parametrize(
    ("name", "there", "words"),
    [
        ("my_task.py", "my_task.py", "my_task.py is there already"),
        ("my_task.py", "my_task.csv", "my_task.csv is there already"),
        ("my_task.txt", "", "a task is written to a Python file"),
        ("7.py", "", "7.py is no name of one"),
        ("none/my_task.py", "", "cannot write none/my_task.py: No such file or directory"),
    ],
)
def test_no_file_is_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, there: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if there:
        Path(there).write_text("mine")
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(app, ["task", "new", name])
    assert words in str(done.exception) + done.output
    assert sorted(tmp_path.iterdir()) == before
    if there:
        assert Path(there).read_text() == "mine"
