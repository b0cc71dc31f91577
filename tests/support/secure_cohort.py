"""Cohorts of secure sums in one process: the real agents' side and the real coordinator's side.

A machine keeps its turns in memory; `agent.home.secure_store` has tests of its own. Signatures over
the same bytes are verified once in a process, which changes no result.
"""

from __future__ import annotations

import functools
import hashlib
import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from agent.clientapp.secure_turns import SecureTurns
from agent.home.secure_store import TurnKey, key_of
from protocols.enrollment import identity
from protocols.errors import SecureRefused
from protocols.privacy.secagg import ring, tails
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.cohort import Cohort, Pins
from protocols.privacy.secagg.keys import CardSecrets
from protocols.privacy.secagg.masks import RingArray
from protocols.privacy.secagg.messages import (
    AgreeRequest,
    Answer,
    MaskRequest,
    Plan,
    ReadyRequest,
    Request,
    ShareRequest,
    SignedCard,
    TailNames,
    encode,
)
from protocols.privacy.secagg.recovery import recover
from protocols.privacy.secagg.turn import Masking, Me, Turn
from protocols.privacy.shared_noise import SharedNoise

FLEET, RUN, BASE = "fleet", "run-1", "ab" * 32
KEY = TurnKey(RUN, 1, 0)
SIZES, LIMITS = (5, 3), (0.5, 0.25)
#: One metric, which is two integers beside the update.
NAMES = TailNames(metrics=("loss",))


@functools.cache
def signing_key(number: int) -> identity.SigningKey:
    seed = hashlib.sha256(b"peer %d" % number).digest()
    return identity.SigningKey.from_private_bytes(seed)


@functools.cache
def me(number: int) -> Me:
    key = signing_key(number)
    public = identity.public_bytes(key)
    return Me(identity.peer_id(public), public, key.sign)


class Died(Exception):
    """A simulated power cut."""


class MemoryStore:
    """What is on the disk of a machine, with a power cut before or after a record."""

    def __init__(self) -> None:
        self.turns: dict[TurnKey, Turn] = {}
        #: Also of turns that are over, whose secrets are erased.
        self.masters: dict[TurnKey, bytes] = {}
        self.dies: str = ""  # "before" or "after" the next record

    def get(self, key: TurnKey) -> Turn | None:
        if key in self.turns and key != next(reversed(self.turns)):
            raise SecureRefused("over", "a newer turn has begun")
        return self.turns.get(key)

    def begin(self, turn: Turn) -> None:
        assert key_of(turn) not in self.turns
        self.masters[key_of(turn)] = turn.master
        self._record(turn)

    def advance(self, old: Turn, new: Turn, step: str) -> None:
        if new != old:
            assert self.turns[key_of(old)] == old
            self._record(new)

    def _record(self, turn: Turn) -> None:
        dies, self.dies = self.dies, ""
        if dies == "before":
            raise Died
        self.turns[key_of(turn)] = turn
        if dies:
            raise Died


class Machine:
    """An agent, its disk, and its update."""

    def __init__(
        self,
        number: int,
        pins: Pins,
        rnd: random.Random,
        sizes: tuple[int, ...] = SIZES,
        noise: SharedNoise | None = None,
    ) -> None:
        self.me, self.store, self.sizes = me(number), MemoryStore(), sizes
        self.peer, self.examples = self.me.peer, rnd.randrange(1, 200)
        draw = np.random.default_rng(rnd.getrandbits(32))
        self.change: npt.NDArray[np.float32] = draw.normal(0, 0.2, sum(sizes)).astype(np.float32)
        self.metrics = [self.examples * rnd.random(), 1.0]
        self.names, self.noise = NAMES, noise
        self.kept: dict[str, tuple[RingArray, npt.NDArray[np.uint64]]] = {}
        self.turns = SecureTurns(self.me, self.store, lambda: pins, rnd.randbytes)  # type: ignore[arg-type]

    def card(self, key: TurnKey = KEY, base: str = BASE) -> SignedCard:
        request = ReadyRequest(
            fleet=FLEET,
            run=key.run,
            round=key.round,
            turn=key.turn,
            kind=key.kind,  # type: ignore[arg-type]
            base=base,
        )
        return self.turns.ready(request, self.examples, self.names, self.noise).card

    def answer(self, request: Request, key: TurnKey = KEY) -> Answer:
        match request:
            case ShareRequest():
                return self.turns.share(key, request, self.sizes)
            case MaskRequest():
                return self.turns.mask(key, request, self._keep)
            case AgreeRequest():
                return self.turns.agree(key, request)
            case _:
                return self.turns.unmask(key, request)

    def _keep(self, masking: Masking) -> tuple[str, int]:
        array = np.concatenate([*masking.blocks(by_tensor(self.change, self.sizes))])
        tail = masking.tail(self.metrics)
        digest = hashlib.sha256(array.tobytes() + tail.tobytes()).hexdigest()
        self.kept[digest] = array, tail
        return digest, array.nbytes + tail.nbytes


def by_tensor(
    change: npt.NDArray[np.float32], sizes: tuple[int, ...]
) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    """The change in blocks, each of one tensor."""
    yield from enumerate(np.split(change, np.cumsum(sizes)[:-1]))


