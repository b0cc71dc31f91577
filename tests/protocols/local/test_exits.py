"""A process ends in bounded time and with its exit code, whatever its threads wait for."""

from __future__ import annotations

import subprocess
import sys

import pytest

#: Runs a command of the agent while a thread that Python would wait for is stuck.
STUCK = """
import sys, threading
from agent.cli import main as cli

def waits_for_ever():
    threading.Event().wait()

threading.Thread(target=waits_for_ever, name="stuck one").start()
cli.EXIT_TIMEOUT_S = 0.1
sys.argv = ["commonweight-agent", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.parametrize(("word", "code"), [("--version", 0), ("no-such-command", 2)])
def test_a_stuck_thread_does_not_hold_up_the_exit_and_its_stack_is_logged(
    word: str, code: int
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STUCK, word], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, done.stderr
    assert "did not exit within" in done.stderr
    assert "stuck one" in done.stderr
    assert "in waits_for_ever" in done.stderr
    assert bool(done.stdout) == (word == "--version"), "what was printed is not lost"
