"""A real fleet for one test: processes started by the public commands, and always ended."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from coordinator.transport.ports import listenable
from tests.support import forked_commands
from tests.support.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]
COORDINATOR, AGENT = "coordinator.cli", "agent.cli"
HOST = "127.0.0.1"
#: With these options of `join`, an agent runs every task on its machine.
ALLOW = ("--allow", "*", "--columns", "all")
WITHIN_S = 120.0
LOOK_EVERY_S = 0.05


#: Linux, macOS and Windows give higher ports to outgoing connections and to servers on port 0.
_PORTS = range(10_240, 32_000, 2)
_untried = iter(random.Random().sample(_PORTS, len(_PORTS)))


def free_port() -> int:
    """A free port, whose next one is free as well: a coordinator puts its broker there.

    Both stay free while a test stops the coordinator and starts it again. The system would give
    a port of its own range to any connection meanwhile, and keep it for a minute after its end.
    """
    for port in _untried:
        with contextlib.suppress(OSError):
            listenable(HOST, port + 1)
            return listenable(HOST, port)
    raise OSError(errno.EADDRINUSE, "every port for tests was used")


def two_free_ports() -> tuple[int, int]:
    """Two free ports."""
    return free_port(), free_port()


def environment(folder: Path, **settings: str) -> dict[str, str]:
    """The environment of this process without the commonweight variables of this machine."""
    found = {name: value for name, value in os.environ.items() if "COMMONWEIGHT" not in name}
    found |= {
        "HOME": str(folder),
        "XDG_DATA_HOME": str(folder / "data"),
        "TMPDIR": str(folder),
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "200",
        "NO_COLOR": "1",
        # Any free port, because another program may use the default one.
        "COMMONWEIGHT_PORT": "0",
        "COMMONWEIGHT_AGENT_THREADS": "1",
        # Other tests run on the same cores.
        "COMMONWEIGHT_AGENT_WORK": "always",
        "COMMONWEIGHT_AGENT_NICE": "0",
    }
    return found | settings


def command(words: list[str], env: dict[str, str]) -> list[str]:
    """The command line of `words`, the first of which is COORDINATOR or AGENT.

    With INSTALLED set it is the script in that folder, else the module of this source tree.
    """
    if folder := env.get("INSTALLED"):
        script = {COORDINATOR: "commonweight", AGENT: "commonweight-agent"}[words[0]]
        return [str(Path(folder) / script), *words[1:]]
    return [sys.executable, "-P", "-m", *words]


def run_program(
    words: list[str], env: dict[str, str], *, given: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run one of the two commands and wait until it ends."""
    if "INSTALLED" not in env and forked_commands.can_fork(env):
        return forked_commands.run(words, env, given, timeout_s=120.0)
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
    """A process in the background, with its output in a file; `log` is that output."""

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
        """Send SIGKILL, which is like a power cut."""
        self.process.kill()
        self.process.wait()

    def stop(self, within_s: float = 20.0) -> int:
        """Send SIGTERM and wait; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within_s)

    def wait(self, within_s: float = 120.0) -> int:
        return self.process.wait(within_s)


class Fleet:
    """A coordinator and agents in `folder`, controlled by the public commands."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder = folder
        self._settings = settings
        self.home = folder / "coordinator"
        self.programs: dict[str, Program] = {}
        self._family: dict[int, psutil.Process] = {}

    # --- the two commands ---

    def ask(self, *words: str, given: str = "") -> subprocess.CompletedProcess[str]:
        """Run `commonweight words…` and wait until it ends."""
        return run_program([COORDINATOR, *words], self._env(), given=given)

    def data(self, *words: str) -> Any:
        """The data in the output of `commonweight words… --json`."""
        done = self.ask(*words, "--json")
        assert done.returncode == 0, f"commonweight {' '.join(words)}: {done.stderr}{done.stdout}"
        return json.loads(done.stdout)["data"]

    def ask_agent(
        self, name: str, *words: str, given: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run `commonweight-agent words…` on the machine `name` and wait until it ends."""
        return run_program([AGENT, *words], self._env(name), given=given)

    def background(self, name: str, *words: str) -> Program:
        """Run `commonweight words…` in the background."""
        return self._start(name, [COORDINATOR, *words], self._env())

    # --- coordinator and agents ---

    def up(self, *words: str, port: int = 0) -> Program:
        """Start the coordinator and wait until it answers."""
        program = self.background("up", "up", "--host", HOST, "--port", str(port), *words)

        def answers() -> bool:
            assert program.process.poll() is None, f"the coordinator ended: {program.log}"
            return (self.home / "up.json").exists()

        wait_for(answers, "the coordinator is up")
        return program

    def ticket(self, uses: int = 1) -> str:
        return str(self.data("ticket", "create", "--uses", str(uses))["ticket"])

    def join(self, *names: str) -> None:
        """Join these machines, each with its part of the shared data."""
        self.join_parts({name: f"{number}/{len(names)}" for number, name in enumerate(names)})

    def join_parts(self, parts: Mapping[str, str]) -> None:
        """Join machines, each with the given part of the shared data."""
        ticket = self.ticket(len(parts))
        for name, part in parts.items():
            words = ("join", "-", "--name", name, "--part", part, *ALLOW)
            done = self.ask_agent(name, *words, given=ticket)
            assert done.returncode == 0, done.stderr

    def start(self, *names: str) -> None:
        """Start these agents and wait until each has its session and its MQTT link."""
        for name in names:
            self.start_agent(name)
        for name in names:
            self.until_agent(name, "has both its links", lambda told: told["session"])
            self.until_agent(name, "has both its links", lambda told: told["mqtt"])

    def start_agent(self, name: str) -> None:
        """Start this agent, and do not wait."""
        self._start(name, [AGENT, "run"], self._env(name))

    def agent(self, name: str) -> dict[str, Any]:
        """The last status of the agent; empty if it never ran."""
        try:
            told: dict[str, Any] = json.loads((self.folder / name / "status.json").read_bytes())
        except FileNotFoundError:
            return {}
        return told

    def until_agent(self, name: str, what: str, condition: Callable[[dict[str, Any]], Any]) -> None:
        """Wait until the status of the running agent meets the condition."""
        program = self.programs[name]

        def met() -> Any:
            assert program.process.poll() is None, f"{name} ended: {program.log}"
            told = self.agent(name)
            return told.get("pid") == program.process.pid and condition(told)

        wait_for(met, f"{name} {what}")

    # --- runs ---

    def start_run(self, *words: str) -> str:
        """Run `commonweight run start words…`; return the run's id."""
        return str(self.data("run", "start", *words)["run"])

    def run(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = self.data("run", "show", run)
        return found

    def ended_run(self, run: str) -> dict[str, Any]:
        """Wait until the run has ended, and return it."""
        shown: dict[str, Any] = {}

        def ended() -> bool:
            shown.update(self.run(run))
            return shown["state"] in ("finished", "stopped", "failed")

        # Each poll starts a process on the cores that the run needs.
        wait_for(ended, "the run ended", within_s=120.0, every_s=0.5)
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
        """Remember the child processes of our programs, so that `close` can find leftovers."""
        for program in self.programs.values():
            for child in descendants(program.process.pid):
                self._family[child.pid] = child

    def close(self) -> None:
        """End every process, agents first; fail if a process is left."""
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
    """The processes that still run; zombies do not count."""
    found = []
    for process in processes:
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def descendants(pid: int) -> list[psutil.Process]:
    """The child processes of this process, and their child processes."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


@contextmanager
def fleet(folder: Path, **settings: str) -> Iterator[Fleet]:
    """A fleet whose processes end with the block; prints its logs if the block fails.

    `settings` are environment variables of its processes.
    """
    made = Fleet(folder, settings)
    with closing(made):
        yield made


@contextmanager
def closing(made: Fleet) -> Iterator[None]:
    """Closes a fleet at the end of the block; prints its logs if that or the block fails."""
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
