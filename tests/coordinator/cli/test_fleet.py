"""What `commonweight peers` asks before it changes the fleet."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from coordinator.cli import fleet as commands
from coordinator.cli.common import connect
from coordinator.cli.main import app
from protocols.errors import UsageError
from tests.support.in_process_fleet import fleet_of, some_data


async def test_a_machine_is_removed_only_after_a_yes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "home"))
    asked: list[str] = []

    def answer_no(question: str, **_: object) -> None:
        asked.append(question)
        raise typer.Abort

    async def standings() -> list[str]:
        rows = await asyncio.to_thread(lambda: connect().peers())
        return [row["standing"] for row in rows]

    async with fleet_of(tmp_path, some_data(30, 1)):
        without = await asyncio.to_thread(CliRunner().invoke, app, ["peers", "remove", "agent0"])
        assert isinstance(without.exception, UsageError)
        assert without.exception.message == (
            "nothing was removed: there is no terminal to confirm it on"
        )
        assert without.exception.hint == "commonweight peers remove agent0 --yes"
        with monkeypatch.context() as terminal:
            terminal.setattr("sys.stdin.isatty", lambda: True)
            terminal.setattr(typer, "confirm", answer_no)
            with pytest.raises(typer.Abort):
                await asyncio.to_thread(commands.remove, "agent0")
        assert asked == ["remove agent0 permanently?"]
        assert await standings() == ["enrolled"]
        words = ["peers", "remove", "agent0", "--yes"]
        done = await asyncio.to_thread(CliRunner().invoke, app, words)
        assert (done.exit_code, done.stderr) == (0, "agent0 is removed\n")
        assert await standings() == ["removed"]
