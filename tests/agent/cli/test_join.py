"""The questions of a first join."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from agent.cli import join


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
