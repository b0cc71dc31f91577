"""What a peer refuses, step by step, whatever the coordinator sends."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from agent.home.secure_store import TurnKey
from protocols.errors import BadMessage, SecureRefused, UsageError
from protocols.messages.work import MAX_MESSAGE_BYTES
from protocols.privacy.secagg import cohort as cohort_module
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.cohort import Pins
from protocols.privacy.secagg.messages import (
    MAX_CARD_BYTES,
    MAX_COHORT,
    MAX_PLAN_BYTES,
    MAX_TENSORS,
    SIGNED_CARD,
    AgreeRequest,
    Card,
    MaskRequest,
    ShareAnswer,
    ShareRequest,
    SignedCard,
    UnmaskRequest,
    encode,
)
from tests.support.secure_cohort import Machine, me, plan, share_request


class Fleet:
    """Machines that pinned each other, and one that the coordinator has invented."""

    def __init__(self, size: int = 4, minimum: int = 3) -> None:
        rnd = random.Random(7)
        pins = Pins(frozenset(me(number).peer for number in range(size)), minimum)
        self.machines = [Machine(number, pins, rnd) for number in range(size)]
        self.machines.sort(key=lambda machine: machine.peer)
        self.cards = [machine.card() for machine in self.machines]
        self.first = self.machines[0]

    def invented(self, count: int) -> list[SignedCard]:
        pins = Pins(frozenset())
        return [Machine(100 + n, pins, random.Random(n)).card() for n in range(count)]

    def fixed(self) -> Aggregator:
        return Aggregator(CohortFixed(request=share_request(self.cards, plan())))

    def shared(self) -> Aggregator:
        state = self.fixed()
        for machine in self.machines:
            state.take(machine.peer, machine.answer(state.cohort.request))
        state.apply(state.fix_sharers())
        return state

    def masked(self) -> Aggregator:
        state = self.shared()
        for machine in self.machines:
            asked = state.request_for(machine.peer)
            assert isinstance(asked, MaskRequest)
            state.take(machine.peer, machine.answer(asked))
        state.apply(state.fix_survivors())
        return state

    def signed(self) -> Aggregator:
        state = self.masked()
        for machine in self.machines:
            asked = state.request_for(machine.peer)
            assert isinstance(asked, AgreeRequest)
            state.take(machine.peer, machine.answer(asked))
        return state


def refused(machine: Machine, request: object, reason: str) -> str:
    """The refusal's text; the machine's disk is as it was."""
    before = dict(machine.store.turns)
    with pytest.raises(SecureRefused) as caught:
        machine.answer(request)  # type: ignore[arg-type]
    assert caught.value.reason == reason, caught.value.message
    assert machine.store.turns == before
    assert caught.value.hint
    return caught.value.message


def forged(card: SignedCard, **changes: object) -> SignedCard:
    """The card with other fields, signed by a key of the coordinator."""
    changed: Card = replace(SIGNED_CARD.decode(card.card), **changes)
    return SignedCard(*SIGNED_CARD.seal(changed, me(100).sign))


def replaced(cards: list[SignedCard], place: int, card: SignedCard) -> list[SignedCard]:
    return [*cards[:place], card, *cards[place + 1 :]]


# --- the cohort ------------------------------------------------------------------------------


@pytest.mark.attack("secure", by="coordinator")
def test_a_card_with_another_key_is_refused() -> None:
    """Attack: swap the keys in a peer's card, to read the shares that others seal for it."""
    fleet = Fleet()
    swapped = forged(fleet.cards[1], channel_key=bytes(range(32)))
    with pytest.raises(BadMessage, match="not signed by the peer that it names"):
        fleet.first.answer(share_request(replaced(fleet.cards, 1, swapped), plan()))
    own = forged(fleet.cards[1], public=me(100).public)
    with pytest.raises(BadMessage, match="contains the key of another peer"):
        fleet.first.answer(share_request(replaced(fleet.cards, 1, own), plan()))


