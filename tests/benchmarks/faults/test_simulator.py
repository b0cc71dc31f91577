"""The simulator: no schedule breaks an invariant, and each planted bug is found by one.

A seed that fails is in the message; `python -m benchmarks.faults.simulator SEED` plays it again.
"""

from __future__ import annotations

import json
import os
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from benchmarks.faults.schedules import first_seed
from benchmarks.faults.simulator import BUGS, PEERS, Schedule, violations

SCHEDULES = 400


def test_no_schedule_breaks_an_invariant() -> None:
    first = int.from_bytes(os.urandom(4), "big")  # others each time: the message has the seed
    for seed in (*range(SCHEDULES // 2), *range(first, first + SCHEDULES // 2)):
        assert violations(seed) == [], f"seed {seed}"


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found(bug: str) -> None:
    seed = first_seed(bug, range(2000))
    assert seed is not None
    assert violations(seed) == []


def test_a_seed_is_the_whole_of_its_schedule() -> None:
    one, two = Schedule(11), Schedule(11)
    assert one.play() == two.play()
    assert one.coordinator.ledger == two.coordinator.ledger


def test_peers_meet_before_round_1_and_misfits_are_told() -> None:
    said: set[tuple[str, str]] = set()
    for seed in range(1, 60, 4):
        schedule = Schedule(seed)
        assert schedule.play() == [], f"seed {seed}"
        found = [json.loads(body) for body in schedule.coordinator.ledger]
        said |= {(fact["type"], fact.get("kind", "")) for fact in found}
    assert said >= {
        ("PeerDescribed", ""),
        ("PreprocessingFixed", ""),
        ("SchemaAgreed", ""),
        ("UpdateRefused", "describe"),
    }


class Machine(RuleBasedStateMachine):
    """The same fleet, but hypothesis chooses who is next, and shrinks what it finds."""

    @initialize(seed=st.integers(0, 2**32))
    def begin(self, seed: int) -> None:
        self.fleet = Schedule(seed)
        self.random = Random(seed)

    @rule(count=st.integers(1, 30))
    def coordinator_works(self, count: int) -> None:
        for _ in range(count):
            self._passes(0.2)
            self.fleet.coordinator.step()

    @rule(peer=st.sampled_from(PEERS), count=st.integers(1, 15))
    def agent_works(self, peer: str, count: int) -> None:
        for _ in range(count):
            self._passes(0.2)
            self.fleet.agents[peer].step(self.fleet.now)

    @rule(count=st.integers(1, 5))
    def something_arrives(self, count: int) -> None:
        for _ in range(count):
            self.fleet.network.deliver(self.fleet.now)

    @rule(power=st.booleans())
    def coordinator_dies(self, power: bool) -> None:
        self.fleet.coordinator_dies(power=power)

    @rule(peer=st.sampled_from(PEERS), power=st.booleans())
    def agent_dies(self, peer: str, power: bool) -> None:
        self.fleet.agent_dies(self.fleet.agents[peer], power=power)

    @rule(peer=st.sampled_from(PEERS))
    def owner_pauses_or_resumes(self, peer: str) -> None:
        self.fleet.agents[peer].toggle_pause()

    @rule(peer=st.sampled_from(PEERS))
    def link_is_cut_or_healed(self, peer: str) -> None:
        self.fleet.network.cut[peer] = not self.fleet.network.cut[peer]

    @rule(peer=st.sampled_from(PEERS))
    def heartbeat_runs_out(self, peer: str) -> None:
        self.fleet.coordinator.expire(peer)

    @rule(peer=st.sampled_from(PEERS), skew_s=st.sampled_from((0.0, 3600.0, -3600.0)))
    def clock_jumps(self, peer: str, skew_s: float) -> None:
        self.fleet.agents[peer].skew_s = skew_s

    @rule()
    def deadline_passes(self) -> None:
        self._passes(60.0)

    def _passes(self, seconds: float) -> None:
        self.fleet.now += seconds
        self.fleet.coordinator.now = self.fleet.now

    def teardown(self) -> None:
        if hasattr(self, "fleet"):
            assert self.fleet.end() == []


TestSimulator = Machine.TestCase
TestSimulator.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
