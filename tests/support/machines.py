"""Machines of a walk-through: each has a home folder and follows command lines as written."""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
from pathlib import Path

from tests.support.fleet_harness import (
    AGENT,
    COORDINATOR,
    HOST,
    Program,
    environment,
    free_port,
)
from tests.support.waiting import wait_for

#: Commands that go on until they are ended, and what they write first.
ENDLESS = {
    ("commonweight-agent", "models", "serve"): "http://",
    ("commonweight-agent", "logs", "-f"): "",
    ("commonweight", "status", "--watch"): "",
}
#: What a command asks in the terminal, by a word in its line, and the answers.
ANSWERS = {
    " run delete ": "y\n",
    " task approve ": "y\n",
    " --encrypt": "a long passphrase\na long passphrase\n",
}
WITHIN_S = 300.0


class Machine:
    """A machine with a home folder, its environment and its programs."""

    #: What a program of the terminal shows once it works.
    shows: tuple[str, ...] = ("Fleet",)

    def __init__(self, name: str, folder: Path, programs: Path) -> None:
        """`programs`: the folder with `commonweight` and `commonweight-agent`."""
        self.name, self.home = name, folder / name
        self.home.mkdir()
        #: Where lines run.
        self.cwd = self.home
        self.programs: dict[str, Program] = {}
        self._endless: list[subprocess.Popen[bytes]] = []
        self.env = environment(
            self.home,
            PATH=f"{programs}:{os.environ['PATH']}",
            COMMONWEIGHT_HOST=HOST,
        )

    @property
    def state(self) -> Path:
        """Where the programs of this machine keep their homes."""
        return self.home / "data" / "commonweight"

    def follow(self, line: str, given: str = "") -> str:
        """Do what a line says; what it printed: its result, else its progress."""
        words = shlex.split(line, comments=True)
        match words:
            case ["commonweight", "up", *options]:
                self._up(options)
            case ["commonweight-agent", "up" | "run"]:
                self.run_agent()
            case ["commonweight", "monitor", *options] if "--once" not in options:
                return self._watch(line, given)
            case ["commonweight", "demo", *options] if "--monitor" in options:
                return self._watch(line, given)
            case _ if found := next((key for key in ENDLESS if words[: len(key)] == [*key]), None):
                return self._look_at(line, ENDLESS[found])
            case _ if answers := next((a for part, a in ANSWERS.items() if part in line), ""):
                return self._answer(line, answers)
            case _:
                return self.ask(line, given)
        return ""

    def ask(self, line: str, given: str = "") -> str:
        """Run a line that ends by itself; fails if it does not end with 0."""
        done = subprocess.run(
            ["bash", "-c", line],
            input=given,
            cwd=self.cwd,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=WITHIN_S,
            start_new_session=True,  # no terminal: a ticket is read from `given`
        )
        assert done.returncode == 0, f"{self.name}: {line}\n{done.stdout}{done.stderr}"
        return done.stdout or done.stderr

    def run_agent(self) -> None:
        """Start the agent and wait until it has a session."""
        self.programs["agent"] = Program([AGENT, "run"], self.env, self.home / "agent.log")
        status = self.state / "agent" / "status.json"

        status.unlink(missing_ok=True)

        def joined() -> bool:
            program = self.programs["agent"]
            assert program.process.poll() is None, f"{self.name}: {program.log}"
            return status.exists() and bool(json.loads(status.read_bytes())["session"])

        wait_for(joined, f"{self.name} has a session")

    def stop(self, name: str) -> None:
        if (program := self.programs.pop(name, None)) and program.process.poll() is None:
            program.stop()

    def end_endless(self) -> None:
        """Press Ctrl-C in the commands that go on."""
        while self._endless:
            process = self._endless.pop()
            process.send_signal(signal.SIGINT)
            process.wait(30)

    def close(self) -> None:
        self.end_endless()
        for name in reversed([*self.programs]):
            self.stop(name)

    def _up(self, options: list[str]) -> None:
        """The coordinator, started again if it runs, at the same port."""
        told = self.state / "coordinator" / "up.json"
        self.stop("up")
        told.unlink(missing_ok=True)
        if "COMMONWEIGHT_PORT" not in self.env or self.env["COMMONWEIGHT_PORT"] == "0":
            self.env["COMMONWEIGHT_PORT"] = str(free_port())
        log = self.home / "up.log"
        self.programs["up"] = Program([COORDINATOR, "up", *options], self.env, log)

        def answers() -> bool:
            program = self.programs["up"]
            assert program.process.poll() is None, f"{self.name}: {program.log}"
            return told.exists()

        wait_for(answers, "the coordinator is up")

    def _look_at(self, line: str, expected: str) -> str:
        """Start a command without an end, and wait until it has written something."""
        output = self.home / f"endless-{len(self._endless)}.log"
        with output.open("wb") as log:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                cwd=self.cwd, env=self.env, start_new_session=True,
            )  # fmt: skip
        self._endless.append(process)

        def written() -> str:
            text = output.read_text()
            assert process.poll() is None, f"{self.name}: {line}\n{text}"
            return text if expected in text else ""

        return str(wait_for(written, line))

    def _answer(self, line: str, answers: str) -> str:
        """Run a line in a terminal and answer what it asks."""
        shown, ours = self._in_terminal(line)
        try:
            seen = b""
            for answer in answers.splitlines(keepends=True):
                asked = b""
                while not asked.rstrip().endswith(b":"):
                    asked += os.read(ours, 65536)
                seen += asked
                os.write(ours, answer.encode())
            while more := _more(ours):
                seen += more
            assert shown.wait(30) == 0, f"{self.name}: {line}\n{seen.decode()}"
        finally:
            shown.kill()
            shown.wait()
            os.close(ours)
        return seen.decode()

    def _in_terminal(self, line: str) -> tuple[subprocess.Popen[bytes], int]:
        """Start a line in a terminal; the process, and our side of the terminal."""
        ours, theirs = pty.openpty()
        env = self.env | {"TERM": "xterm-256color", "COLUMNS": "140", "LINES": "40"}
        shown = subprocess.Popen(
            ["bash", "-c", f"exec {line}"],
            stdin=theirs, stdout=theirs, stderr=theirs,
            cwd=self.cwd, env=env, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        return shown, ours

    def _watch(self, line: str, given: str) -> str:
        """A program of the terminal, until it has drawn a screen; then `q`."""
        shown, ours = self._in_terminal(line)
        try:
            seen = b""
            if given.strip():  # a prompt drops what was typed before it
                while not seen.rstrip().endswith(b":"):
                    seen += os.read(ours, 65536)
                os.write(ours, given.encode())
            while not all(word.encode() in seen for word in self.shows):
                seen += os.read(ours, 65536)
            os.write(ours, b"q")
            while more := _more(ours):
                seen += more
            assert shown.wait(30) == 0, seen[-3000:]
        finally:
            shown.kill()
            shown.wait()
            os.close(ours)
        return seen.decode(errors="replace")


def _more(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the other side has closed it
        return b""
