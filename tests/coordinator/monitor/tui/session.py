"""python -m tests.coordinator.monitor.tui.session [FOLDER]

The real monitor in a real terminal (tmux) through a bad day: no coordinator, then one, peers join,
the broker is killed, the coordinator is killed and comes back, the terminal shrinks and grows. The
screens are written into `captures/`; `test_session.py` reads them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

CAPTURES = Path(__file__).with_name("captures")
ROOT = Path(__file__).parents[4]
WIDTH, HEIGHT = 100, 24
WITHIN_S = 90.0


class Terminal:
    """A separate tmux server with one pane."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self._words = ["tmux", "-S", str(folder / "tmux")]
        command = f"{sys.executable} -m coordinator.cli monitor; echo MONITOR ENDED; sleep 600"
        size = ["-x", str(WIDTH), "-y", str(HEIGHT)]
        subprocess.run(
            [*self._words, "new-session", "-d", *size, command],
            env=environment,
            cwd=ROOT,
            check=True,
        )

    def screen(self) -> str:
        """The text on the screen."""
        done = subprocess.run(
            [*self._words, "capture-pane", "-p"], capture_output=True, text=True, check=True
        )
        return done.stdout

    def until(self, what: str, true: Callable[[str], bool]) -> str:
        """Wait up to `WITHIN_S` for a screen that satisfies `true`."""
        end = time.monotonic() + WITHIN_S
        while not true(screen := self.screen()):
            if time.monotonic() > end:
                raise TimeoutError(f"{what}:\n{screen}")
            time.sleep(0.1)
        return screen

    def resize(self, width: int, height: int) -> None:
        words = ["resize-window", "-x", str(width), "-y", str(height)]
        subprocess.run([*self._words, *words], check=True)

    def close(self) -> None:
        subprocess.run([*self._words, "kill-server"], check=False)


@contextmanager
def program(words: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program that is terminated at the end of the block."""
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(20)


def play(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, screen) of each act."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COMMONWEIGHT")}
    environment |= {"COMMONWEIGHT_HOME": str(folder / "home"), "TERM": "xterm-256color"}
    environment["PYTHONPATH"] = str(ROOT)
    commonweight = [sys.executable, "-m", "coordinator.cli"]
    subprocess.run([*commonweight, "init"], env=environment, check=True, stderr=subprocess.DEVNULL)
    up = ["coordinator.cli", "up", "--host", "127.0.0.1", "--port", "0"]
    terminal = Terminal(folder, environment)
    try:
        yield "1-nobody-there", terminal.until("says so", lambda s: "no data yet" in s and "✕" in s)
        with program(up, environment) as coordinator:
            yield "2-no-peers", terminal.until("empty", lambda s: "No peers yet" in s)
            agents = [_joined(folder, name, environment) for name in ("north", "south")]
            with (
                program(["agent.cli", "run"], agents[0]) as _,
                program(["agent.cli", "run"], agents[1]) as _,
            ):
                both = lambda s: s.count("○ idle") == 2 and "mqtt ●" in s  # noqa: E731
                yield "3-peers", terminal.until("peers", both)
                for child in psutil.Process(coordinator.pid).children(recursive=True):
                    child.kill()  # the broker is its only child
                gone = terminal.until("broker gone", lambda s: "mqtt ○" in s)
                yield "4-broker-killed", gone
                yield "5-broker-back", terminal.until("broker back", both)
                coordinator.send_signal(signal.SIGKILL)
                coordinator.wait()
                lost = terminal.until(
                    "stale", lambda s: re.search(r"stale 00:0[3-9]", s) is not None
                )
                yield "6-coordinator-killed", lost
                terminal.resize(40, 12)
                small = lambda s: "stale" in s and s.splitlines()[11].rstrip().endswith("quit")  # noqa: E731
                yield "7-small", terminal.until("small", small)
                terminal.resize(WIDTH, HEIGHT)
                with program(_port_again(up, folder), environment):
                    back = terminal.until("back", lambda s: both(s) and "stale" not in s)
                    yield "8-back", back
    finally:
        terminal.close()


def _port_again(up: list[str], folder: Path) -> list[str]:
    """The same command on the port that the agents know."""
    text = (folder / "port").read_text()
    return [*up[:-1], text]


def _joined(folder: Path, name: str, environment: dict[str, str]) -> dict[str, str]:
    own = environment | {"COMMONWEIGHT_AGENT_HOME": str(folder / name)}
    words = [sys.executable, "-m", "coordinator.cli", "ticket", "create"]
    ticket = subprocess.run(words, env=own, check=True, capture_output=True).stdout
    words = [sys.executable, "-m", "agent.cli", "join", "-", "--name", name, "--allow", "*"]
    subprocess.run(words, env=own, check=True, input=ticket, capture_output=True)
    # On a busy machine an agent would rather wait than be idle.
    words = [sys.executable, "-m", "agent.cli", "policy", "set", "busy", "always"]
    subprocess.run(words, env=own, check=True, capture_output=True)
    up = json.loads((folder / "home" / "up.json").read_text())
    (folder / "port").write_text(up["address"].rpartition(":")[2])
    return own


def main() -> None:
    into = Path(sys.argv[1]) if len(sys.argv) > 1 else CAPTURES
    into.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="cw"))
    try:
        for name, screen in play(folder):
            print(f"--- {name}\n{screen}")
            shown = screen.replace(str(folder), "/home/operator")
            (into / f"{name}.txt").write_text(shown)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
