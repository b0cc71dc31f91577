"""A coordinator that lies to a peer in a secure run: no share leaves, and the owner is told why.

The peers are real ClientApps with their turns on disk. The last ones in a room are invented by the
coordinator, which has their keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from agent.home import audit_log
from protocols.errors import BadMessage, CommonweightError, NotAllowed, SecureRefused
from protocols.messages.refusals import refusal_of
from protocols.privacy.secagg import messages
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.messages import (
    SIGNED_CARD,
    AgreeAnswer,
    AgreeRequest,
    MaskRequest,
    Request,
    ShareRequest,
    SignedCard,
    UnmaskRequest,
    encode,
)
from tests.support.secure_cohort import me, signing_key
from tests.support.secure_desks import STEP_OF, TASK, Desk, Room, message

pytestmark = pytest.mark.attack("secure", by="coordinator")


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def shared(room: Room) -> Aggregator:
    """A sum in which all have shared their keys."""
    state = room.play(Aggregator(CohortFixed(request=room.cards())))
    state.apply(state.fix_sharers())
    return state


def masked(room: Room) -> Aggregator:
    """A sum in which all have sent their masked updates."""
    state = room.play(shared(room))
    state.apply(state.fix_survivors())
    return state


def asked(state: Aggregator, desk: Desk) -> Any:
    request = state.request_for(desk.peer)
    assert request is not None
    return request


@contextmanager
def refused(desk: Desk, error: type[CommonweightError], text: str) -> Iterator[None]:
    """What follows is refused: nothing leaves, nothing is in the audit, and the reason is told."""
    before, entries = list(desk.left), audit_log.read(desk.home)
    with pytest.raises(error, match=text) as caught:
        yield
    assert desk.left == before
    assert audit_log.read(desk.home) == entries
    if error is SecureRefused:
        told = refusal_of(caught.value)
        assert caught.value.message in told.text
        assert caught.value.hint


def forged(card: SignedCard, **changed: Any) -> SignedCard:
    """A card with other fields, signed by a key of the coordinator."""
    return SignedCard(
        *SIGNED_CARD.seal(replace(SIGNED_CARD.decode(card.card), **changed), me(50).sign)
    )


# --- cards -----------------------------------------------------------------------------------


def test_a_swapped_card_gets_no_share(room: Room) -> None:
    """Attack: put keys of its own into a peer's card, to read what others seal for it."""
    request = room.cards()
    first, second, third = request.cards
    own = me(50)
    for swapped in (
        forged(second, mask_key=b"k" * 32, channel_key=b"c" * 32),
        forged(second, public=own.public),
        forged(second, channel_key=SIGNED_CARD.decode(third.card).channel_key),
    ):
        with refused(room.first, BadMessage, "card"):
            room.step(room.first, replace(request, cards=(first, swapped, third)))
    room.step(room.first, request)


def test_a_peer_is_in_no_cohort_with_another_card_of_its_own(room: Room) -> None:
    """Attack: give a peer a cohort with the card that it made for an earlier turn."""
    old, new = room.cards(), room.cards(turn=1)
    mixed = ShareRequest(plan=new.plan, cards=(old.cards[0], *new.cards[1:]))
    with refused(room.first, SecureRefused, "does not have the card that this peer made"):
        room.step(room.first, mixed, turn=1)
    with refused(room.first, SecureRefused, "or a newer one"):
        room.step(room.first, old)
    with refused(room.first, SecureRefused, "is over for this peer"):
        room.first.ask(room.work("train"))


def test_a_second_cohort_after_a_restore_is_refused(room: Room) -> None:
    """Attack: restore the coordinator, and put the same cards into a smaller or another cohort."""
    room.add()
    request = room.cards()
    room.step(room.first, request)
    room.first.made_again()
    for other in (
        replace(request, cards=request.cards[:3]),
        replace(request, plan=encode(room.plan(max_weight=1))),
    ):
        with refused(room.first, SecureRefused, "already part of another cohort"):
            room.step(room.first, other)
    room.step(room.first, request)
    room.sum(turn=1)


# --- who takes part --------------------------------------------------------------------------


def test_a_shrunk_cohort_hides_nobody(room: Room) -> None:
    """Attack: make a cohort of fewer peers than the owner requires, of sharers or survivors, too.

    Six peers are there; the owner requires five.
    """
    for _ in range(3):
        room.add()
    room.trust_all(secure_min=5)
    request = room.cards()
    few = replace(request, cards=request.cards[:4])
    with refused(room.first, SecureRefused, "4 pinned peers are among the peers"):
        room.step(room.first, few)
    state = room.play(Aggregator(CohortFixed(request=request)))
    state.apply(state.fix_sharers())
    whole: MaskRequest = asked(state, room.first)
    rest = tuple(sorted(list(room.desks)[:4]))
    fewer = replace(
        whole, sharers=rest, shares={p: s for p, s in whole.shares.items() if p in rest}
    )
    with refused(room.first, SecureRefused, "4 pinned peers are among the sharers"):
        room.step(room.first, fewer)
    room.play(state)
    with refused(room.first, SecureRefused, "4 pinned peers are among the survivors"):
        room.step(room.first, AgreeRequest(cohort=state.cohort.id, survivors=rest))


