"""Secure sums of whole cohorts have the digest of the plain sum of the same integers."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from msgspec.structs import replace

from protocols.errors import BadMessage, BadWeights, CohortLost, UsageError
from protocols.privacy.secagg import cohort as cohort_module
from protocols.privacy.secagg import ring
from protocols.privacy.secagg.aggregator import (
    Aggregator,
    CohortFixed,
    SharersFixed,
    SurvivorsFixed,
)
from protocols.privacy.secagg.cohort import Cohort, Pins
from protocols.privacy.secagg.messages import AgreeAnswer, UnmaskAnswer
from protocols.privacy.secagg.recovery import recover
from tests.support.randomness import chi_squared_p
from tests.support.secure_cohort import (
    Machine,
    masked_uploads,
    me,
    plan,
    run_cohort,
    share_request,
)


@pytest.mark.parametrize("neighbors", [2, 4, 11])
def test_peers_are_together_if_a_chain_of_neighbors_connects_them(
    monkeypatch: pytest.MonkeyPatch, neighbors: int
) -> None:
    monkeypatch.setattr(cohort_module, "neighbor_count", lambda peers: neighbors)
    rnd = random.Random(neighbors)
    machines = [Machine(number, Pins(frozenset()), rnd) for number in range(12)]
    cohort = Cohort(share_request([machine.card() for machine in machines], plan()))
    for peer in cohort.peers:
        assert len(cohort.group(peer)) == neighbors + 1
        assert all(peer in cohort.group(other) for other in cohort.group(peer))
    for _ in range(300):
        among = rnd.sample(cohort.peers, rnd.randrange(13))
        peer = rnd.choice(cohort.peers)
        found = {peer}
        while more := {b for a in found for b in cohort.group(a) if b in among} - found:
            found |= more
        assert cohort.together(peer, among) == found


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize(
    ("size", "lost"),
    [
        (3, (0, 0, 0, 0)),
        (3, (0, 1, 0, 0)),
        (3, (0, 0, 1, 0)),
        (3, (0, 0, 0, 1)),
        (8, (1, 1, 0, 0)),
        (8, (0, 1, 0, 1)),
        (8, (0, 0, 1, 1)),
    ],
)
def test_a_secure_sum_is_the_plain_sum(
    size: int, lost: tuple[int, int, int, int], bits: int
) -> None:
    secure, plain, state = run_cohort(size, lost, bits=bits)
    assert len(state.survivors) == size - lost[0] - lost[1]
    assert secure.digest == plain.digest
    assert np.allclose(secure.metrics, plain.metrics, atol=1e-4)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("size", "lost", "bits"),
    [
        (64, (4, 4, 4, 4), 32),
        (64, (16, 0, 0, 0), 32),
        (64, (0, 16, 0, 0), 32),
        (64, (0, 0, 0, 16), 32),
        (64, (4, 4, 4, 4), 16),
        (65, (5, 5, 5, 5), 32),
        (256, (7, 6, 6, 6), 32),
        (256, (0, 25, 0, 0), 32),
    ],
)
def test_a_large_secure_sum_is_the_plain_sum(
    size: int, lost: tuple[int, int, int, int], bits: int
) -> None:
    secure, plain, state = run_cohort(size, lost, bits=bits, max_weight=2 if bits == 16 else 16)
    assert len(state.survivors) == size - lost[0] - lost[1]
    assert secure.digest == plain.digest
    assert np.allclose(secure.metrics, plain.metrics, atol=1e-3)


def test_one_dropout_too_many_loses_the_cohort_and_no_share_is_told() -> None:
    with pytest.raises(CohortLost, match="5 of 8 masked updates"):
        run_cohort(8, (0, 3, 0, 0))
    with pytest.raises(CohortLost, match="5 of 8 peers have shared"):
        run_cohort(8, (3, 0, 0, 0))


def test_too_few_bits_are_refused_before_anything_is_shared() -> None:
    with pytest.raises(UsageError, match="leaves 1 bits"):
        run_cohort(8, bits=16, max_weight=65_536)


@pytest.mark.parametrize("bits", [16, 32])
def test_uploads_look_random(bits: int) -> None:
    """Pearson's chi-squared test over the bytes of every upload: p > 1e-6."""
    for array, tail in masked_uploads(3, (100_000,), bits):
        for data in (array, tail):
            assert chi_squared_p(data) > 1e-6


def test_the_test_of_randomness_sees_an_update_without_masks() -> None:
    plain = np.random.default_rng(0).normal(0, 1000, 100_000).astype(np.int32)
    assert chi_squared_p(plain) < 1e-100