@pytest.mark.attack("secure", by="coordinator")
def test_a_card_of_another_round_or_version_is_refused() -> None:
    """Attack: put a peer's card of an earlier round or of another version into a cohort."""
    fleet = Fleet()
    old = fleet.machines[1].turns
    assert old
    for card in (
        fleet.machines[1].card(TurnKey("run-1", 2, 0)),
        fleet.machines[1].card(TurnKey("run-2", 1, 0)),
        fleet.machines[2].card(TurnKey("run-1", 1, 5), "cd" * 32),
    ):
        with pytest.raises(BadMessage, match=r"another run, round, kind or version|two cards"):
            fleet.first.answer(share_request([*fleet.cards[:1], card, *fleet.cards[3:]], plan()))


@pytest.mark.attack("secure", by="coordinator")
def test_a_cohort_without_this_peers_own_card_is_refused() -> None:
    """Attack: give a peer a cohort with an older card of its own."""
    fleet = Fleet()
    newer = fleet.first.card(TurnKey("run-1", 1, 1))
    request = share_request(fleet.cards, plan())
    with pytest.raises(SecureRefused, match="does not have the card"):
        fleet.first.answer(request, TurnKey("run-1", 1, 1))
    assert newer not in fleet.cards
    refused(fleet.first, request, "over")


@pytest.mark.attack("secure", by="coordinator")
def test_two_cards_of_one_peer_or_one_key_are_refused() -> None:
    """Attack: name a peer twice in a cohort, or give two peers the same key."""
    fleet = Fleet()
    with pytest.raises(BadMessage, match="two cards in one cohort"):
        fleet.first.answer(share_request([*fleet.cards, fleet.cards[1]], plan()))
    twin = SIGNED_CARD.decode(fleet.cards[1].card).mask_key
    copied = replace(SIGNED_CARD.decode(fleet.invented(1)[0].card), mask_key=twin)
    cards = [*fleet.cards, SignedCard(*SIGNED_CARD.seal(copied, me(100).sign))]
    with pytest.raises(BadMessage, match="the same key"):
        fleet.first.answer(share_request(cards, plan()))


@pytest.mark.attack("secure", by="coordinator")
def test_invented_peers_do_not_count() -> None:
    """Attack: fill a cohort with invented peers, to have enough shares to unmask a peer."""
    fleet = Fleet(3)
    text = refused(
        fleet.first, share_request([*fleet.cards, *fleet.invented(3)], plan()), "invented peers"
    )
    assert "3 of the 6 peers" in text
    few = [fleet.cards[0], fleet.cards[1], *fleet.invented(1)]
    refused(fleet.first, share_request(few, plan()), "invented peers")


def test_one_invented_peer_of_seven_learns_nothing_and_is_tolerated() -> None:
    fleet = Fleet(6)
    request = share_request([*fleet.cards, *fleet.invented(1)], plan())
    assert isinstance(fleet.first.answer(request), ShareAnswer)


@pytest.mark.attack("secure", by="coordinator")
def test_a_cohort_that_is_too_small_is_refused() -> None:
    """Attack: shrink a cohort below what the owner wants, or to two."""
    fleet = Fleet(4, minimum=4)
    text = refused(fleet.first, share_request(fleet.cards[:3], plan()), "too few peers")
    assert "3 pinned peers" in text
    with pytest.raises(BadMessage, match="fewer than 3"):
        fleet.first.answer(share_request(fleet.cards[:2], plan()))


@pytest.mark.attack("secure", by="coordinator")
def test_a_plan_of_another_model_or_run_is_refused() -> None:
    """Attack: plan another model, or a ring too small for the weights."""
    fleet = Fleet()
    refused(fleet.first, share_request(fleet.cards, plan(sizes=(4, 4))), "plan")
    tight = share_request(fleet.cards, plan(16, max_weight=65_536))
    with pytest.raises(UsageError, match="bits for a value"):
        fleet.first.answer(tight)
    with pytest.raises(BadMessage, match="not a valid plan"):
        fleet.first.answer(ShareRequest(plan=b"\xc0", cards=tuple(fleet.cards)))


@pytest.mark.attack("secure", by="coordinator")
def test_a_card_serves_one_cohort() -> None:
    """Attack: form a second cohort with the same cards, as after a restored backup."""
    fleet = Fleet()
    first = share_request(fleet.cards, plan())
    answer = fleet.first.answer(first)
    for second in (
        share_request(fleet.cards[:3], plan()),
        share_request(fleet.cards, plan(max_weight=4)),
    ):
        refused(fleet.first, second, "second cohort")
    assert fleet.first.answer(first) == answer


