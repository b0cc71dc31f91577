"""What the shell completes, and which run the name of a task means."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import typer
from click.shell_completion import ShellComplete
from typer.testing import CliRunner

from agent.cli.main import app as agent_app
from coordinator.cli import run_text
from coordinator.cli.main import app
from tests.support.in_process_fleet import fleet_of, some_data


def completed(program: typer.Typer, *words: str) -> list[str]:
    """What the shell offers in place of the last word."""
    command = typer.main.get_command(program)
    shell = ShellComplete(command, {}, str(command.name), "_COMPLETE")
    return [item.value for item in shell.get_completions(list(words[:-1]), words[-1])]


async def test_names_of_runs_and_peers_complete_and_a_task_means_its_newest_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "home"))

    async def offered(*words: str) -> list[str]:
        return await asyncio.to_thread(completed, app, *words)

    async def printed(*words: str) -> tuple[str, str]:
        done = await asyncio.to_thread(CliRunner().invoke, app, words)
        assert done.exit_code == 0, done.exception
        return done.stdout, done.stderr

    async with fleet_of(tmp_path, some_data(60, 1)) as fleet:
        first, second = [await fleet.finished(fleet.start(rounds=1, quorum=1)) for _ in range(2)]
        for words in (["run", "show"], ["run", "delete"], ["models", "export"], ["run", "metrics"]):
            assert await offered(*words, "") == [second.id, first.id]
        assert await offered("run", "stop", first.id[:-1]) == [first.id]
        assert await offered("infer", "--model", "b") == ["best"]
        assert await offered("peers", "pause", "agent") == ["agent0"]
        assert await offered("admin", "audit", "--peer", "") == ["agent0"]
        # Completion reads no peer's answers, so no audit names it.
        assert "answers read" not in (await printed("admin", "audit"))[0]

        shown, note = await printed("run", "show", "softmax")
        assert shown.startswith(second.id)
        assert note == f"the newest run of softmax is {second.id}\n"
        assert (await printed("run", "show", first.id))[1] == ""
        assert "answers read" in (await printed("admin", "audit"))[0]

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(run_text.Progress, "step", interrupted)
        done = await asyncio.to_thread(
            CliRunner().invoke, app, ["run", "start", "softmax", "--rounds", "1", "--follow"]
        )
        assert done.exit_code == 130
        newest = (await offered("run", "show", ""))[0]
        assert f"{newest} continues; watch it: commonweight run show {newest}\n" in done.stderr
        assert (await fleet.finished(newest)).id == newest


def test_without_a_coordinator_nothing_is_offered_and_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "none"))
    for words in (("run", "show", ""), ("peers", "drain", ""), ("ticket", "revoke", "")):
        assert completed(app, *words) == []
    assert completed(app, "infer", "") == ["list", "show", "stop"]


def test_hidden_commands_and_old_spellings_are_not_offered() -> None:
    assert "keys" not in completed(app, "")
    assert completed(app, "admin", "k") == ["keys"]
    assert completed(agent_app, "pol") == ["policy"]
    assert "questions" not in completed(agent_app, "")


def test_settings_their_words_and_tasks_complete(agent_home: Path) -> None:
    assert completed(agent_app, "policy", "set", "jobs_p") == [
        "jobs_private_models",
        "jobs_private_per_day",
    ]
    assert completed(agent_app, "policy", "set", "busy", "") == ["always", "auto", "never"]
    assert completed(agent_app, "policy", "set", "share_log", "t") == ["true"]
    assert completed(agent_app, "policy", "set", "data", "") == []
    assert "tabular" in completed(agent_app, "task", "allow", "t")