def test_a_false_share_is_noticed_and_does_no_harm() -> None:
    _, _, state = run_cohort(8, seed=5)
    expected = recover(state)
    assert not expected.false_shares
    liar = state.cohort.peers[2]
    _lie(state, liar)
    found = recover(state)
    assert found.false_shares == {(owner, liar) for owner in state.survivors}
    assert Counter(found.minus) == Counter(expected.minus)


def test_more_false_shares_lose_the_cohort() -> None:
    _, _, state = run_cohort(8, seed=5)
    for liar in state.cohort.peers[:3]:
        _lie(state, liar)
    with pytest.raises(CohortLost, match="are inconsistent"):
        recover(state)


def _lie(state: Aggregator, liar: str) -> None:
    told = state.told[liar]
    seeds = {peer: share[:-1] + bytes([share[-1] ^ 1]) for peer, share in told.seeds.items()}
    state.told[liar] = UnmaskAnswer(cohort=told.cohort, seeds=seeds, keys=told.keys)


def test_a_wrong_recovery_is_outside_of_what_weights_allow() -> None:
    """A sum that is still masked is a uniform vector, which the check of the sum refuses."""
    _, _, state = run_cohort(3, sizes=(4096,), bits=16)
    noise = np.random.default_rng(0).integers(0, 2**16, 4096, np.uint16)
    with pytest.raises(BadWeights, match="outside"):
        ring.check_sum(noise, state.cohort.bits, 2)


def test_answers_of_strangers_and_other_cohorts_are_refused() -> None:
    _, _, state = run_cohort(3)
    _, _, other = run_cohort(4)
    fresh = Aggregator(CohortFixed(request=state.cohort.request))
    answer = next(iter(other.shares.values()))
    with pytest.raises(BadMessage, match="another cohort"):
        fresh.take(fresh.cohort.peers[0], answer)
    mine = state.shares[state.cohort.peers[0]]
    with pytest.raises(BadMessage, match="another cohort"):
        fresh.take(me(77).peer, mine)
    with pytest.raises(BadMessage, match="one sealed share for each neighbor"):
        fresh.take(fresh.cohort.peers[1], mine)


def test_after_a_restart_peers_sign_again_although_they_have_told() -> None:
    """Others need the signature of a peer that has sent its shares."""
    _, _, state = run_cohort(3)
    restarted = Aggregator(CohortFixed(request=state.cohort.request))
    for event in (state.fix_sharers(), state.fix_survivors()):
        restarted.apply(event)
    first = state.cohort.peers[0]
    restarted.take(first, state.told[first])
    asked = restarted.request_for(first)
    assert type(asked).__name__ == "AgreeRequest"


def test_a_signature_over_other_survivors_or_another_cohort_is_refused() -> None:
    _, _, state = run_cohort(4)
    _, _, other = run_cohort(4, seed=1)
    assert other.survivors == state.survivors
    fresh = Aggregator(CohortFixed(request=state.cohort.request))
    for event in (state.fix_sharers(), state.fix_survivors()):
        fresh.apply(event)
    peer, cohort = state.cohort.peers[0], state.cohort
    own = next(me(number) for number in range(4) if me(number).peer == peer)
    for message in (
        cohort.agreement(state.sharers, state.survivors[:3]),
        cohort.agreement(state.sharers[:3], state.survivors),
        other.cohort.agreement(state.sharers, state.survivors),
    ):
        answer = AgreeAnswer(cohort=cohort.id, signature=own.sign(message))
        with pytest.raises(BadMessage, match="another set of survivors"):
            fresh.take(peer, answer)
    right = own.sign(cohort.agreement(state.sharers, state.survivors))
    fresh.take(peer, AgreeAnswer(cohort=cohort.id, signature=right))
    assert fresh.signatures == {peer: right}


def test_an_answer_without_one_share_of_each_neighbor_is_refused() -> None:
    _, _, state = run_cohort(4, (0, 1, 0, 0))
    fresh = Aggregator(CohortFixed(request=state.cohort.request))
    fresh.apply(SharersFixed(sharers=state.sharers))
    fresh.apply(SurvivorsFixed(survivors=state.survivors))
    peer = state.survivors[0]
    answer = state.told[peer]
    lost = next(iter(answer.keys))
    for wrong in (
        replace(answer, seeds=dict(list(answer.seeds.items())[1:])),
        replace(answer, keys={}),
        replace(answer, keys={}, seeds={**answer.seeds, lost: answer.keys[lost]}),
    ):
        with pytest.raises(BadMessage, match="one share of each neighbor"):
            fresh.take(peer, wrong)
    with pytest.raises(BadMessage, match="not among the survivors"):
        fresh.take(lost, answer)
    fresh.take(peer, answer)
    assert fresh.told == {peer: answer}
