"""A coordinator whose plan of a sum, or whose work, makes the update of one peer readable in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from msgspec.structs import replace

from agent.home.secure_store import TurnStore
from protocols.errors import BadMessage, DiskFull, NotAllowed, SecureRefused
from protocols.privacy.secagg import messages, ring, tails
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.messages import ShareRequest, encode
from tests.support.secure_desks import TASK, Room

pytestmark = pytest.mark.attack("secure", by="coordinator")

#: With these weights, a sum of numbers that are each -1, 0 or 1 has these as its digits.
_WEIGHTS = (1, 3, 9)


def digits(total: npt.NDArray[np.int64]) -> list[npt.NDArray[np.int64]]:
    """The three numbers that are each -1, 0 or 1, and whose sum with `_WEIGHTS` is `total`."""
    found = []
    for _ in _WEIGHTS:
        digit = (total + 1) % 3 - 1
        found.append(digit)
        total = (total - digit) // 3
    return found


def alike(one: Any, other: Any) -> float:
    """The correlation of two arrays; 0 if one is constant."""
    if not (np.std(one) and np.std(other)):
        return 0.0
    return abs(float(np.corrcoef(np.ravel(one), np.ravel(other))[0, 1]))


def test_the_weights_of_a_sum_do_not_tell_its_parts() -> None:
    """Attack: set limits that round each element to -1, 0 or 1, and take the sum apart by weights.

    Each part would be an unbiased estimate of the update of one peer.
    """
    draw = np.random.default_rng(1)
    changes = [draw.normal(size=40_000).astype(np.float32) for _ in _WEIGHTS]
    bits = ring.value_bits(32, sum(_WEIGHTS))
    total = np.zeros(40_000, np.int64)
    for number, (weight, change) in enumerate(zip(_WEIGHTS, changes, strict=True)):
        quantizer = ring.Quantizer(32, bits, weight, bytes([number]) * 32)
        total += quantizer.quantize(change, 3.0 * ring.max_value(bits)).view("<i4")
    assert alike(total, sum(w * c for w, c in zip(_WEIGHTS, changes, strict=True))) > 0.5
    # The sum itself is alike to the first one by 0.1, and to the second by 0.3.
    assert alike(digits(total)[0], changes[0]) < 0.05
    assert alike(digits(total)[1], changes[1]) < 0.3


def test_limits_that_clip_all_elements_do_not_tell_signs(tmp_path: Path) -> None:
    """Attack: set limits that clip each element, and read each peer's signs from the sum."""
    room = Room(tmp_path)
    changes = [desk.trainer.change["w"] for desk in room.desks.values()]
    limit = 1e-3
    cards = room.cards()
    plan = room.plan(limits=(limit,) * len(room.plan().sizes), max_weight=256, max_examples=50)
    state = Aggregator(CohortFixed(request=ShareRequest(plan=encode(plan), cards=cards.cards)))
    for decide in (state.fix_sharers, state.fix_survivors, None, None):
        room.play(state)
        if decide:
            state.apply(decide())
    mean, _ = room.mean(state, tmp_path)
    weights = [state.cohort.weights[peer] for peer in room.desks]
    total = (np.float64(mean["w"]) - room.start["w"]) / limit * sum(weights)
    signs = [np.array(one) for one in np.ndindex(2, 2, 2)]  # of the three peers, 0 for minus
    sums = [float(((2 * one - 1) * weights).sum()) for one in signs]
    nearest = np.abs(np.subtract.outer(total, sums)).argmin(axis=-1)
    for number, change in enumerate(changes):
        guessed = np.array([one[number] for one in signs])[nearest]
        assert np.mean(guessed == (change > 0)) < 0.9


def test_peers_that_train_with_different_settings_are_in_no_sum(tmp_path: Path) -> None:
    """Attack: have all but one peer train with a tiny learning rate; the sum is then its update.

    Other settings, seeds and tasks are refused alike; so is a second training of the same turn.
    """
    room = Room(tmp_path)
    asked: list[dict[str, Any]] = [{"settings": {"lr": 0.1}}, {"settings": {"lr": 1e-12}}]
    asked += [{"settings": {"lr": 0.1}, "seed": 1}]
    works = [room.work("train", **one) for one in asked]
    for turn, other in enumerate(works[1:], 1):
        cards = []
        for desk, work in zip(room.desks.values(), (works[0], other, other), strict=True):
            answer = desk.ask(replace(work, turn=turn))[1]
            cards.append(messages.decode_ready(answer).card)
        request = ShareRequest(plan=encode(room.plan()), cards=tuple(cards))
        for desk in room.desks.values():
            with pytest.raises(BadMessage, match="for work with different settings"):
                room.step(desk, request, turn)
    with pytest.raises(SecureRefused, match="the card of this turn is for other work"):
        room.first.ask(replace(other, turn=turn))


