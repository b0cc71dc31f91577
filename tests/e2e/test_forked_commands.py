"""A command that is forked does what a new process does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support import forked_commands
from tests.support.fleet_harness import AGENT, COORDINATOR, command, environment


@pytest.mark.parametrize(
    "words",
    [
        (COORDINATOR, "status", "--json"),
        (AGENT, "join", "-", "--name", "box"),
        (AGENT, "no-such-command"),
    ],
)
def test_a_forked_command_answers_as_a_new_process(tmp_path: Path, words: tuple[str, ...]) -> None:
    env = environment(tmp_path)
    if not forked_commands.can_fork(env):
        pytest.skip("commands are forked on Linux alone")
    forked = forked_commands.run(words, env, "cw1.x", timeout_s=60.0)
    new = subprocess.run(
        command([*words], env), input="cw1.x", env=env, capture_output=True, text=True
    )
    assert (forked.returncode, forked.stdout, forked.stderr) == (
        new.returncode, new.stdout, new.stderr,
    )  # fmt: skip
    assert new.returncode != 0


def test_a_new_process_starts_where_the_environment_asks_for_it(tmp_path: Path) -> None:
    env = environment(tmp_path)
    assert not forked_commands.can_fork(env | {"PYTHONPATH": str(tmp_path)})
    assert not forked_commands.can_fork(env | {"PYTHONWARNINGS": "error"})
    assert not forked_commands.can_fork(env | {"LC_ALL": "C", "LANG": "C"})