# --- masks -----------------------------------------------------------------------------------


@pytest.mark.attack("secure", by="coordinator")
def test_a_peer_masks_once() -> None:
    """Attack: have a peer mask again, for other peers, or with another update."""
    fleet = Fleet()
    state = fleet.shared()
    asked = state.request_for(fleet.first.peer)
    assert isinstance(asked, MaskRequest)
    answer = fleet.first.answer(asked)
    fewer = tuple(peer for peer in asked.sharers if peer != fleet.machines[3].peer)
    shares = {peer: asked.shares[peer] for peer in fewer if peer != fleet.first.peer}
    other = replace(asked, sharers=fewer, shares=shares)
    refused(fleet.first, other, "second sharers")
    assert fleet.first.answer(asked) == answer
    fleet.first.change[0] += 1
    refused(fleet.first, asked, "second update")


@pytest.mark.attack("secure", by="coordinator")
def test_shares_that_were_not_sealed_for_this_peer_are_refused() -> None:
    """Attack: give a peer a share sealed for another peer, one of another cohort, or none."""
    fleet = Fleet()
    asked = fleet.shared().request_for(fleet.first.peer)
    assert isinstance(asked, MaskRequest)
    one, other = sorted(asked.shares)[:2]
    mixed = {**asked.shares, one: asked.shares[other]}
    with pytest.raises(BadMessage, match="was not sealed for this peer"):
        fleet.first.answer(replace(asked, shares=mixed))
    missing = {peer: sealed for peer, sealed in asked.shares.items() if peer != one}
    refused(fleet.first, replace(asked, shares=missing), "sharers")
    refused(fleet.first, replace(asked, cohort=bytes(32)), "second cohort")


@pytest.mark.attack("secure", by="coordinator")
def test_sharers_that_hide_too_little_are_refused() -> None:
    """Attack: name too few sharers, leave out this peer, repeat one, or add a stranger."""
    fleet = Fleet(5)
    asked = fleet.shared().request_for(fleet.first.peer)
    assert isinstance(asked, MaskRequest)
    everyone = asked.sharers
    for wrong in (
        everyone[:3],
        everyone[1:],
        (*everyone, everyone[-1]),
        (*everyone, "a-stranger"),
        tuple(reversed(everyone)),
    ):
        refused(fleet.first, replace(asked, sharers=wrong), "sharers")


# --- survivors and shares --------------------------------------------------------------------


@pytest.mark.attack("secure", by="coordinator")
def test_a_peer_signs_one_set_of_survivors() -> None:
    """Attack: ask a peer to sign two sets of survivors, to learn their difference."""
    fleet = Fleet(5)
    state = fleet.masked()
    asked = AgreeRequest(cohort=state.cohort.id, survivors=state.survivors)
    answer = fleet.first.answer(asked)
    fewer = replace(asked, survivors=state.survivors[:4])
    refused(fleet.first, fewer, "second survivors")
    assert fleet.first.answer(asked) == answer


@pytest.mark.attack("secure", by="coordinator")
def test_survivors_that_hide_too_little_are_refused() -> None:
    """Attack: shrink the survivors, leave this peer out, or add one that has not shared."""
    fleet = Fleet(5)
    state = fleet.masked()
    everyone = state.survivors
    for wrong in (everyone[:3], everyone[1:], (*everyone, "a-stranger"), everyone[::-1]):
        refused(fleet.first, AgreeRequest(cohort=state.cohort.id, survivors=wrong), "survivors")


