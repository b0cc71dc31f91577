"""The real fleet of the journeys: a coordinator, a broker and agents, each of which can go away."""

from __future__ import annotations

import json
import socketserver
import subprocess
import sys
import tarfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import psutil

from benchmarks.faults.site import Site
from coordinator.remote.api_client import Remote
from tests.journeys import quick_task
from tests.journeys.model import NAMES
from tests.support.fleet_harness import HOST, ROOT, Program, descendants
from tests.support.waiting import wait_for

#: The oldest commit whose agents work with the present coordinator.
OLD_COMMIT = "1c1a305"
ROWS = 60
SETTINGS = {
    "COMMONWEIGHT_AGENT_TASK_FILES": f"quick={Path(quick_task.__file__)}:Quick",
    "COMMONWEIGHT_AGENT_JOBS_SCATTER": "on",
    "COMMONWEIGHT_AGENT_JOBS_PRIVATE_MODELS": "*",
    "COMMONWEIGHT_AGENT_JOBS_PRIVATE_PER_DAY": "1000000",
    "COMMONWEIGHT_AGENT_ANALYZE": "on",
    # Not by `join --allow`, which older agents do not have.
    "COMMONWEIGHT_AGENT_TASKS": "*",
}


def old_tree(folder: Path) -> Path | None:
    """Unpack the sources of the old commit; None without the git history."""
    words = ["git", "-C", str(ROOT), "archive", OLD_COMMIT, "agent", "coordinator", "protocols"]
    try:
        done = subprocess.run(words, capture_output=True, check=False)
    except FileNotFoundError:
        return None
    if done.returncode != 0:
        return None
    with tarfile.open(fileobj=BytesIO(done.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder


class JourneyFleet(Site):
    """A fleet on fixed ports with tables of its own. `old` names the agents of the old commit."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, dict(SETTINGS))
        self.files, self.backups = folder / "files", folder / "backups"
        self.files.mkdir()
        self.backups.mkdir()
        self.old_tree = old_tree(folder / "old")
        self.old: set[str] = set()
        #: Digests in the ledgers of homes that were deleted.
        self.told_before: set[str] = set()
        self.up_options: tuple[str, ...] = ()
        self.remote: Remote | None = None
        self._occupier: socketserver.ThreadingTCPServer | None = None
        self._skipped: dict[Path, int] = {}
        self._numbers = iter(range(10**6))

    def _env(self, name: str = "coordinator") -> dict[str, str]:
        env = super()._env(name)
        return env | {"PYTHONPATH": str(self.old_tree)} if name in self.old else env

    def _start(self, name: str, words: list[str], env: dict[str, str]) -> Program:
        # A command ends at once, and its files and sockets with it. Other programs stay.
        return super()._start(name, words, env | {"PYTHONWARNINGS": "default::ResourceWarning"})

    def new_number(self) -> int:
        return next(self._numbers)

    def new_file(self, suffix: str) -> Path:
        """A path outside the folder of the fleet's temporary files that no file has yet."""
        return self.files / f"{self.new_number()}{suffix}"

    def forget(self) -> None:
        """The coordinator knows less than before: what it acknowledged since then may be lost."""
        self._seen = []
        for name in NAMES:
            self.truth_file(name).unlink(missing_ok=True)

    # --- logs ---

    def logs(self) -> list[Path]:
        return sorted([*self.folder.glob("*.log"), *self.folder.glob("*/*.log")])

    def unread(self, path: Path) -> str:
        """What a log has, without what older agents wrote."""
        if {path.stem, path.parent.name} & self.old:
            self._skip(path)
        with path.open("rb") as file:
            file.seek(self._skipped.get(path, 0))
            return file.read().decode(errors="replace")

    def _skip(self, path: Path) -> None:
        self._skipped[path] = path.stat().st_size

    # --- commands ---

    def do(self, *words: str) -> str:
        """Run a `commonweight` command that must succeed; its output."""
        return self._checked("commonweight", words, self.ask(*words))

    def do_agent(self, name: str, *words: str, given: str = "") -> str:
        """Run a `commonweight-agent` command that must succeed; its output."""
        done = self.ask_agent(name, *words, given=given)
        return self._checked(f"{name}: commonweight-agent", words, done)

    def _checked(
        self, program: str, words: tuple[str, ...], done: subprocess.CompletedProcess[str]
    ) -> str:
        said = done.stdout + done.stderr
        assert done.returncode == 0, f"{program} {' '.join(words)}: {done.returncode}\n{said}"
        assert "Traceback" not in said, f"{program} {' '.join(words)}: {said}"
        return done.stdout

    # --- the coordinator ---

    def begin(self) -> None:
        """Start everything: a coordinator and the agents with a table each."""
        self.rise()
        for number, name in enumerate(NAMES):
            (self.folder / f"{name}.csv").write_text(quick_task.table(ROWS, number))
            self.join_one(name)
        self.start(*NAMES)

    def rise(self, spec: str = "") -> float:
        took = super().rise(spec)
        self.remote = Remote(self.home)
        return took

    def lower(self, *, kill: bool = False) -> None:
        """End the coordinator."""
        self.note_family()
        if self.remote is not None:
            self.remote.close()
            self.remote = None
        if kill:
            self.programs["up"].kill()
        else:
            assert self.programs["up"].stop() == 0, self.programs["up"].log[-2000:]

    def client(self) -> Remote:
        assert self.remote is not None
        return self.remote

    # --- the broker ---

    def broker(self) -> psutil.Process | None:
        """The process of the embedded broker."""
        for child in descendants(self.programs["up"].process.pid):
            with suppress(psutil.Error):
                if child.cmdline()[-1:] and child.cmdline()[-1].endswith("gate.json"):
                    return child
        return None

    def take_broker_away(self) -> None:
        """Kill the broker and take its port, so that it cannot come back."""

        class Occupier(socketserver.ThreadingTCPServer):
            """Closes each connection at once. Its port is free as soon as it ends."""

            allow_reuse_address = daemon_threads = True

        def taken() -> bool:
            if (broker := self.broker()) is not None:
                with suppress(psutil.NoSuchProcess):
                    broker.kill()
            with suppress(OSError):
                self._occupier = Occupier((HOST, self.mqtt_port), socketserver.BaseRequestHandler)
            return self._occupier is not None

        wait_for(taken, "the broker's port is free", every_s=0.02)
        assert self._occupier is not None
        threading.Thread(target=self._occupier.serve_forever, daemon=True).start()

    def bring_broker_back(self) -> None:
        if self._occupier is not None:
            self._occupier.shutdown()
            self._occupier.server_close()
            self._occupier = None

    # --- agents ---

    def join_one(self, name: str) -> None:
        words = ["join", "-", "--name", name, "--data", str(self.folder / f"{name}.csv")]
        words += ["--replace"] if (self.folder / name / "enrolled.json").exists() else []
        self.do_agent(name, *words, given=self.ticket())

    def trust_each_other(self, names: Sequence[str]) -> None:
        """Each owner enters the present ids of the others."""
        ids = {
            name: json.loads((self.folder / name / "enrolled.json").read_bytes())["peer"]
            for name in names
        }
        for name in names:
            for other in names:
                if other != name:
                    self.do_agent(name, "trust", "add", ids[other], "--name", other)

    def start_one(self, name: str, *, mqtt: bool) -> None:
        """Start an agent; wait for its session, and for its MQTT link if there is a broker."""
        self.start_agent(name)
        self.until_agent(name, "has its session", lambda told: told["session"])
        if mqtt:
            self.until_agent(name, "has its MQTT link", lambda told: told["mqtt"])

    def stop_agent(self, name: str, *, kill: bool = False) -> None:
        """End an agent, if it runs, and its trainer."""
        self.note_family()
        program = self.programs[name]
        if program.process.poll() is not None:
            return
        children = descendants(program.process.pid)
        if kill:
            program.kill()
        else:
            assert program.stop() == 0, program.log[-2000:]
        _, left = psutil.wait_procs(children, timeout=20)
        assert not left, f"{name} has left {left}"
        if name in self.old:
            for path in self.logs():
                if name in (path.stem, path.parent.name):
                    self._skip(path)

    def close(self) -> None:
        """End everything. Raises AssertionError if a program does not end, or leaves a process."""
        self.bring_broker_back()
        if self.remote is not None:
            self.remote.close()
        super().close()

    def print_logs(self) -> None:
        """The logs stay in the folder; their ends would hide the steps."""
        print(f"logs: {self.folder}", file=sys.stderr)
