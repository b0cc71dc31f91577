"""The fleet of a demo in a temporary folder, for programs that record the monitor."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from coordinator.api.schema import StartRunRequest
from coordinator.cli.demo.processes import DemoFleet, Interrupts, temporary
from coordinator.fleet.readings import num_available
from coordinator.fleet.state import Fleet
from coordinator.storage.run_events import RunSpec

AGENTS, ROUNDS = 5, 16
SPEC = RunSpec(task="mnist", rounds=ROUNDS, quorum=AGENTS - 1, deadline_s=120.0)


class Demo:
    """A running coordinator, and five agents with a few digits each."""

    def __init__(self, fleet: DemoFleet, interrupts: Interrupts) -> None:
        self.fleet = fleet
        self.remote = fleet.start_coordinator()
        self._interrupts = interrupts

    def join(self) -> None:
        """Start the agents and wait until all are connected."""
        threads = max(1, (os.cpu_count() or 1) // AGENTS)
        self.fleet.start_agents(self.remote, AGENTS, "mnist", "shards", threads)
        self.until(all_there, AGENTS)

    def learn(self) -> None:
        """Start the run."""
        self.remote.start_run(StartRunRequest(spec=SPEC))

    def until(self, holds: Callable[[Fleet], bool], quorum: int = AGENTS - 1) -> None:
        """Wait. Raises KeyboardInterrupt, and CommonweightError if the coordinator ended, or fewer
        agents than the quorum are left."""
        while not holds(self.remote.fleet()):
            self.fleet.check(quorum)
            self.wait(0.1)

    def wait(self, seconds: float) -> None:
        self._interrupts.wait(seconds)


def all_there(fleet: Fleet) -> bool:
    return num_available(fleet, time.time()) == AGENTS


@contextmanager
def demo() -> Iterator[Demo]:
    """A demo that ends with the block."""
    with temporary() as (fleet, interrupts):
        lived = Demo(fleet, interrupts)
        yield lived
        lived.remote.close()