def test_invented_peers_do_not_count(room: Room) -> None:
    """Attack: fill a cohort with peers that the coordinator has invented."""
    for _ in range(2):
        room.add()
    known, invented = list(room.desks)[:3], list(room.desks)[3:]
    room.trust_all(only=known)
    request = room.cards()
    by_peer = {SIGNED_CARD.decode(one.card).peer: one for one in request.cards}
    two_known = [*known[:2], *invented]
    with refused(room.first, SecureRefused, "are not pinned here"):
        room.step(room.first, replace(request, cards=tuple(by_peer[one] for one in two_known)))
    room.trust_all(only=known, secure_min=4)
    with refused(room.first, SecureRefused, "3 pinned peers are among the peers"):
        room.step(room.first, request)
    room.trust_all(only=known, secure_min=3)
    room.step(room.first, request)  # fewer than could unmask a peer


def test_an_owner_who_withdraws_trust_is_heeded_at_the_next_step(room: Room) -> None:
    """Control: an owner learns during a sum that a peer is not the one that it seemed to be."""
    state = shared(room)
    room.first.owner = replace(room.first.owner, trust={})
    with refused(room.first, SecureRefused, "not pinned here"):
        room.step(room.first, asked(state, room.first))


def test_without_consent_no_step_is_answered(room: Room) -> None:
    """Control: the owner forbids the task while a sum is unmasked."""
    state = masked(room)
    room.first.owner = replace(room.first.owner, forbidden_tasks=(TASK,))
    with refused(room.first, NotAllowed, "forbids the task"):
        room.step(room.first, asked(state, room.first))


def test_an_update_of_columns_that_were_taken_back_is_not_masked(room: Room) -> None:
    """Attack: have a peer mask what it trained before its owner took columns back."""
    state = shared(room)
    room.first.owner = replace(room.first.owner, data_columns=("age",))
    with refused(room.first, CommonweightError, "changed the columns"):
        room.step(room.first, asked(state, room.first))


# --- survivors -------------------------------------------------------------------------------


def test_two_sets_of_survivors_are_not_signed(tmp_path: Path) -> None:
    """Attack: tell peers different survivors, to learn both kinds of shares of one peer."""
    room = Room(tmp_path, peers=4)
    state = masked(room)
    everyone = state.survivors
    without_last = tuple(one for one in everyone if one != list(room.desks)[3])
    cohort = state.cohort.id
    signatures: dict[str, bytes] = {}
    for desk in list(room.desks.values())[:3]:
        answer = room.step(desk, AgreeRequest(cohort=cohort, survivors=everyone))
        assert isinstance(answer, AgreeAnswer)
        signatures[desk.peer] = answer.signature
        desk.made_again()
        with refused(desk, SecureRefused, "already signed another set of survivors"):
            room.step(desk, AgreeRequest(cohort=cohort, survivors=without_last))
    last = room.desks[list(room.desks)[3]]
    with refused(last, SecureRefused, "shares were requested before"):
        room.step(last, UnmaskRequest(cohort=cohort, signatures=signatures))
    split = replace(state.cohort.request, plan=encode(room.plan(max_weight=2)))
    other = Aggregator(CohortFixed(request=split)).cohort
    forged_set = {
        one: me(number).sign(other.agreement(everyone, without_last))
        for number, one in enumerate(room.desks)
    }
    with refused(room.first, SecureRefused, "1 of this peer's neighbors have signed"):
        room.step(room.first, UnmaskRequest(cohort=cohort, signatures=forged_set))
    told = room.step(room.first, UnmaskRequest(cohort=cohort, signatures=signatures))
    assert set(told.seeds) == set(everyone)  # type: ignore[union-attr]
    assert told.keys == {}  # type: ignore[union-attr]


def test_shares_are_not_told_before_the_update_is_masked(room: Room) -> None:
    """Attack: leave out a step, or ask for steps in another order."""
    cohort = Aggregator(CohortFixed(request=room.cards())).cohort
    agree = AgreeRequest(cohort=cohort.id, survivors=cohort.peers)
    unmask = UnmaskRequest(cohort=cohort.id, signatures={})
    for step in (agree, unmask):
        with refused(room.first, SecureRefused, "has not joined|was not"):
            room.step(room.first, step)
    state = room.play(Aggregator(CohortFixed(request=cohort.request)))
    state.apply(state.fix_sharers())
    for step in (agree, unmask):
        with refused(room.first, SecureRefused, "before this peer"):
            room.step(room.first, step)