def test_a_step_under_the_name_of_another_task_is_refused(tmp_path: Path) -> None:
    """Attack: the owner forbids the task after the card; ask under a task that is allowed."""
    room = Room(tmp_path)
    request = room.cards()
    desk = room.first
    desk.owner = replace(desk.owner, tasks=(TASK, "ping"), forbidden_tasks=(TASK,))
    with pytest.raises(NotAllowed, match="forbids"):
        room.step(desk, request)
    with pytest.raises(SecureRefused, match="has made no card for this step"):
        room.step(desk, request, task="ping")


def test_a_result_is_not_masked_in_an_older_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: ask a peer, which had no disk space for its newer card, for the sum of its older one.

    Its newer update would be in two sums, whose difference is the update of another peer.
    """
    room = Room(tmp_path)
    state = Aggregator(CohortFixed(request=room.cards()))
    room.play(state)
    state.apply(state.fix_sharers())

    def fail(store: TurnStore, turn: Any) -> None:
        raise DiskFull("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(TurnStore, "begin", fail)
        with pytest.raises(DiskFull):
            room.first.ask(room.work("train", turn=1))
    request = state.request_for(room.first.peer)
    assert request is not None
    with pytest.raises(SecureRefused, match="has made no card for this step"):
        room.step(room.first, request)
    assert not room.first.uploads
    room.sum(turn=1)


@pytest.mark.parametrize("changed", [{"trust": {}}, {"secure_min": 4}])
def test_a_stricter_owner_tells_no_share_and_repeats_no_step(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    """Attack: ask for a step again, and for the shares of masks, after the owner raised secure_min
    or trusts a peer no longer."""
    room = Room(tmp_path)
    desk = room.first
    state = Aggregator(CohortFixed(request=room.cards()))
    for decide in (state.fix_sharers, state.fix_survivors, None):
        request, owner = state.request_for(desk.peer), desk.owner
        assert request is not None
        room.play(state)
        desk.owner = replace(owner, **changed)
        with pytest.raises(SecureRefused, match="pinned"):
            room.step(desk, request)
        desk.owner = owner
        if decide:
            state.apply(decide())
    unmask = state.request_for(desk.peer)
    assert unmask is not None
    desk.owner = replace(owner, **changed)
    with pytest.raises(SecureRefused, match="pinned"):
        room.step(desk, unmask)
    desk.owner = owner
    room.step(desk, unmask)


def test_the_mean_of_accuracies_does_not_tell_each_of_them() -> None:
    """Attack: find the hits of each of three peers by the sum of all hits, which a tally tells, and
    the mean accuracy. Each accuracy is a fraction of few examples."""
    examples, hits = (59, 61, 67), (31, 44, 29)
    names = tails.names({"accuracy": 0.0}, {})

    def told(*right: int) -> list[float]:
        numbers = [
            tails.values(names, {"accuracy": h / n}, {}, n, max(examples))
            for h, n in zip(right, examples, strict=True)
        ]
        total = sum(ring.encode_tail(one, 3).view("i8") for one in numbers)
        return ring.decode_tail(np.asarray(total).view("u8"))

    def likely(first: int, second: int) -> bool:
        third = sum(hits) - first - second
        return 0 <= third <= examples[2] and told(first, second, third) == told(*hits)

    found = [(a, b) for a in range(20, 45) for b in range(30, 60) if likely(a, b)]
    assert len(found) > 25 * 30 * 0.9, "the mean tells no more than the sum of all hits"
    accuracy, weight = told(*hits)
    assert accuracy / weight == pytest.approx(sum(hits) / sum(examples))


def test_the_weights_of_a_plan_do_not_change_how_metrics_count(tmp_path: Path) -> None:
    """Attack: sum metrics of the same peers with several weights, to solve for those of each."""
    room = Room(tmp_path)
    told = set()
    for turn, (most, cap) in enumerate([(1, 0), (256, 0), (256, 20)]):
        cards = room.cards("evaluate", turn).cards
        plan = room.plan("evaluate", max_weight=most, max_examples=cap)
        state = Aggregator(CohortFixed(request=ShareRequest(plan=encode(plan), cards=cards)))
        for decide in (state.fix_sharers, state.fix_survivors, None, None):
            room.play(state, turn=turn)
            if decide:
                state.apply(decide())
        told.add(str(room.mean(state, tmp_path)[1]))
    assert len(told) == 1
