"""Noise that the peers of a secure sum add together: its size, its cost, and who must be there."""

from __future__ import annotations

import json
import math
import random
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from msgspec.structs import replace

from agent.tasks.training.secret_noise import SecretNoise
from protocols.errors import SecureRefused
from protocols.privacy import accountant, events, gaussian
from protocols.privacy.events import Gaussian, SharedGaussian
from protocols.privacy.private_training import PrivateTraining, read
from protocols.privacy.secagg import ring
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.cohort import Pins
from protocols.privacy.secagg.messages import AgreeRequest, MaskRequest, Plan, UnmaskRequest
from protocols.privacy.shared_noise import SharedNoise
from tests.support.secure_cohort import (
    Machine,
    me,
    plan,
    run_cohort,
    secure_sum,
    share_request,
)

Floats = npt.NDArray[np.float64]
LR, CLIP = 2.0, 0.5
_REFERENCE = json.loads((Path(__file__).parents[1] / "reference.json").read_text())


class NoisyPeers:
    """Machines whose updates have their part of a noise that `m` of them share.

    `gradients`: the sum of the clipped gradients of each, without noise.
    """

    def __init__(
        self, size: int, m: int, sizes: tuple[int, ...] = (5, 3), *, seed: int = 1
    ) -> None:
        self.event = PrivateTraining(3.0, 1e-5, CLIP, 60, m).shared_event(LR)
        self.noise = SharedNoise.of(self.event)
        rnd, draw = random.Random(seed), np.random.default_rng(seed)
        pins = Pins(frozenset(me(number).peer for number in range(size)))
        self.machines: dict[str, Machine] = {}
        self.gradients: dict[str, Floats] = {}
        for number in range(size):
            one = Machine(number, pins, rnd, sizes, self.noise)
            whole = draw.normal(size=sum(sizes))
            whole *= 0.5 * one.examples * CLIP / np.linalg.norm(whole)
            noise = self.event.noise * CLIP / math.sqrt(m) * SecretNoise().normals(len(whole))
            one.change = (-LR * (whole + noise) / one.examples).astype(np.float32)
            self.machines[one.peer], self.gradients[one.peer] = one, whole
        examples = [one.examples for one in self.machines.values()]
        self.divisor, most = sum(examples) / size, max(examples)
        self.plan = plan(
            sizes=sizes,
            limits=(self.noise.largest(most) / self.divisor,) * len(sizes),
            clip=self.noise.longest(most, sum(sizes)) / self.divisor,
            max_weight=1,
            divisor=self.divisor,
        )

    def begin(self, of: Plan | None = None) -> Aggregator:
        cards = [machine.card() for machine in self.machines.values()]
        return Aggregator(CohortFixed(request=share_request(cards, of or self.plan)))

    def ask(self, state: Aggregator, peers: Collection[str]) -> None:
        for peer in peers:
            if (asked := state.request_for(peer)) is not None:
                state.take(peer, self.machines[peer].answer(asked))

    def sum_of(self, survivors: Collection[str]) -> Floats:
        """The sum of clipped gradients with noise, as the coordinator learns it."""
        state = self.begin()
        self.ask(state, self.machines)
        state.apply(state.fix_sharers())
        self.ask(state, survivors)
        state.apply(state.fix_survivors())
        for _ in range(2):
            self.ask(state, survivors)
        total = secure_sum(state, self.machines).total
        limit, most = self.plan.limits[0], ring.max_value(state.cohort.bits)
        return -total.astype(np.float64) * (limit / most) * self.divisor / LR


