"""The help of every command of both programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from agent.cli.main import app as agent_app
from coordinator.cli.main import app as coordinator_app


def commands(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """The words of a command and of all that it contains."""
    yield path
    for name, child in getattr(command, "commands", {}).items():
        yield from commands(child, *path, name)


@pytest.mark.parametrize("app", [coordinator_app, agent_app], ids=["commonweight", "agent"])
def test_help_shows_defaults_without_backslashes(app: typer.Typer) -> None:
    texts = {
        path: CliRunner().invoke(app, [*path, "--help"]).output
        for path in commands(typer.main.get_command(app))
    }
    assert len(texts) > 10
    assert all("Usage:" in text for text in texts.values())
    assert any("[default: " in text for text in texts.values())
    assert [path for path, text in texts.items() if "\\[" in text] == []