# --- messages --------------------------------------------------------------------------------


def test_a_plain_update_does_not_leave_an_owner_of_secure_runs(room: Room) -> None:
    """Attack: ask for the same round in plain, after the card."""
    room.trust_all(secure_min=3)
    room.cards()
    for kind in ("train", "evaluate", "describe"):
        with refused(room.first, NotAllowed, "secure runs alone"):
            room.first.ask(room.work(kind, codec="fp32"))
    assert room.first.trainer.did == ["train"]


def test_a_step_of_another_run_round_or_version_is_refused(room: Room) -> None:
    """Attack: ask for the step of a sum under the name of another run, round, turn or version."""
    request = room.cards()
    for changed in ({"round": 2}, {"turn": 1}, {"base": "cd" * 32}):
        work = room.work("share", **changed)
        with refused(room.first, SecureRefused, "has made no card for this step"):
            room.first.ask(work, encode(request))
    for plan in (
        room.plan(run="another"), room.plan(round=2), room.plan(fleet="another"),
        room.plan("evaluate"), room.plan(base="cd" * 32),
    ):  # fmt: skip
        with refused(room.first, BadMessage, "is of another run, round, kind or version"):
            room.step(room.first, replace(request, plan=encode(plan)))


def test_a_replayed_step_tells_nothing_new(room: Room) -> None:
    """Attack: replay every signed message of a sum, after it and after a restart of the peer."""
    sent: list[tuple[Any, Request]] = []
    state = Aggregator(CohortFixed(request=room.cards()))
    for decide in (state.fix_sharers, state.fix_survivors, None, None):
        request = asked(state, room.first)
        sent.append((room.work(STEP_OF[type(request)]), request))
        room.play(state)
        if decide:
            state.apply(decide())
    room.first.made_again()
    uploads, once = dict(room.first.uploads), set(room.first.left)
    for work, request in sent[:2]:
        with refused(room.first, SecureRefused, "has taken its last step in this sum"):
            room.first.ask(work, encode(request))
    for work, request in sent[2:]:  # also asked for by a coordinator that was killed
        _, answer = room.first.ask(work, encode(request))
        assert answer in once
    assert room.first.uploads == uploads
    stranger = message(sent[0][0], encode(sent[0][1]), key=signing_key(50))
    with refused(room.first, BadMessage, "signature|coordinator"):
        room.first.client.handle(stranger)


def test_a_step_without_masks_leaves_no_answer_without_an_entry(room: Room) -> None:
    """Attack: call a step one of a plain run, so that the owner's audit does not know its kind."""
    request = room.cards()
    with refused(room.first, BadMessage, "of a run that is not secure"):
        room.first.ask(room.work("share", codec="fp32"), encode(request))


def test_a_huge_or_malformed_request_is_refused(room: Room) -> None:
    """Attack: fill a peer's memory with a request, or have it read one that is none."""
    request = room.cards()
    plan = room.plan()
    huge: list[bytes] = [
        b"\x00" * (messages.MAX_PLAN_BYTES * 5),
        encode({"plan": b"", "cards": [request.cards[0]] * (messages.MAX_COHORT + 1)}),
        encode({"plan": b"p" * (messages.MAX_PLAN_BYTES + 1), "cards": []}),
        encode({"plan": encode(plan), "cards": "none"}),
        b"\xdd\xff\xff\xff\xff",
    ]
    for data in huge:
        with refused(room.first, BadMessage, "request"):
            room.first.ask(room.work("share"), data)
    many = replace(plan, sizes=(2**40,) * 3, limits=(1.0,) * 3)
    with refused(room.first, SecureRefused, "of another model"):
        room.step(room.first, replace(request, plan=encode(many)))
    unknown = msgspec.to_builtins(plan, builtin_types=(bytes,)) | {
        "limits": [0.0] * len(plan.limits)
    }
    with refused(room.first, BadMessage, "not a valid plan"):
        room.step(room.first, replace(request, plan=encode(unknown)))
    nothing = room.work("share", request="ab" * 32)
    with refused(room.first, BadMessage, "not the one that was signed"):
        room.first.ask(nothing, encode(request))


def test_a_plan_of_other_metrics_or_another_model_is_refused(room: Room) -> None:
    """Attack: have a peer send numbers that it has not promised, or parts of its model alone."""
    request, plan = room.cards(), room.plan()
    for other in (
        replace(plan, names=replace(plan.names, metrics=())),
        replace(plan, sizes=plan.sizes[:1], limits=plan.limits[:1]),
        replace(plan, sizes=(), limits=()),
    ):
        with refused(room.first, SecureRefused, "of another model|has other metrics"):
            room.step(room.first, replace(request, plan=encode(other)))