@pytest.mark.parametrize("lost", [6, 0])
def test_the_noise_of_the_sum_has_the_claimed_variance(
    lost: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With as few survivors as the noise is for, and with all of them: within 4 deviations.

    The key of the noise is the same each time, so that the test has one result.
    """
    monkeypatch.setattr(secrets, "token_bytes", random.Random(3).randbytes)
    size, m, count = 20, 14, 40_000
    peers = NoisyPeers(size, m, (30_000, 10_000))
    survivors = sorted(peers.machines)[lost:]
    noise = peers.sum_of(survivors) - sum(peers.gradients[peer] for peer in survivors)
    claim = len(survivors) / m * (peers.event.noise * CLIP) ** 2
    assert abs(noise.var() / claim - 1) < 4 * math.sqrt(2 / count)
    assert abs(noise.mean()) < 4 * math.sqrt(claim / count)
    # A tenth less noise, or one honest peer less, would be seen.
    assert abs(noise.var() / (claim * (m - 1) / m) - 1) > 4 * math.sqrt(2 / count)


def test_a_row_of_each_peer_moves_the_sum_alike() -> None:
    """Also of one with a hundred times as many rows, which rounded weights would not give."""
    peers = NoisyPeers(4, 3)
    moved = []
    for machine, examples in zip(peers.machines.values(), (1, 7, 100, 997), strict=True):
        bits = ring.value_bits(32, len(peers.machines))
        row = np.full(8, LR * CLIP / math.sqrt(8), np.float32)
        limit = peers.noise.largest(997) / peers.divisor / (examples / peers.divisor)
        quantizers = [ring.Quantizer(32, bits, 1, bytes(32)) for _ in range(2)]
        one, other = (
            quantizer.quantize(change, limit).view("<i4").astype(np.int64)
            for quantizer, change in zip(
                quantizers, (machine.change, machine.change + row / examples), strict=True
            )
        )
        step = peers.noise.largest(997) / ring.max_value(bits)
        moved.append(float(np.linalg.norm((other - one) * step)))
    assert moved == pytest.approx([peers.noise.row] * 4, rel=1e-3)


def test_epsilon_is_that_of_the_accountant() -> None:
    for epsilon, delta, rounds in ((1.0, 1e-5, 60), (3.0, 1e-6, 1), (8.0, 1e-5, 500)):
        asked = PrivateTraining(epsilon, delta, CLIP, rounds, 14)
        event = asked.shared_event(LR)
        assert read(asked.settings()) == asked
        mu = math.sqrt(rounds) / event.noise
        for found in (
            accountant.epsilon_of([event] * rounds, delta),
            accountant.epsilon_of([Gaussian(event.noise, rounds)], delta),
            gaussian.epsilon_of(mu, delta),
        ):
            assert found == pytest.approx(epsilon, abs=1e-3)
    (case,) = [
        c for c in _REFERENCE if c["events"] == [{"type": "Gaussian", "noise": 40.0, "count": 60}]
    ]
    shared = SharedGaussian(40.0, 14, count=60)
    assert events.decode(events.encode((shared,))) == (shared,)
    found = accountant.epsilon_of([shared], case["delta"])
    assert found == pytest.approx(case["epsilon"], abs=1e-3)  # dp-accounting's


def refused(machine: Machine, request: Any, reason: str) -> str:
    before = dict(machine.store.turns)
    with pytest.raises(SecureRefused) as caught:
        machine.answer(request)
    assert caught.value.reason == reason, caught.value.message
    assert machine.store.turns == before
    return caught.value.message


@pytest.mark.attack("secure", by="coordinator")
def test_fewer_peers_than_share_the_noise_are_not_unmasked() -> None:
    """Attack: shrink a sum, whose peers share the noise, at each step, until it has too little."""
    peers = NoisyPeers(7, 6)
    first, *others = sorted(peers.machines)
    machine, five = peers.machines[first], sorted([first, *others[:4]])
    state = peers.begin()
    cards = [peers.machines[peer].card() for peer in five]
    text = refused(machine, share_request(cards, peers.plan), "too little noise")
    assert "5 pinned peers are among the peers" in text
    assert "enough with 6" in text
    self_chosen = Pins(frozenset(five))  # the owner of this peer trusts fewer than the others do
    machine.turns._pins = lambda: self_chosen
    assert refused(machine, state.cohort.request, "too little noise")
    machine.turns._pins = peers.machines[others[0]].turns._pins
    peers.ask(state, peers.machines)
    state.apply(state.fix_sharers())
    asked = state.request_for(first)
    assert isinstance(asked, MaskRequest)
    shares = {peer: asked.shares[peer] for peer in five if peer != first}
    few = replace(asked, sharers=tuple(five), shares=shares)
    assert "among the sharers" in refused(machine, few, "too little noise")
    peers.ask(state, peers.machines)
    state.apply(state.fix_survivors())
    for peer in five:
        request = AgreeRequest(cohort=state.cohort.id, survivors=tuple(five))
        text = refused(peers.machines[peer], request, "too little noise")
        assert "among the survivors" in text
    six = AgreeRequest(cohort=state.cohort.id, survivors=tuple(sorted([first, *others[:5]])))
    assert machine.answer(six)
    machine.turns._pins = lambda: self_chosen  # the owner has taken trust back since
    refused(machine, UnmaskRequest(cohort=state.cohort.id, signatures={}), "too little noise")


@pytest.mark.attack("secure", by="coordinator")
def test_a_plan_that_spoils_the_noise_is_refused() -> None:
    """Attack: clip, scale down or round the updates after the noise, or weigh the peers' rows."""
    peers = NoisyPeers(5, 4)
    machine = max(peers.machines.values(), key=lambda one: one.examples)
    limits, clip = peers.plan.limits, peers.plan.clip
    for changed, words in (
        ({"limits": (limits[0], limits[1] * 0.99)}, "elements with noise would be clipped"),
        ({"clip": clip * 0.99}, "would be scaled down"),
        ({"limits": (limits[0], limits[1] * 1e6)}, "too coarse"),
        ({"divisor": peers.divisor * 1e6}, "too coarse"),
        ({"divisor": peers.divisor * 0.9}, "would be clipped"),
        ({"divisor": 0.0}, "no divisor"),
        ({"max_weight": 16}, "the same weight"),
    ):
        request = peers.begin(replace(peers.plan, **changed)).cohort.request
        assert words in refused(machine, request, "plan"), changed
    own = NoisyPeers(5, 4)
    for one in own.machines.values():
        one.noise = None
    assert "has none" in refused(
        next(iter(own.machines.values())), own.begin().cohort.request, "plan"
    )


def test_without_shared_noise_a_sum_is_as_before() -> None:
    secure, plain, state = run_cohort(5, (0, 1, 0, 0))
    assert secure.digest == plain.digest
    assert state.cohort.plan.divisor == 0
