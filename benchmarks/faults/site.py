"""A real fleet whose processes can have failpoints and truth files."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from agent.home import enrollment_file
from benchmarks.faults import checker, failpoint_names
from benchmarks.faults.checker import Fact, Line
from coordinator.api.schema import StartRunRequest
from coordinator.remote.api_client import Remote
from coordinator.storage.run_spec import RunSpec, Setting
from protocols.errors import CommonweightError
from protocols.local.failpoints import TRUTH, VARIABLE
from tests.support.fleet_harness import AGENT, COORDINATOR, Fleet, closing, two_free_ports
from tests.support.waiting import wait_for

#: A little real training, the same in every run with the same seed and peers.
TRAINING: dict[str, Setting] = {"epochs": 1, "max_steps": 5}
#: Nothing listens on this port.
NO_BROKER = ("--mqtt-url", "mqtt://127.0.0.1:9")
WITHIN_S = 180.0


class Site(Fleet):
    """A fleet on fixed ports. `armed` has the failpoints for the programs that start next."""

    def __init__(self, folder: Path, chosen: dict[str, str]) -> None:
        super().__init__(folder, chosen)
        self.armed: dict[str, str] = {}
        self.port, self.mqtt_port = two_free_ports()
        self.options: tuple[str, ...] = ("--mqtt-port", str(self.mqtt_port))
        self._seen: list[Line] = []

    def _env(self, name: str = "coordinator") -> dict[str, str]:
        env = super()._env(name)
        env[TRUTH] = str(self.truth_file(name))
        if spec := self.armed.get(name):
            env[VARIABLE] = failpoint_names.check(spec)
        return env

    def ledger_home(self) -> Path:
        """The folder with the ledger and the versions, as the checker reads them."""
        return self.home

    def truth_file(self, name: str) -> Path:
        return self.folder / f"{name}.truth"

    # --- coordinator ---

    def rise(self, spec: str = "") -> float:
        """Start the coordinator, with its failpoints; return the seconds until it answers."""
        began = time.monotonic()
        (self.home / "up.json").unlink(missing_ok=True)  # left by a killed one
        self.armed["coordinator"] = spec
        said = len(self.programs["up"].log) if "up" in self.programs else 0
        try:
            self.up(*self.options, port=self.port)
        except AssertionError as err:
            raise AssertionError(self.programs["up"].log[said:]) from err
        finally:
            self.armed["coordinator"] = ""  # other commands have no failpoints
        return time.monotonic() - began

    def rise_and_fall(self, spec: str) -> None:
        """Start a coordinator that dies before it answers."""
        self.armed["coordinator"] = spec
        words = ("up", "--host", "127.0.0.1", "--port", str(self.port), *self.options)
        program = self._start("up", [COORDINATOR, *words], self._env())
        self.armed["coordinator"] = ""
        program.wait(WITHIN_S)

    def dead(self, name: str) -> None:
        """Wait until this program is dead."""
        process = self.programs[name].process
        wait_for(lambda: process.poll() is not None, f"{name} has died", WITHIN_S)

    # --- agents ---

    def start(self, *names: str) -> None:
        """Start these agents; wait for their sessions, and for MQTT if there is a broker."""
        if "--mqtt-url" not in self.options:
            super().start(*names)
            return
        for name in names:
            self._start(name, [AGENT, "run"], self._env(name))
        for name in names:
            self.until_agent(name, "has its session", lambda told: told["session"])

    def background_agent(self, name: str) -> None:
        """Start an agent and do not wait."""
        self._start(name, [AGENT, "run"], self._env(name))

    def redirect(self, name: str, port: int) -> None:
        """Change the port at which this machine reaches the coordinator."""
        home = self.folder / name
        enrollment = enrollment_file.read_enrollment(home)
        enrollment_file.write_enrollment(
            home, replace(enrollment, addresses=(f"127.0.0.1:{port}",))
        )

    def peer(self, name: str) -> str:
        """The peer id of this machine."""
        return enrollment_file.read_enrollment(self.folder / name).peer

    def enlist(self, *names: str) -> None:
        self.join(*names)
        self.start(*names)

    def come_back(self, name: str, spec: str = "") -> None:
        """Start an agent, with its failpoints, and wait for its session."""
        self.armed[name] = spec
        self.start(name)
        self.armed[name] = ""

    # --- runs ---

    def order(
        self,
        *,
        seed: int,
        rounds: int,
        quorum: int,
        task: str = "mnist",
        deadline_s: float = 600.0,
        settings: dict[str, Setting] | None = None,
        late: Literal["drop", "fold"] = "drop",
        handshake: bool = False,
    ) -> str:
        """Start a run; return its id from the ledger, also if the coordinator dies meanwhile."""
        known = checker.run_names(self.ledger_home())
        spec = RunSpec(
            task=task,
            rounds=rounds,
            quorum=quorum,
            seed=seed,
            deadline_s=deadline_s,
            settings=TRAINING if settings is None else settings,
            late=late,
            handshake=handshake,
        )
        remote, said = Remote(self.home), "nothing"
        try:
            remote.start_run(StartRunRequest(spec=spec))
        except CommonweightError as err:
            said = err.message
        finally:
            remote.close()
        new = sorted(checker.run_names(self.ledger_home()) - known)
        assert len(new) == 1, f"the order has led to {new}: {said}"
        return new[0]

    def facts(self, run: str, kind: str = "") -> list[Fact]:
        """The events of a run in the ledger: all, or those of a kind."""
        return checker.read_facts(self.ledger_home(), run, kind)

    def ended(self, run: str) -> str:
        """How a run ended; empty if it has not."""
        return checker.ended(self.facts(run, "Run"))

    def until_versions(self, run: str, count: int = 1) -> None:
        """Wait until a run has committed this many versions."""
        wait_for(
            lambda: len(self.facts(run, "VersionCommitted")) >= count, f"{count} rounds of {run}"
        )

    def outcome(self, run: str, within_s: float = WITHIN_S) -> list[Fact]:
        """Wait until a run has ended; return its events."""
        wait_for(lambda: self.ended(run), f"run {run} ended", within_s, every_s=0.1)
        return self.facts(run)

    def violations(self, names: Sequence[str]) -> list[str]:
        """The findings of the checker; each ledger must extend the last one."""
        truths = [checker.read_truth(self.truth_file(name)) for name in names]
        home = self.ledger_home()
        found = checker.violations(home, truths, self._seen)
        self._seen = checker.read_ledger(home)
        return found


@contextmanager
def site(folder: Path, **chosen: str) -> Iterator[Site]:
    """A Site whose processes end with the block."""
    made = Site(folder, chosen)
    with closing(made):
        yield made
