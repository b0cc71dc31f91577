"""A coordinator that puts cards into sums for which they were not made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from protocols.errors import BadMessage, CommonweightError, SecureRefused
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.messages import SIGNED_CARD, ShareRequest, SignedCard
from tests.hostile.test_secure_coordinator import asked, refused
from tests.support.secure_cohort import me
from tests.support.secure_desks import Room

pytestmark = pytest.mark.attack("secure", by="coordinator")


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def test_a_run_of_the_same_name_gets_no_second_sum(room: Room) -> None:
    """Attack: delete a run, and start one of the same name: with its rounds, another version, other
    settings or other peers."""
    room.sum()
    room.sum("evaluate")
    room.first.made_again()
    for kind, changed in (
        ("train", {}),
        ("train", {"base": "cd" * 32}),
        ("train", {"settings": {"lr": 0.1}}),
    ):
        with refused(room.first, SecureRefused, "is over for this peer"):
            room.first.ask(room.work(kind, **changed))
    for changed in ({"base": "cd" * 32}, {"settings": {"lr": 0.1}}):
        with refused(room.first, SecureRefused, "the card of this turn is for other work"):
            room.first.ask(room.work("evaluate", **changed))
    again = room.cards("evaluate")
    for request in (again, replace(again, cards=again.cards[:2])):
        with refused(room.first, CommonweightError, "already part of|last step|fewer than"):
            room.step(room.first, request)
    assert room.first.trainer.did == ["train", "evaluate"]


def test_a_card_of_a_training_is_in_no_evaluation(room: Room) -> None:
    """Attack: sum the metrics of an evaluation with the cards of a training, or the reverse, and
    ask for the steps of both at once."""
    training = room.cards()
    state = Aggregator(CohortFixed(request=training))
    room.play(state)
    state.apply(state.fix_sharers())
    mask = asked(state, room.first)
    evaluation = room.cards("evaluate")
    for cards, plan in (
        (training.cards, evaluation.plan),
        (evaluation.cards, training.plan),
        ((*evaluation.cards[:2], training.cards[2]), evaluation.plan),
    ):
        with refused(room.first, BadMessage, "is of another run, round, kind or version"):
            room.step(room.first, ShareRequest(plan=plan, cards=cards))
    with refused(room.first, SecureRefused, "does not have the card that this peer made"):
        room.step(room.first, training)
    with refused(room.first, SecureRefused, "has not joined"):
        room.step(room.first, mask)
    assert not room.first.uploads
    room.step(room.first, evaluation)


def test_a_card_of_another_fleet_or_of_its_own_is_in_no_cohort(room: Room) -> None:
    """Attack: put cards of another fleet into a cohort, one card twice, or a copy of a peer's keys
    under the name of an invented peer."""
    request = room.cards()
    first, second, third = request.cards

    def signed(number: int, card: SignedCard, **changed: Any) -> SignedCard:
        made = replace(SIGNED_CARD.decode(card.card), **changed)
        return SignedCard(*SIGNED_CARD.seal(made, me(number).sign))

    invented = {"peer": me(50).peer, "public": me(50).public}
    for other, text in (
        (signed(1, second, fleet="another"), "is of another run"),
        (first, "has two cards"),
        (signed(50, first, **invented), "have the same key"),
        (signed(50, second, mask_key=SIGNED_CARD.decode(first.card).channel_key, **invented),
         "have the same key"),
        (signed(1, second, mask_key=bytes(32)), "invalid X25519 key"),
        (signed(1, second, terms="ab" * 32), "different settings"),
    ):  # fmt: skip
        with refused(room.first, BadMessage, text):
            room.step(room.first, replace(request, cards=(first, other, third)))
    room.step(room.first, request)
