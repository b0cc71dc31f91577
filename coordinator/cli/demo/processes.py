"""The processes of a demo: a coordinator and its agents in a folder, none of which outlives it.

Rule 1: an interrupt is noted when it comes and raised between two steps, so that no child is
        started and then forgotten.
Rule 2: each child has a session of its own: a Ctrl-C in the terminal is for us, and we end the
        children in order, agents first.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from coordinator.api.schema import TicketRequest
from coordinator.remote.api_client import Remote
from coordinator.storage.settings import UP_FILE
from protocols.errors import CommonweightError, Unreachable

STEP_S = 0.05
START_TIMEOUT_S = 60.0
#: And so much for every agent: they share the cores.
START_TIMEOUT_PER_AGENT_S = 5.0
STOP_TIMEOUT_S = 10.0
_LOG_LINES = 8


class Interrupts:
    """Ctrl-C, SIGTERM and a closed terminal, noted; `check` and `wait` raise KeyboardInterrupt."""

    def __init__(self) -> None:
        self.noted = threading.Event()
        self.hurry = threading.Event()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK"):
            if (number := getattr(signal, name, None)) is not None:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted.is_set():
            self.hurry.set()  # asked twice: whoever is left is killed
        self.noted.set()

    def check(self) -> None:
        if self.noted.is_set():
            raise KeyboardInterrupt

    def wait(self, seconds: float) -> None:
        self.noted.wait(seconds)
        self.check()


class DemoFleet:
    """A coordinator and agents over `folder`. `stop` ends them all, and what they started."""

    def __init__(self, folder: Path, interrupts: Interrupts) -> None:
        self.home = folder / "coordinator"
        self.folder = folder
        self._interrupts = interrupts
        self._coordinator: subprocess.Popen[bytes] | None = None
        self._agents: dict[str, subprocess.Popen[bytes]] = {}
        self._joining: dict[str, subprocess.Popen[bytes]] = {}
        self._settings: dict[str, str] = {}

    def start_coordinator(self) -> Remote:
        """Start it on a free port of this machine and wait until it answers.

        Raises CommonweightError with its last words when it does not come up.
        """
        self._coordinator = self._spawn(
            "coordinator", ["coordinator.cli", "up", "--host", "127.0.0.1", "--port", "0"]
        )
        self._await(lambda: (self.home / UP_FILE).exists(), "the coordinator did not come up")
        return Remote(self.home)

    def start_agents(
        self, remote: Remote, count: int, split: str, threads: int, tables: Sequence[Path] = ()
    ) -> None:
        """Join and start `count` agents, each with its part of the data, or a table of its own."""
        order = TicketRequest(ttl_s=3600, uses=count, label="demo")
        ticket = remote.make_ticket(order)["ticket"].encode()
        # Somebody waits for a demo: it does not yield to what else this machine does.
        self._settings = {"THREADS": str(threads), "WORK": "always", "NICE": "0"}
        names = [f"agent{number}" for number in range(1, count + 1)]
        for part, name in enumerate(names):
            words = ["join", "-", "--name", name, "--part", f"{part}/{count}", "--split", split]
            if tables:
                words += ["--data", str(tables[part])]
            # By standard input: an argument list can be read by everybody on the machine.
            self._joining[name] = self._spawn(name, ["agent.cli", *words], ticket)
        waiting = list(names)

        def all_run() -> bool:
            for name in list(waiting):
                code = self._joining[name].poll()
                if code:
                    raise self._failed(f"{name} could not join", name)
                if code == 0:
                    waiting.remove(name)
                    self.start_agent(name)
            return not waiting

        within_s = START_TIMEOUT_S + count * START_TIMEOUT_PER_AGENT_S
        self._await(all_run, "the agents did not join", within_s)

    def start_agent(self, name: str) -> None:
        """Start an agent that has joined."""
        self._agents[name] = self._spawn(name, ["agent.cli", "run"])

    def kill_agent(self, name: str) -> None:
        """As a power cut would: without a word, its trainer with it."""
        agent = self._agents[name]
        family = _descendants(agent)
        agent.kill()
        agent.wait()
        _kill(family)

    def start_monitor(self) -> subprocess.Popen[bytes]:
        """The monitor of this fleet, on our own terminal."""
        environment = _environment() | {"COMMONWEIGHT_HOME": str(self.home)}
        words = [sys.executable, "-P", "-m", "coordinator.cli", "monitor"]
        return subprocess.Popen(words, env=environment)

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
        """Raise KeyboardInterrupt if asked to stop, CommonweightError if too few processes live.

        Without a quorum all agents that were started are needed.
        """
        self._interrupts.check()
        if self._coordinator is not None and self._coordinator.poll() is not None:
            raise self._failed("the coordinator ended", "coordinator")
        ended = [name for name, process in self._agents.items() if process.poll() is not None]
        if ended and len(self._agents) - len(ended) < (quorum or len(self._agents)):
            raise self._failed(f"{', '.join(ended)} ended", ended[0])

    def _failed(self, what: str, name: str) -> CommonweightError:
        """The error, with the last lines of the log that explains it: the log is deleted soon."""
        try:
            lines = self._log(name).read_text(errors="replace").splitlines()[-_LOG_LINES:]
        except OSError:
            lines = []
        said = "".join(f"\n  {line}" for line in lines if line.strip())
        return CommonweightError(what + (f"; its last words:{said}" if said else ""))

    def request(self, remote: Remote, ask: Callable[[Remote], Any]) -> Any:
        """What the coordinator answers. Raises as `check` if it is gone, else Unreachable."""
        try:
            return ask(remote)
        except Unreachable:
            self._interrupts.wait(STEP_S)
            self.check(1)
            raise

    def stop(self) -> None:
        """End every process: asked first, then killed, each with whatever it started itself."""
        agents = [*self._joining.values(), *self._agents.values()]
        coordinator = [self._coordinator] if self._coordinator else []
        family = [one for process in (*agents, *coordinator) for one in _descendants(process)]
        for group in (agents, coordinator):
            for process in group:
                process.terminate()
            self._end(group)
        # What our children started ends with them; this only makes sure of it.
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

    def _spawn(self, name: str, words: list[str], said: bytes = b"") -> subprocess.Popen[bytes]:
        environment = _environment()
        variable = "COMMONWEIGHT_HOME" if name == "coordinator" else "COMMONWEIGHT_AGENT_HOME"
        environment[variable] = str(self.folder / name)
        environment |= {f"COMMONWEIGHT_AGENT_{k}": v for k, v in self._settings.items()}
        with self._log(name).open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", *words],
                stdin=subprocess.PIPE if said else subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
            )
        if process.stdin is not None:
            try:
                process.stdin.write(said)
                process.stdin.close()
            except OSError:  # it ended already; its log says why
                pass
        return process

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


@contextlib.contextmanager
def temporary() -> Iterator[tuple[DemoFleet, Interrupts]]:
    """A fleet over a folder that goes with it: no process and no file of them is left behind."""
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


def _environment() -> dict[str, str]:
    """Ours without this machine's own commonweight settings."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("COMMONWEIGHT")}
    root = Path(__file__).resolve().parents[3]
    if root.name not in ("site-packages", "dist-packages"):  # run from a source tree
        paths = filter(None, [str(root), environment.get("PYTHONPATH")])
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment
