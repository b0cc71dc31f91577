"""A fleet in one thread: the product's pure cores with simulated network, disk, clock and crashes.

    python -m benchmarks.faults.simulator [SEED [BUG]]     repeat one schedule and print its steps

The state machines of runs, fleet and agent are the product's own. The simulator replaces the I/O
around them by small steps, between which any process can die. A schedule is a seed: several hundred
steps in random order, with delayed, duplicated, reordered and lost messages, crashes, lost writes,
wrong clocks, pauses and deadlines; some start with the handshake before round 1. Then faults stop,
and the run must end. The checker for real fleets checks the simulated disk.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from random import Random
from typing import Any

import msgspec
from msgspec.structs import replace

from benchmarks.faults import checker
from benchmarks.faults.sim_agent import Agent
from benchmarks.faults.sim_coordinator import BUGS, RUN, Coordinator
from benchmarks.faults.sim_disk import FIRST, Disk
from benchmarks.faults.sim_network import Network
from coordinator.runs import decisions, transitions
from coordinator.storage import run_events
from coordinator.storage.run_events import RunSpec

__all__ = ["BUGS", "Schedule", "violations"]

PEERS = ("A", "B", "C")
STEPS = 700
_CALM_STEPS = 7000


class Schedule:
    """The fleet of one seed. `bug` plants one of BUGS to test the checker."""

    def __init__(self, seed: int, bug: str = "") -> None:
        self.random = Random(seed)
        self.now = 0.0
        self.network = Network(self.random)
        spec = RunSpec(
            task="t",
            rounds=self.random.randint(1, 3),
            quorum=self.random.randint(1, 3),
            deadline_s=self.random.choice((20.0, 60.0, 200.0)),
        )
        if seed % 3 == 0:  # no random draw, so that other values stay the same
            buffer, most = 1 + seed // 3 % 4, seed // 12 % 4
            spec = replace(spec, mode="buffered", quorum=1, buffer=buffer, max_staleness=most)
        misfit = ""
        if seed % 4 == 1:  # no random draw here either
            misfit = PEERS[-1] if seed // 4 % 3 == 1 else ""
            tables = {"target": "y"} if seed // 4 % 2 else {}
            quorum = min(
                spec.quorum, len(PEERS) - bool(misfit)
            )  # an incompatible peer stays incompatible
            spec = replace(spec, handshake=True, settings=tables, quorum=quorum)
        news: list[run_events.RunEvent] = [run_events.RunStarted(spec)]
        disk = Disk(self.random)
        if self.random.random() < 0.7:  # the other runs start from the first weights of a peer
            news.append(run_events.WeightsInitialised(FIRST, "file"))
            disk.write(f"version {FIRST}", FIRST)
            disk.sync()
        ledger = [run_events.encode(fact) for fact in news]
        self.coordinator = Coordinator(ledger, disk, self.network, PEERS, bug)
        self.agents = {
            peer: Agent(
                peer,
                Disk(self.random),
                self.network,
                self.coordinator,
                self.random,
                fits=peer != misfit,
            )
            for peer in PEERS
        }
        self.network.agents = self.agents
        self.died: Counter[str] = Counter()
        self.found: list[str] = []
        self._seen = 0

    def play(self) -> list[str]:
        """Run with faults, then without; return the findings as sentences."""
        try:
            for _ in range(STEPS):
                self._step()
        except checker.Violation as err:
            self.found.append(str(err))
        return self.end()

    def end(self) -> list[str]:
        """Run without faults until the run ends; return the findings as sentences."""
        try:
            self._calm_down()
        except checker.Violation as err:
            self.found.append(str(err))
        return [*self.found, *self._judged()]

    def _step(self) -> None:
        self.now += self.random.random()
        self.coordinator.now = self.now
        dice = self.random.random()
        if dice < 0.42:
            self.coordinator.step()
        elif dice < 0.86:
            self.random.choice(list(self.agents.values())).step(self.now)
        elif dice < 0.975:
            self.network.deliver(self.now)
        else:
            self._fault()

    def _fault(self) -> None:
        agent = self.random.choice(list(self.agents.values()))
        match self.random.randrange(9):
            case 0 | 1:
                self.coordinator_dies(power=self.random.random() < 0.5)
            case 2 | 3:
                self.agent_dies(agent, power=self.random.random() < 0.5)
            case 4:
                agent.toggle_pause()
            case 5:
                healed = any(self.network.cut.values())
                self.network.cut.clear()
                self.network.cut[agent.peer] = not healed
            case 6:
                self.coordinator.expire(agent.peer)
            case 7:
                agent.skew_s = self.random.choice((0.0, 3600.0, -3600.0))
            case 8:
                self.now += 30.0

    def agent_dies(self, agent: Agent, *, power: bool) -> None:
        self.died[agent.peer] += 1
        agent.die(power=power)

    def coordinator_dies(self, *, power: bool) -> None:
        self._in_order()
        self.coordinator.die(power=power)
        self.network.limbo.clear()  # its connections close too
        self.died["coordinator"] += 1
        self.found += self._missing()

    def _missing(self) -> Iterator[str]:
        """The version of the run and its accepted updates must be on disk."""
        run, disk = self.coordinator.run, self.coordinator.disk
        if run.head and disk.read(f"version {run.head}") is None:
            yield f"version {run.head} is not on disk"
        accepted = [*run.updates.items(), *((one.peer, one.update) for one in run.buffer)]
        for peer, update in accepted:
            if update.digest and disk.read(f"update {peer} {update.digest}") is None:
                yield f"{peer}'s accepted update {update.digest} is not on disk"

    def _in_order(self) -> None:
        """The ledger only grows, and replaying it gives the state in memory."""
        past = [run_events.decode(body) for body in self.coordinator.ledger]
        if len(past) < self._seen:
            self.found.append("the ledger has lost an entry")
        self._seen = len(past)
        replayed = transitions.replay(RUN, past)
        if self.coordinator.applied == len(past) and replayed != self.coordinator.run:
            self.found.append("a replay of the ledger gives another run")

    def _calm_down(self) -> None:
        self.network.calm = True
        self.network.cut.clear()
        for agent in self.agents.values():
            agent.skew_s = 0.0
            agent.lift_pauses()
        for turn in range(_CALM_STEPS):
            if self.coordinator.run.ended:
                break
            self.now += 0.2
            self.coordinator.now = self.now
            self.coordinator.step()
            for agent in self.agents.values():
                agent.step(self.now)
            self.network.deliver(self.now)
            if turn % 50 == 49:  # heartbeats time out, slow polls run
                for agent in self.agents.values():
                    self.coordinator.missed_heartbeat(agent)
        else:
            waits = decisions.decide(self.coordinator.run, self.coordinator.view())
            raise checker.Violation(f"in calm the run does not end: {waits}")
        for _ in range(40):  # messages in transit arrive
            self.coordinator.step()
            for agent in self.agents.values():
                agent.step(self.now)
            self.network.deliver(self.now)

    def _judged(self) -> Iterator[str]:
        self._in_order()
        told: list[dict[str, Any]] = [msgspec.json.decode(b) for b in self.coordinator.ledger]
        claims = [msgspec.json.decode(c) for a in self.agents.values() for c in a.acknowledged]
        yield from checker.told({RUN: told}, claims)
        yield from self._missing()
        for agent in self.agents.values():
            for work, times in agent.trained.items():
                if times > 1 + self.died[agent.peer] + agent.forgot[work]:
                    yield f"{agent.peer} trained {times} times for {work}"


def violations(seed: int, bug: str = "") -> list[str]:
    """The findings of one schedule; empty if all invariants hold."""
    return Schedule(seed, bug).play()


if __name__ == "__main__":
    seed, bug = int((sys.argv[1:] or ["1"])[0]), (sys.argv[2:] or [""])[0]
    again = Schedule(seed, bug)
    wrong = again.play()
    for body in again.coordinator.ledger:
        print(body.decode())
    print(f"seed {seed}: {wrong or 'all invariants hold'}")
