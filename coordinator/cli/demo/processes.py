"""The processes of a demo: a coordinator and its agents in a folder. All end with the demo.

Rule 1: a signal is noted when it comes and raised between two steps, so that every child that was
        started is also ended.
Rule 2: each child has its own session, so a Ctrl-C in the terminal reaches only this process. It
        ends the children in order, agents first.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from coordinator.api.schema import TicketRequest
from coordinator.fleet.state import Fleet
from coordinator.remote.api_client import Remote
from coordinator.storage.settings import UP_FILE
from protocols.errors import CommonweightError, Unreachable
from protocols.local.programs import child_environment

STEP_S = 0.05
START_TIMEOUT_S = 60.0
#: Added for every agent, because they share the cores.
START_TIMEOUT_PER_AGENT_S = 5.0
STOP_TIMEOUT_S = 10.0
_LOG_LINES = 8


class Interrupts:
    """Notes Ctrl-C, SIGTERM and a closed terminal; `check` and `wait` raise KeyboardInterrupt."""

    def __init__(self) -> None:
        self.noted = threading.Event()
        self.hurry = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            if (number := getattr(signal, name, None)) is not None:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted.is_set():
            self.hurry.set()  # the second signal: kill what is left
        self.noted.set()

    def check(self) -> None:
        if self.noted.is_set():
            raise KeyboardInterrupt

    def wait(self, seconds: float) -> None:
        self.noted.wait(seconds)
        self.check()


class DemoFleet:
    """A coordinator and agents in `folder`. `stop` ends them and their children."""

    def __init__(self, folder: Path, interrupts: Interrupts) -> None:
        self.home = folder / "coordinator"
        self.folder = folder
        self._interrupts = interrupts
        self._coordinator: subprocess.Popen[bytes] | None = None
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self._joining: dict[str, subprocess.Popen[bytes]] = {}
        self._others: list[subprocess.Popen[bytes]] = []
        self._settings: dict[str, str] = {}

    def start_coordinator(self) -> Remote:
        """Start it on a free port and wait until it is up.

        Raises CommonweightError with the end of its log if it does not come up.
        """
        self._coordinator = self._spawn(
            "coordinator", ["coordinator.cli", "up", "--host", "127.0.0.1", "--port", "0"]
        )
        self._await(lambda: (self.home / UP_FILE).exists(), "the coordinator did not come up")
        return Remote(self.home)

    def start_agents(
        self,
        remote: Remote,
        count: int,
        task: str,
        split: str,
        threads: int,
        tables: Sequence[Path] = (),
    ) -> None:
        """Join and start `count` agents, each with its part of the data or its own table.

        They allow this task alone.
        """
        order = TicketRequest(ttl_s=3600, uses=count, label="demo")
        ticket = remote.make_ticket(order)["ticket"].encode()
        # A person waits for the demo, so the agents work at normal priority.
        self._settings = {"THREADS": str(threads), "WORK": "always", "NICE": "0"}
        names = {f"agent{part + 1}": part for part in range(count)}
        for name, part in names.items():
            words = ["join", "-", "--name", name, "--allow", task, "--columns", "all"]
            words += ["--part", f"{part}/{count}", "--split", split]
            if tables:
                words += ["--data", str(tables[part])]
            # On standard input: every user of this machine can read the arguments.
            self._joining[name] = self._spawn(name, ["agent.cli", *words], ticket)

        def all_started() -> bool:
            for name in names.keys() - self.agents.keys():
                code = self._joining[name].poll()
                if code:
                    raise self._failed(f"{name} could not join", name)
                if code == 0:
                    self.start_agent(name)
            return names.keys() == self.agents.keys()

        timeout_s = START_TIMEOUT_S + count * START_TIMEOUT_PER_AGENT_S
        self._await(all_started, "the agents did not join", timeout_s)

    def start_agent(self, name: str) -> None:
        """Start an agent that has joined."""
        self.agents[name] = self._spawn(name, ["agent.cli", "run"])

    def start_monitor(self) -> subprocess.Popen[bytes]:
        """Start the monitor of this fleet on this terminal."""
        environment = child_environment() | {"COMMONWEIGHT_HOME": str(self.home)}
        words = [sys.executable, "-P", "-m", "coordinator.cli", "monitor"]
        return subprocess.Popen(words, env=environment)

    def predict(self, name: str, words: str, task: str) -> subprocess.Popen[bytes]:
        """Start a prediction of an agent with its newest version; the answers are its stdout."""
        process = self._spawn(
            f"{name}.predict",
            ["agent.cli", "predict", words, "--run", task, "--which", "latest"],
            home=name,
            stdout=subprocess.PIPE,
        )
        self._others.append(process)
        return process

    def _await(
        self, condition: Callable[[], bool], otherwise: str, within_s: float = START_TIMEOUT_S
    ) -> None:
        until = time.monotonic() + within_s
        while not condition():
            self.check()
            if time.monotonic() > until:
                raise self._failed(f"{otherwise} in {within_s:.0f} s", "coordinator")
            self._interrupts.wait(STEP_S)
        self.check()

    def check(self, quorum: int = 0) -> None:
        """Raise KeyboardInterrupt after a signal, CommonweightError if too few processes run.

        Without a quorum, all agents that were started must run.
        """
        self._interrupts.check()
        if self._coordinator is not None and self._coordinator.poll() is not None:
            raise self._failed("the coordinator ended", "coordinator")
        ended = [name for name, process in self.agents.items() if process.poll() is not None]
        if ended and len(self.agents) - len(ended) < (quorum or len(self.agents)):
            raise self._failed(f"{', '.join(ended)} ended", ended[0])

    def _failed(self, what: str, name: str) -> CommonweightError:
        """The error with the last lines of the log, because the log is deleted soon."""
        try:
            lines = self._log(name).read_text(errors="replace").splitlines()[-_LOG_LINES:]
        except OSError:
            lines = []
        said = "".join(f"\n  {line}" for line in lines if line.strip())
        return CommonweightError(what + (f"; the end of its log:{said}" if said else ""))

    def snapshot(self, remote: Remote) -> Fleet:
        """The fleet now. Raises as `check` if the coordinator has ended, else Unreachable."""
        try:
            return remote.fleet()
        except Unreachable:
            self._interrupts.wait(STEP_S)
            self.check(1)
            raise

    def stop(self) -> None:
        """End every process with its children: first terminate, then kill."""
        agents = [*self._others, *self._joining.values(), *self.agents.values()]
        coordinator = [self._coordinator] if self._coordinator else []
        family = [one for process in (*agents, *coordinator) for one in _descendants(process)]
        for group in (agents, coordinator):
            for process in group:
                process.terminate()
            self._end(group)
        # Children of these processes end with them; this makes sure of it.
        _, left = psutil.wait_procs(family, timeout=0 if self._interrupts.hurry.is_set() else 2)
        _kill(left)
        psutil.wait_procs(left, timeout=2)

    def _end(self, group: list[subprocess.Popen[bytes]]) -> None:
        until = time.monotonic() + STOP_TIMEOUT_S
        while any(process.poll() is None for process in group):
            if time.monotonic() > until or self._interrupts.hurry.wait(0.02):
                break
        for process in group:
            if process.poll() is None:
                process.kill()
                process.wait()

    def _spawn(
        self,
        name: str,
        words: list[str],
        said: bytes = b"",
        *,
        home: str = "",
        stdout: int | None = None,
    ) -> subprocess.Popen[bytes]:
        environment = child_environment()
        variable = "COMMONWEIGHT_HOME" if name == "coordinator" else "COMMONWEIGHT_AGENT_HOME"
        environment[variable] = str(self.folder / (home or name))
        environment |= {f"COMMONWEIGHT_AGENT_{k}": v for k, v in self._settings.items()}
        with self._log(name).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", *words],
                stdin=subprocess.PIPE if said else subprocess.DEVNULL,
                stdout=log if stdout is None else stdout,
                stderr=log,
                env=environment,
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        if process.stdin is not None:
            try:
                process.stdin.write(said)
                process.stdin.close()
            except OSError:  # it has ended; its log says why
                pass
        return process

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


@contextlib.contextmanager
def temporary() -> Iterator[tuple[DemoFleet, Interrupts]]:
    """A fleet in a temporary folder. Its processes and files are removed at the end."""
    with Interrupts() as interrupts:
        folder = Path(tempfile.mkdtemp(prefix="commonweight-demo-"))
        fleet = DemoFleet(folder, interrupts)
        try:
            yield fleet, interrupts
        finally:
            fleet.stop()
            shutil.rmtree(folder, ignore_errors=True)


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _descendants(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    try:
        return psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        return []
