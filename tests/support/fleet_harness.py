"""A real fleet for one test: processes started by the public commands, ended whatever happens."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from coordinator.transport.ports import listenable

ROOT = Path(__file__).resolve().parents[2]
COORDINATOR, AGENT = "coordinator.cli", "agent.cli"
HOST = "127.0.0.1"
WITHIN_S = 120.0
LOOK_EVERY_S = 0.05


def until(
    condition: Callable[[], Any],
    what: str,
    within_s: float = WITHIN_S,
    every_s: float = LOOK_EVERY_S,
) -> Any:
    """Wait for a condition, with a bound that only a failure meets; what it gave."""
    end = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < end, f"not in {within_s:.0f} s: {what}"
        time.sleep(every_s)
    return found


def two_free_ports() -> tuple[int, int]:
    """Two ports on which nobody listens now."""
    with socket.socket() as first, socket.socket() as second:
        first.bind((HOST, 0))
        second.bind((HOST, 0))
        return first.getsockname()[1], second.getsockname()[1]


def free_port() -> int:
    """A port on which nobody listens now."""
    return listenable(HOST)


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """This process's, without what is set on this machine for commonweight."""
    found = {name: value for name, value in os.environ.items() if "COMMONWEIGHT" not in name}
    found |= {
        "HOME": str(folder),
        "XDG_DATA_HOME": str(folder / "data"),
        "TMPDIR": str(folder),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
        "NO_COLOR": "1",
        # Any free port: the default one may belong to another program.
        "COMMONWEIGHT_PORT": "0",
        "COMMONWEIGHT_AGENT_THREADS": "1",
        # Other tests use these cores too, and nobody waits for them to end.
        "COMMONWEIGHT_AGENT_WORK": "always",
        "COMMONWEIGHT_AGENT_NICE": "0",
    }
    return found | settings


def command(words: list[str], env: dict[str, str]) -> list[str]:
    """The command line of `words`, which begin with COORDINATOR or AGENT.

    With INSTALLED set it is the script in that folder, else this source tree's module.
    """
    if folder := env.get("INSTALLED"):
        script = {COORDINATOR: "commonweight", AGENT: "commonweight-agent"}[words[0]]
        return [str(Path(folder) / script), *words[1:]]
    return [sys.executable, "-P", "-m", *words]


def run_program(
    words: list[str], env: dict[str, str], *, given: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run one of the two commands to its end."""
    return subprocess.run(
        command(words, env),
        input=given,
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class Program:
    """A process in the background with its output in a file; `log` is what it has said."""

    def __init__(self, words: list[str], env: dict[str, str], output: Path) -> None:
        self._output = output
        with output.open("ab") as log:
            self.process = subprocess.Popen(
                command(words, env),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._output.read_text(errors="replace")

    def kill(self) -> None:
        """As a power cut would: SIGKILL."""
        self.process.kill()
        self.process.wait()

    def stop(self, within_s: float = 20.0) -> int:
        """Ask it to end; its exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within_s)

    def wait(self, within_s: float = 120.0) -> int:
        return self.process.wait(within_s)