def plan(bits: int = 32, sizes: tuple[int, ...] = SIZES, **other: object) -> Plan:
    limits = other.pop("limits", None) or (LIMITS if sizes == SIZES else (0.5,) * len(sizes))
    whole: dict[str, object] = {"max_weight": 16, "names": NAMES, "base": BASE, **other}
    return Plan(
        fleet=FLEET,
        run=RUN,
        round=1,
        ring=bits,  # type: ignore[arg-type]
        sizes=sizes,
        limits=limits,  # type: ignore[arg-type]
        **whole,  # type: ignore[arg-type]
    )


def share_request(cards: Iterable[SignedCard], of: Plan) -> ShareRequest:
    return ShareRequest(plan=encode(of), cards=tuple(cards))


class Sum(NamedTuple):
    """What the coordinator ends with: signed integers, and the summed metrics."""

    total: npt.NDArray[np.signedinteger]
    metrics: list[float]

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.total.tobytes()).hexdigest()


def plain_sum(cohort: Cohort, machines: Iterable[Machine], key: TurnKey = KEY) -> Sum:
    """The sum of the same integers without masks, in 64 bits."""
    dtype = f"<i{cohort.plan.ring // 8}"
    total = np.zeros(sum(cohort.plan.sizes), np.int64)
    metrics = np.zeros(tails.count(cohort.plan.names))
    for machine in machines:
        seed = CardSecrets(machine.store.masters[key]).rounding_seed(cohort.id)
        quantizer = ring.Quantizer(
            cohort.plan.ring, cohort.bits, cohort.weights[machine.peer], seed
        )
        blocks = [
            quantizer.quantize(block, cohort.plan.limits[number])
            for number, block in by_tensor(machine.change, machine.sizes)
        ]
        array = np.concatenate(blocks)
        total += array.view(dtype)
        metrics += machine.metrics
    assert np.abs(total).max() < 2 ** (cohort.plan.ring - 1)
    return Sum(total.astype(dtype), metrics.tolist())


def secure_sum(state: Aggregator, machines: dict[str, Machine]) -> Sum:
    """The sum of the survivors' uploads, unmasked in two pieces as the coordinator reads files."""
    cohort, recovery = state.cohort, recover(state)
    dtype = ring.DTYPES[cohort.plan.ring]
    total = np.zeros(sum(cohort.plan.sizes), dtype)
    tail = np.zeros(tails.count(cohort.plan.names), np.uint64)
    for peer in state.survivors:
        array, metrics = machines[peer].kept[state.uploads[peer]]
        total += array
        tail += metrics
    cut = len(total) // 2
    recovery.unmask(total[:cut])
    recovery.unmask(total[cut:], cut)
    recovery.unmask_tail(tail)
    signed = ring.check_sum(total, cohort.bits, sum(cohort.weights[p] for p in state.survivors))
    return Sum(signed, ring.decode_tail(tail))


def run_cohort(
    size: int,
    lost: tuple[int, int, int, int] = (0, 0, 0, 0),
    *,
    bits: int = 32,
    minimum: int = 2,
    sizes: tuple[int, ...] = SIZES,
    seed: int = 0,
    max_weight: int = 16,
) -> tuple[Sum, Sum, Aggregator]:
    """A whole secure sum. `lost`: machines that die for good before share, mask, agree, unmask.

    Returns the secure sum, the plain one of the same survivors, and the coordinator's state.
    """
    rnd = random.Random(seed)
    pins = Pins(frozenset(me(number).peer for number in range(size)), minimum)
    machines = {(one := Machine(number, pins, rnd, sizes)).peer: one for number in range(size)}
    cards = [machine.card() for machine in machines.values()]
    request = share_request(cards, plan(bits, sizes, max_weight=max_weight))
    state = Aggregator(CohortFixed(request=request))
    alive = sorted(machines)
    for step, gone in enumerate(lost):
        for peer in rnd.sample(alive, gone):
            alive.remove(peer)
        rnd.shuffle(alive)
        for peer in alive:
            if (asked := state.request_for(peer)) is not None:
                state.take(peer, machines[peer].answer(_over_the_wire(asked)))
        if step == 0:
            state.apply(state.fix_sharers())
        elif step == 1:
            state.apply(state.fix_survivors())
    assert state.can_recover()
    survivors = [machines[peer] for peer in state.survivors]
    return secure_sum(state, machines), plain_sum(state.cohort, survivors), state


def masked_uploads(
    size: int, sizes: tuple[int, ...], bits: int
) -> Iterator[tuple[RingArray, npt.NDArray[np.uint64]]]:
    """What peers of a cohort upload for an update of zeros, with many metrics of zero."""
    rnd, pins = random.Random(0), Pins(frozenset(me(number).peer for number in range(size)))
    machines = {(one := Machine(number, pins, rnd, sizes)).peer: one for number in range(size)}
    names = TailNames(tallies=dict.fromkeys("abcd", 1024))
    for machine in machines.values():
        machine.names = names
    cards = [machine.card() for machine in machines.values()]
    state = Aggregator(CohortFixed(request=share_request(cards, plan(bits, sizes, names=names))))
    for peer, machine in machines.items():
        state.take(peer, machine.answer(state.cohort.request))
    state.apply(state.fix_sharers())
    for peer, machine in machines.items():
        machine.change[:], machine.metrics = 0, [0.0] * 4096
        asked = state.request_for(peer)
        assert asked is not None
        machine.answer(asked)
        yield from machine.kept.values()


def _over_the_wire(request: Request) -> Request:
    return msgspec.msgpack.decode(encode(request), type=type(request))
