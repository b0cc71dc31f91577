"""A coordinator that wants an update with less noise than its peers agreed to share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from agent.clientapp.privacy_budget import PrivacyBudget
from agent.home.privacy_ledger import PrivacyLedger
from agent.home.settings_schema import AgentSettings
from agent.tasks.work import Done
from protocols.errors import AwaitingTrust, BadMessage, NotAllowed, SecureRefused
from protocols.messages.work import Work
from protocols.privacy import events, private_training
from protocols.privacy.private_training import PrivateTraining
from protocols.privacy.secagg import messages, tails
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.messages import AgreeRequest, ShareRequest, encode
from protocols.privacy.shared_noise import SharedNoise
from tests.support.secure_desks import Desk, Room, Trainer

pytestmark = pytest.mark.attack("secure", by="coordinator")

#: The changes of `Trainer` are 0.05 in each weight, times up to 100 examples.
ASKED = PrivateTraining(3.0, 1e-5, 1.0, rounds=3, shared=5)
LR = 1.0


class NoisyTrainer(Trainer):
    """Says that it has added the noise that the work asks for."""

    def train(self, task: str, settings: Any, base: Path, out: Path) -> Done:
        asked = private_training.read(settings)
        assert asked is not None
        told = events.encode((asked.shared_event(LR),)).decode()
        return replace(super().train(task, settings, base, out), metrics={}, privacy=told)


def noisy_room(folder: Path, peers: int = 6) -> Room:
    room = Room(folder, peers)
    for desk in room.desks.values():
        desk.trainer.__class__ = NoisyTrainer
    return room


def train(room: Room, desk: Desk, asked: PrivateTraining = ASKED, **changed: Any) -> ReadyCard:
    work = room.work("train", settings=asked.settings(), **changed)
    return messages.decode_ready(desk.ask(work)[1]).card


ReadyCard = messages.SignedCard


def request_of(room: Room, cards: list[ReadyCard], **changed: Any) -> ShareRequest:
    noise, sizes = SharedNoise.of(ASKED.shared_event(LR)), room.plan().sizes
    examples = [20 * (desk.number + 1) for desk in room.desks.values()]
    divisor = sum(examples) / len(examples)
    plan = room.plan(
        names=tails.names({}, {}),
        max_weight=1,
        divisor=divisor,
        limits=(noise.largest(max(examples)) / divisor,) * len(sizes),
        clip=noise.longest(max(examples), sum(sizes)) / divisor,
    )
    return ShareRequest(plan=encode(replace(plan, **changed)), cards=tuple(cards))


def test_a_sum_with_fewer_peers_than_share_the_noise_is_not_signed(tmp_path: Path) -> None:
    """Attack: name fewer survivors than share the noise, so that the sum has too little of it."""
    room = noisy_room(tmp_path)
    state = Aggregator(
        CohortFixed(request=request_of(room, [train(room, desk) for desk in room.desks.values()]))
    )
    for decide in (state.fix_sharers, state.fix_survivors):
        room.play(state)
        state.apply(decide())
    few = tuple(sorted(room.desks)[:4])
    for peer in few:
        request = AgreeRequest(cohort=state.cohort.id, survivors=few)
        with pytest.raises(SecureRefused, match=r"4 pinned peers are among the survivors.*with 5"):
            room.step(room.desks[peer], request)
    room.play(state)
    room.play(state)
    assert state.can_recover()  # all six have signed the whole set


def test_peers_that_were_told_different_numbers_are_in_no_sum(tmp_path: Path) -> None:
    """Attack: tell one peer a lower number of peers that share the noise, or a higher one."""
    room = noisy_room(tmp_path)
    for turn, other in enumerate((4, 6)):
        cards = [
            train(room, desk, ASKED._replace(shared=5 if number else other), turn=turn)
            for number, desk in enumerate(room.desks.values())
        ]
        request = request_of(room, cards)
        for desk in room.desks.values():
            with pytest.raises(BadMessage, match="for work with different settings"):
                room.step(desk, request, turn)


def test_a_plan_without_the_noise_of_the_run_is_refused(tmp_path: Path) -> None:
    """Attack: have peers train with shared noise, and sum with weights and limits as without."""
    room = noisy_room(tmp_path)
    cards = [train(room, desk) for desk in room.desks.values()]
    for changed, words in (
        ({"divisor": 0.0}, "no divisor"),
        ({"max_weight": 4}, "the same weight"),
        ({"limits": (1e-6,) * len(room.plan().sizes)}, "elements with noise would be clipped"),
    ):
        request = request_of(room, cards, **changed)
        with pytest.raises(SecureRefused, match=words):
            room.step(max(room.desks.values(), key=lambda desk: desk.number), request)


def test_an_update_with_a_part_of_the_noise_leaves_in_no_plain_run(tmp_path: Path) -> None:
    """Attack: ask for shared noise in a run without masks, and get an update with little noise."""
    room = noisy_room(tmp_path)
    desk = room.first
    for codec in ("fp32", "int8", "shared:32"):
        with pytest.raises(NotAllowed, match="would leave with too little"):
            train(room, desk, codec=codec)
    assert desk.trainer.did == []
    assert desk.left == []


def test_noise_that_no_trusted_peers_share_is_refused_before_training(tmp_path: Path) -> None:
    """Attack: say that very many peers share the noise, so that each adds hardly any."""
    room = noisy_room(tmp_path)
    with pytest.raises(AwaitingTrust, match="enough with 500 peers, and the owner trusts 5"):
        train(room, room.first, ASKED._replace(shared=500))
    assert room.first.trainer.did == []


def test_a_limit_relies_on_other_machines_only_if_the_owner_says_so(tmp_path: Path) -> None:
    """Attack: have the noise of others count for an owner whose budget relies on its own alone."""
    chosen = AgentSettings(privacy_max_epsilon=5.0)
    budget = PrivacyBudget(tmp_path / "privacy.db", lambda: chosen)
    work = Work(run="r1", round=1, kind="train", task="mnist", settings=ASKED.settings())
    with pytest.raises(NotAllowed, match="relies on 4 others") as caught:
        budget.check(work)
    assert "policy set privacy.shared on" in caught.value.hint
    chosen = replace(chosen, privacy_shared="on")
    budget.check(work)
    told = events.encode((ASKED.shared_event(LR),)).decode()
    # A trainer that reports less noise of its own, or another number of peers, has not done it.
    for other in (ASKED._replace(shared=6).shared_event(LR), ASKED.event(1.0, 1)):
        with pytest.raises(NotAllowed, match="added no noise"):
            budget.charge(work, Done(digest="a", privacy=events.encode((other,)).decode()))
    for number in (1, 2, 3):
        budget.charge(replace(work, round=number), Done(digest=f"{number}", privacy=told))
    with pytest.raises(NotAllowed, match="may cost ε = 3"):
        budget.charge(replace(work, round=4), Done(digest="4", privacy=told))
    assert len(PrivacyLedger(tmp_path / "privacy.db").charges()) == 3