@pytest.mark.attack("secure", by="coordinator")
def test_split_survivors_get_no_share() -> None:
    """Attack: tell half of the peers that one has dropped out, and the others that it has not."""
    fleet = Fleet(6)
    state = fleet.masked()
    everyone, without = state.survivors, state.survivors[:5]
    signatures: dict[tuple[str, ...], dict[str, bytes]] = {everyone: {}, without: {}}
    for place, machine in enumerate(fleet.machines):
        told = without if place < 3 else everyone
        asked = AgreeRequest(cohort=state.cohort.id, survivors=told)
        signatures[told][machine.peer] = machine.answer(asked).signature  # type: ignore[union-attr]
    for some in (*signatures.values(), {**signatures[everyone], **signatures[without]}):
        request = UnmaskRequest(cohort=state.cohort.id, signatures=some)
        for machine in fleet.machines:
            assert "4 are needed" in refused(machine, request, "too few signatures")


@pytest.mark.attack("secure", by="coordinator")
def test_a_share_is_told_after_the_signatures_and_of_one_kind() -> None:
    """Attack: ask for shares at once, with forged signatures, or of another cohort."""
    fleet = Fleet()
    state = fleet.masked()
    refused(fleet.first, UnmaskRequest(cohort=state.cohort.id, signatures={}), "order")
    fleet.first.answer(AgreeRequest(cohort=state.cohort.id, survivors=state.survivors))
    message = state.cohort.agreement(state.sharers, state.survivors)
    lies = dict.fromkeys(state.survivors, me(100).sign(message))
    refused(
        fleet.first, UnmaskRequest(cohort=state.cohort.id, signatures=lies), "too few signatures"
    )
    fleet = Fleet()
    state = fleet.signed()
    asked = state.request_for(fleet.first.peer)
    assert isinstance(asked, UnmaskRequest)
    answer = fleet.first.answer(asked)
    assert not answer.keys  # type: ignore[union-attr]
    assert answer.seeds.keys() == set(state.survivors)  # type: ignore[union-attr]
    assert fleet.first.answer(asked) == answer
    refused(fleet.first, replace(asked, cohort=bytes(32)), "second cohort")


@pytest.mark.attack("secure", by="coordinator")
def test_survivors_that_masks_do_not_bind_to_this_peer_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Attack: cut a ring of neighbors into arcs by dropouts, to learn the sum of each arc."""
    monkeypatch.setattr(cohort_module, "neighbor_count", lambda peers: 4)
    fleet = Fleet(14, minimum=6)
    state = fleet.masked()
    place = {peer: i for i, peer in enumerate(state.cohort._ring)}
    ring = state.cohort._ring[place[fleet.first.peer] :] + state.cohort._ring
    # This peer with two on each side, then two gaps, and the others beyond them.
    gaps = {ring[3], ring[4], ring[10], ring[11]}
    survivors = tuple(sorted(set(state.survivors) - gaps))
    asked = AgreeRequest(cohort=state.cohort.id, survivors=survivors)
    assert "5 pinned peers are among the survivors" in refused(fleet.first, asked, "too few peers")
    bridged = tuple(sorted({*survivors, ring[3]}))
    fleet.first.answer(AgreeRequest(cohort=state.cohort.id, survivors=bridged))


def test_steps_out_of_order_are_refused() -> None:
    fleet, other = Fleet(), Fleet()
    state = other.signed()
    for request in (
        state.request_for(other.first.peer),
        AgreeRequest(cohort=state.cohort.id, survivors=state.survivors),
    ):
        refused(fleet.first, request, "order")
    machine = Machine(0, Pins(frozenset()), random.Random(1))
    refused(machine, state.cohort.request, "order")


def test_the_largest_cohort_fits_into_a_message() -> None:
    long = "x" * 64
    card = Card(
        fleet=long,
        run=long,
        round=2**40,
        turn=2**20,
        base="ab" * 32,
        peer=me(0).peer,
        public=me(0).public,
        examples=2**40,
        mask_key=bytes(range(32)),
        channel_key=bytes(range(32)),
        commitment=bytes(range(32)),
        nonce=bytes(range(32)),
    )
    signed = SignedCard(*SIGNED_CARD.seal(card, me(0).sign))
    sizes = (10**6,) * MAX_TENSORS
    limits = (0.123456789,) * MAX_TENSORS
    request = share_request([signed] * MAX_COHORT, plan(sizes=sizes, limits=limits))
    assert len(encode(request)) < MAX_MESSAGE_BYTES
    assert len(request.plan) < MAX_PLAN_BYTES
    assert len(signed.card) < MAX_CARD_BYTES