class Fleet:
    """A coordinator and agents over `folder`, driven by the commands that a person types."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder = folder
        self._settings = settings
        self.home = folder / "coordinator"
        self.programs: dict[str, Program] = {}
        self._family: dict[int, psutil.Process] = {}

    # --- the two commands ---

    def ask(self, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
        """`commonweight words…`, run to its end."""
        return run_program([COORDINATOR, *words], self._env(), given=given)

    def data(self, *words: str) -> Any:
        """What `commonweight words… --json` tells."""
        done = self.ask(*words, "--json")
        assert done.returncode == 0, f"commonweight {' '.join(words)}: {done.stderr}{done.stdout}"
        return json.loads(done.stdout)["data"]

    def ask_agent(
        self, name: str, *words: str, given: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """`commonweight-agent words…` on the machine `name`, run to its end."""
        return run_program([AGENT, *words], self._env(name), given=given)

    def background(self, name: str, *words: str) -> Program:
        """`commonweight words…` in the background."""
        return self._start(name, [COORDINATOR, *words], self._env())

    # --- coordinator and agents ---

    def up(self, *words: str, port: int = 0) -> Program:
        """Start the coordinator and wait until it answers."""
        program = self.background("up", "up", "--host", HOST, "--port", str(port), *words)

        def answers() -> bool:
            assert program.process.poll() is None, f"the coordinator ended: {program.log}"
            return (self.home / "up.json").exists()

        until(answers, "the coordinator is up")
        return program

    def ticket(self, uses: int = 1) -> str:
        return str(self.data("ticket", "create", "--uses", str(uses))["ticket"])

    def join(self, *names: str) -> None:
        """Let these machines join, each with its part of the shared data."""
        self.join_parts({name: f"{number}/{len(names)}" for number, name in enumerate(names)})

    def join_parts(self, parts: Mapping[str, str]) -> None:
        """Let machines join, each with the part of the shared data that is named."""
        ticket = self.ticket(len(parts))
        for name, part in parts.items():
            done = self.ask_agent(name, "join", "-", "--name", name, "--part", part, given=ticket)
            assert done.returncode == 0, done.stderr

    def start(self, *names: str) -> None:
        """Start these agents and wait until each has its session and its MQTT link."""
        for name in names:
            self._start(name, [AGENT, "run"], self._env(name))
        for name in names:
            self.until_agent(name, "has both its links", lambda told: told["session"])
            self.until_agent(name, "has both its links", lambda told: told["mqtt"])

    def agent(self, name: str) -> dict[str, Any]:
        """What the agent last said of itself; empty if it never ran."""
        try:
            told: dict[str, Any] = json.loads((self.folder / name / "status.json").read_bytes())
        except FileNotFoundError:
            return {}
        return told

    def until_agent(self, name: str, what: str, condition: Callable[[dict[str, Any]], Any]) -> None:
        """Wait until the running agent says something that meets the condition."""
        program = self.programs[name]

        def met() -> Any:
            assert program.process.poll() is None, f"{name} ended: {program.log}"
            told = self.agent(name)
            return told.get("pid") == program.process.pid and condition(told)

        until(met, f"{name} {what}")

    # --- runs ---

    def start_run(self, *words: str) -> str:
        """`commonweight run start words…`; the run's id."""
        return str(self.data("run", "start", *words)["run"])

    def run(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.data("run", "show", run)
        return found

    def ended_run(self, run: str) -> dict[str, Any]:
        """The run, once it has ended."""
        shown: dict[str, Any] = {}

        def ended() -> bool:
            shown.update(self.run(run))
            return shown["state"] in ("finished", "stopped", "failed")

        # Each look is a process of its own, on the cores that the run needs.
        until(ended, "the run ended", within_s=120.0, every_s=0.5)
        return shown

    def events(self) -> list[str]:
        return [event["text"] for event in self.data("status")["events"]]

    # --- the end ---

    def _env(self, name: str = "coordinator") -> dict[str, str]:
        variable = "COMMONWEIGHT_HOME" if name == "coordinator" else "COMMONWEIGHT_AGENT_HOME"
        return environment(self.folder, **{variable: str(self.folder / name)}, **self._settings)

    def _start(self, name: str, words: list[str], env: dict[str, str]) -> Program:
        self.note_family()
        self.programs[name] = Program(words, env, self.folder / f"{name}.log")
        return self.programs[name]

    def note_family(self) -> None:
        """Remember what our programs have started, so that `close` can tell what is left."""
        for program in self.programs.values():
            for child in descendants(program.process.pid):
                self._family[child.pid] = child

    def close(self) -> None:
        """End every process, agents first; fail if something is left that should have ended."""
        self.note_family()
        programs = sorted(self.programs.items(), key=lambda item: item[0] == "up")
        stuck = []
        for name, program in programs:
            if program.process.poll() is None:
                try:
                    program.stop()
                except subprocess.TimeoutExpired:
                    program.kill()
                    stuck.append(name)
        _, left = psutil.wait_procs(list(self._family.values()), timeout=10)
        left = alive(left)
        for process in left:
            process.kill()
        assert not stuck, f"did not stop when asked: {stuck}"
        assert not left, f"left behind: {left}"

    def print_logs(self) -> None:
        for name, program in self.programs.items():
            print(f"--- {name}\n{program.log[-4000:]}")


def alive(processes: Iterable[psutil.Process]) -> list[psutil.Process]:
    """Those that still run; one that has ended and waits to be reaped does not."""
    found = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def descendants(pid: int) -> list[psutil.Process]:
    """What this process has started, and what those have."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@contextmanager
def fleet(folder: Path, **settings: str) -> Iterator[Fleet]:
    """A fleet whose processes all end with the block; its logs are printed if it fails.

    `settings` are environment variables of its processes.
    """
    made = Fleet(folder, settings)
    with closing(made):
        yield made


@contextmanager
def closing(made: Fleet) -> Iterator[None]:
    """Closes a fleet with the block; prints its logs if that or the block fails."""
    try:
        yield
    except BaseException:
        made.print_logs()
        try:
            made.close()
        except AssertionError as err:
            print(err)
        raise
    try:
        made.close()
    except AssertionError:
        made.print_logs()
        raise
