"""What the coordinator refuses of a peer in a secure run, and the plan that it makes."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from coordinator.runs.secure import answers, plans, progress
from coordinator.runs.secure.decisions import Progress
from coordinator.runs.secure.fold import CheckedMean
from coordinator.runs.state import CohortState, Round, Run
from coordinator.storage.run_events import RunSpec, Update
from coordinator.storage.weight_store import WeightStore
from protocols.errors import CohortLost, UpdateRefused
from protocols.messages.states import RunState
from protocols.messages.work import UpdateClaim
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.privacy.secagg import aggregator as secagg
from protocols.privacy.secagg.aggregator import Aggregator
from protocols.privacy.secagg.cohort import Cohort, Pins
from protocols.privacy.secagg.messages import (
    SIGNED_CARD,
    MaskAnswer,
    ReadyAnswer,
    ShareRequest,
    SignedCard,
    TailNames,
    encode,
)
from tests.support.secure_cohort import BASE, FLEET, KEY, NAMES, RUN, Machine, plan, share_request

SPEC = RunSpec(task="t", rounds=2, quorum=3, secure=True, clip_norm=4.0)
PINS = Pins(frozenset())


def run_of(machines: list[Machine], **changed: Any) -> Run:
    updates = {m.peer: Update(digest="c", num_examples=m.examples) for m in machines}
    made = Run(id=RUN, spec=SPEC, round=1, head=BASE, state=RunState.TRAINING, updates=updates)
    return replace(made, **changed)


def machines_of(count: int) -> list[Machine]:
    rnd = random.Random(0)
    return [Machine(number, PINS, rnd) for number in range(count)]


def claim_of(machine: Machine, **changed: Any) -> UpdateClaim:
    made = UpdateClaim(
        run=RUN,
        round=1,
        kind="train",
        peer=machine.peer,
        base=BASE,
        digest="ab" * 32,
        nbytes=1,
        codec="masked:32",
        num_examples=machine.examples,
        nonce="n",
    )
    return replace(made, **changed)


def test_a_card_of_another_peer_turn_or_version_is_refused() -> None:
    one, other = machines_of(2)
    run = run_of([one, other])
    card = encode(ReadyAnswer(card=one.card(), names=NAMES))
    answers.check_card(run, FLEET, claim_of(one), card)
    refused = {
        "it is the card of": (run, FLEET, claim_of(other)),
        "another run, round, turn": (replace(run, turn=1), FLEET, claim_of(one)),
        "another run, round, turn, kind": (run, FLEET, claim_of(one, kind="evaluate")),
        "kind or version": (replace(run, head="cd" * 32), FLEET, claim_of(one)),
        "it is of another run": (run, "stranger", claim_of(one)),
        "of another": (run, FLEET, claim_of(one, num_examples=one.examples + 1)),
        "no peer tells its own metrics": (run, FLEET, claim_of(one, metrics={"loss": 1.0})),
        "has declared 1": (replace(run, declared={one.peer: (1, 1)}), FLEET, claim_of(one)),
    }
    for words, told in refused.items():
        with pytest.raises(UpdateRefused, match=words):
            answers.check_card(*told, card)
    for bad in (b"", card[:-3], encode(ReadyAnswer(card=replace_key(one, other)))):
        with pytest.raises(UpdateRefused):
            answers.check_card(run, FLEET, claim_of(one), bad)


def replace_key(one: Machine, other: Machine) -> Any:
    """The card of one peer with the signature of another."""
    mine, theirs = one.card(), other.card()
    return type(mine)(mine.card, theirs.signature)


def test_a_masked_update_of_another_shape_is_refused(tmp_path: Path) -> None:
    machines = machines_of(3)
    cohort = Cohort(share_request([m.card() for m in machines], plan()))
    store, peer = WeightStore(tmp_path), machines[0].peer
    count = sum(cohort.plan.sizes)
    tails = 2 * len(NAMES.metrics) + sum(NAMES.tallies.values())
    good = Weights({"t": np.zeros(tails, np.int64), "w": np.zeros(count, np.int32)})
    short = Weights({"t": np.zeros(tails, np.int64), "w": np.zeros(count - 1, np.int32)})

    def uploaded(model: Weights) -> MaskAnswer:
        path = tmp_path / "file"
        digest = weights.save(model, path)
        store.uploads.write(peer, digest, path.read_bytes())
        return MaskAnswer(cohort=cohort.id, digest=digest, nbytes=path.stat().st_size)

    answer = uploaded(good)
    answers.check_masked(store, cohort, peer, answer)
    for bad in (
        uploaded(short),
        replace(answer, nbytes=answer.nbytes + 1),
        replace(answer, digest="ab" * 32),
    ):
        with pytest.raises(UpdateRefused) as refused:
            answers.check_masked(store, cohort, peer, bad)
        assert refused.value.reason == "bad weights"


def test_peers_with_other_metrics_or_a_copied_key_are_left_out() -> None:
    machines = machines_of(5)
    run = run_of(machines)
    ready = {m.peer: ReadyAnswer(card=m.card(), names=NAMES) for m in machines}
    odd = machines[4].peer
    ready[odd] = replace(ready[odd], names=TailNames(metrics=("another",)))
    chosen = plans.choose(run, ready)
    assert chosen.peers == tuple(sorted(m.peer for m in machines[:4]))
    assert chosen.left_out == {odd: ("other metrics", "it reports other metrics than most peers")}
    assert chosen.names == NAMES
    thief, owner = machines[0], SIGNED_CARD.decode(ready[machines[1].peer].card.card)
    stolen = replace(SIGNED_CARD.decode(thief.card().card), mask_key=owner.mask_key)
    signed = SignedCard(*SIGNED_CARD.seal(stolen, thief.me.sign))
    ready[thief.peer] = ReadyAnswer(card=signed, names=NAMES)
    chosen = plans.choose(run, ready)
    assert chosen.peers == tuple(sorted(m.peer for m in machines[2:4]))
    other = replace(SIGNED_CARD.decode(thief.card().card), terms="ab" * 32)
    signed = SignedCard(*SIGNED_CARD.seal(other, thief.me.sign))
    chosen = plans.choose(run, ready | {thief.peer: ReadyAnswer(card=signed, names=NAMES)})
    assert chosen.peers == tuple(sorted(m.peer for m in machines[1:4]))
    assert chosen.left_out[thief.peer][0] == "other settings"


def test_the_plan_of_a_cohort_follows_from_the_run() -> None:
    machines = machines_of(4)
    schema = Weights({"a": np.zeros((2, 3), np.float32), "n": np.zeros(2, np.int64)}).schema
    run = run_of(machines)
    ready = {m.peer: ReadyAnswer(card=m.card(), names=NAMES) for m in machines}
    chosen = plans.choose(run, ready)
    limits = plans.tensor_limits(run, schema, [])
    assert limits == [4.0], "in the first round the clipping norm"
    assert plans.tensor_limits(run, schema, [0.25]) == [2.0]
    assert plans.tensor_limits(run, schema, [9.0]) == [4.0]
    assert plans.tensor_limits(run, schema, [0.0]) == [4.0 * 2.0**-20]
    closed = Round(round=1, digest="ab" * 32, contributors=("p",) * 100)
    assert plans.tensor_limits(replace(run, history=(closed,)), schema, [0.1]) == [2.0]
    request = plans.make_request(run, "train", FLEET, ready, chosen, schema, limits)
    assert isinstance(request, ShareRequest)
    cohort = Cohort(request)
    assert (cohort.plan.sizes, cohort.plan.clip, cohort.plan.names) == ((6,), 4.0, NAMES)
    assert cohort.bits >= 18
    request = plans.make_request(run, "evaluate", FLEET, ready, chosen, schema, limits)
    with pytest.raises(Exception, match="kind"):
        Cohort(request)  # the cards are for a training


@pytest.mark.parametrize("peers", [3, 16, 64, 256, 1000])
def test_changes_that_differ_at_random_are_not_clipped(peers: int) -> None:
    """Nor does the wider limit make the mean less accurate: its rounding errors average out."""
    draw = np.random.default_rng(peers)
    change = draw.normal(0, 1.0, 20_000)
    mean = draw.normal(0, peers**-0.5, 20_000)  # of as many changes
    limit = plans.headroom(peers) * np.abs(mean).max()
    assert limit > np.abs(change).max()
    for bits in (16, 32) if peers <= plans.max_cohort(16) else (32,):
        step = limit / plans.ring.max_value(plans.ring.value_bits(bits, peers))
        assert step * (12 * peers) ** -0.5 < 0.005 * np.abs(mean).max()


def test_the_share_of_one_peer_is_capped() -> None:
    for examples, cap in (([10, 10, 80], 0.4), ([1, 2, 3, 94], 0.5), ([5, 5, 5], 0.2)):
        limit = plans._max_examples(examples, cap)
        counted = [min(n, limit) if limit else n for n in examples]
        assert max(counted) / sum(counted) <= max(cap, 1 / len(examples)) + 1e-9
    assert plans._max_examples([10, 20, 30], 1.0) == 0


@pytest.mark.parametrize("bits", [16, 32])
def test_every_cohort_has_enough_bits(bits: int) -> None:
    codec = {16: "int8", 32: "fp32"}[bits]
    most = plans.max_cohort(bits)
    for peers in (3, 16, 64, most):
        run = Run(id="r", spec=replace(SPEC, codec=codec))
        weight = plans._max_weight(run, bits, peers)
        assert plans.ring.value_bits(bits, weight * peers) >= 8
    assert most == {16: 258, 32: 1024}[bits]


def test_a_sum_that_no_honest_peers_can_have_sent_is_void() -> None:
    base = Weights({"w": np.zeros(10, np.float32), "x": np.zeros(4, np.float32)})
    far = Weights({"w": np.ones(10, np.float32), "x": np.ones(4, np.float32)})
    for limit, is_void in ((3.8, False), (3.7, True)):
        mean = CheckedMean(far, base, limit)
        parts = [part for piece in weights.split_into_pieces(base.schema) for part in piece]
        mean.read(parts[0])
        if is_void:
            with pytest.raises(CohortLost, match="outside of what honest peers can send"):
                mean.read(parts[1])
        else:
            mean.read(parts[1])
            assert mean.largest == [1.0, 1.0]
    infinite = Weights({"w": np.full(10, np.inf, np.float32), "x": np.zeros(4, np.float32)})
    with pytest.raises(CohortLost, match="too large"):
        CheckedMean(infinite, base, 1e9).read(parts[0])


def test_a_card_names_its_turn() -> None:
    one = machines_of(1)[0]
    card = encode(ReadyAnswer(card=one.card(KEY._replace(turn=2)), names=NAMES))
    answers.check_card(run_of([one], turn=2), FLEET, claim_of(one, turn=2), card)


def test_a_masked_upload_in_progress_is_awaited_until_the_deadline() -> None:
    machines = machines_of(4)
    pins = Pins(frozenset(m.peer for m in machines))
    for machine in machines:
        machine.turns._pins = lambda: pins
    request = share_request([m.card() for m in machines], plan())
    state = Aggregator(secagg.CohortFixed(request=request))
    for machine in machines:
        state.take(machine.peer, machine.answer(request))
    peers = state.fix_sharers().sharers
    state.apply(secagg.SharersFixed(sharers=peers))
    masked = dict.fromkeys(peers[:3], "m")
    state.uploads |= masked
    cohort = CohortState(
        kind="train", turn=0, peers=peers, request="r", sharers=peers, masked=masked
    )
    run = run_of(machines, state=RunState.AGGREGATING, cohort=cohort)

    def measured(step_s: float, online: frozenset[str] | None, receiving: bool) -> Progress:
        found = progress.measure(run, state, online, step_s, lambda peer: receiving)
        assert found is not None
        return found

    everyone, last = frozenset(peers), peers[3]
    assert measured(1, everyone, False) == Progress(3, 4, 3, (last,))
    assert measured(31, everyone, False) == Progress(3, 4, 3, (last,), enough=True, is_due=True)
    assert measured(31, everyone, True) == Progress(3, 4, 3, (last,))
    late = measured(run.spec.deadline_s, everyone, True)
    assert (late.is_due, late.enough, late.is_over) == (True, True, True)
    gone = measured(1, everyone - {last}, False)
    assert (gone.awaited, gone.absent, gone.enough) == ((), {last}, True)
    assert measured(1, None, False).awaited == (last,), "after a restart it may come back"
