"""The same attacks on the secure aggregation of commonweight.

Peers are the agents' side as it is, and the attacker is the coordinator. Where it follows the
protocol, it learns what `recover` gives it.

    python -m tests.attacks_others.on_ours
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from protocols.errors import SecureRefused
from protocols.privacy.secagg import keys, ring
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.cohort import Pins
from protocols.privacy.secagg.masks import KeyStream, add_masks, new_buffer
from protocols.privacy.secagg.messages import (
    AgreeAnswer,
    AgreeRequest,
    Answer,
    UnmaskAnswer,
    UnmaskRequest,
)
from protocols.privacy.secagg.peer import mask
from protocols.privacy.secagg.recovery import recover
from tests.attacks_others.measures import (
    BOTH_SHARES,
    CORRELATE,
    MAX_CORRELATION,
    SEEDS,
    STORED,
    SUBTRACT,
    Finding,
    Floats,
    Ring,
    Target,
    correlation,
    free_bits,
    revealed_differences,
    search,
    tell,
)
from tests.support.randomness import chi_squared_p
from tests.support.secure_cohort import KEY, Machine, me, plan, share_request

#: Elements of an update. Random ones correlate by more than MAX_CORRELATION with a chance of 1e-11.
ELEMENTS = 50_000
#: Seeds that are tried: as many numbers as the search of Flower's seeds tries by default.
SLICE_BITS = 20
#: Of a seed of which all others are known, to show that the search finds what it comes across.
UNKNOWN_BITS = 8
MIN_P = 1e-6
_SAMPLES, _FIRST, _SPLIT = 64, 32, 6


class Fleet:
    """Peers that pinned each other, by name; the first is the victim."""

    def __init__(self, size: int, elements: int = ELEMENTS) -> None:
        rnd, self.sizes = random.Random(3), (elements,)
        self.pins = Pins(frozenset(me(number).peer for number in range(size)), 2)
        machines = [Machine(number, self.pins, rnd, self.sizes) for number in range(size)]
        self.machines = {one.peer: one for one in sorted(machines, key=lambda one: one.peer)}
        self.victim, *_ = self.machines.values()

    def masked(self, gone: Sequence[Machine] = ()) -> Aggregator:
        """The coordinator's state when all have shared, and all but those `gone` have uploaded."""
        cards = [machine.card() for machine in self.machines.values()]
        request = share_request(cards, plan(32, self.sizes))
        state = Aggregator(CohortFixed(request=request))
        for machine in self.machines.values():
            state.take(machine.peer, machine.answer(request))
        state.apply(state.fix_sharers())
        self._ask(state, gone)
        state.apply(state.fix_survivors())
        return state

    def summed(self, gone: Sequence[Machine] = ()) -> Aggregator:
        """The coordinator's state when it can unmask the sum."""
        state = self.masked(gone)
        for _ in ("agree", "unmask"):
            self._ask(state, gone)
        assert state.can_recover()
        return state

    def _ask(self, state: Aggregator, gone: Sequence[Machine]) -> None:
        for machine in self.machines.values():
            asked = None if machine in gone else state.request_for(machine.peer)
            if asked is not None:
                state.take(machine.peer, machine.answer(asked))


class Upload:
    """The victim's upload without the masks that the coordinator learns from a sum.

    `hidden`: the seeds of its other masks, which the victim has added.
    """

    def __init__(self, fleet: Fleet, state: Aggregator) -> None:
        cohort, store = state.cohort, fleet.victim.store
        # As it was before the last step, which erases the secrets.
        turn = replace(store.turns[KEY], told=None, master=store.masters[KEY])
        assert turn.mask is not None
        _, masking = mask(turn, turn.mask, fleet.pins)
        recovery = recover(state)
        known = {*recovery.plus, *recovery.minus}
        array, _ = fleet.victim.kept[state.uploads[fleet.victim.peer]]
        self.left: Ring = array.astype(np.uint32)
        add_masks(
            self.left,
            plus=[seed for seed in masking.minus if seed in known],
            minus=[seed for seed in masking.plus if seed in known],
        )
        assert not masking.minus, "the victim comes first, so that it adds all masks"
        self.hidden = [seed for seed in masking.plus if seed not in known]
        #: The largest integer of an honest peer, and the value of 1.
        self.limit = masking.weight * ring.max_value(cohort.bits)
        self.unit = cohort.plan.limits[0] / self.limit
        self.secret: Floats = fleet.victim.change

    @property
    def values(self) -> Floats:
        """What is left, in the unit of the update."""
        return self.left.view(np.int32) * self.unit


def stream(count: int, buffer: npt.NDArray[np.uint8], seed: bytes) -> Ring:
    """The first elements of the mask of a seed."""
    return KeyStream(seed, out=buffer).read(4 * count).view("<u4").copy()


def try_seeds(numbers: range = range(2**SLICE_BITS)) -> Finding:
    """One of three peers drops out after it has shared its keys. One mask is then left."""
    fleet = Fleet(3)
    *_, third = fleet.machines.values()
    upload = Upload(fleet, fleet.summed(gone=[third]))
    count, buffer = len(upload.left), new_buffer()
    target = Target(
        upload.left,
        np.full(count, -upload.limit, np.int64),
        np.full(count, 2 * upload.limit, np.uint32),
    )

    def find(numbers: range, base: int) -> list[bytes]:
        """The seeds from the number `base` on that fit."""

        def seed_of(number: int) -> bytes:
            return (base + number).to_bytes(keys.SEED_BYTES, "big")

        def first(some: npt.NDArray[np.uint64]) -> Ring:
            return np.stack([stream(_FIRST, buffer, seed_of(one)) for one in some.tolist()])

        whole = partial(stream, count, buffer)
        return [*map(seed_of, search(target, numbers, first, lambda one: whole(seed_of(one))))]

    found = find(numbers, 0)
    (hidden,) = upload.hidden or [bytes(keys.SEED_BYTES)]
    base = int.from_bytes(hidden, "big") >> UNKNOWN_BITS << UNKNOWN_BITS
    if upload.hidden:
        assert find(range(2**UNKNOWN_BITS), base) == [hidden], "the search misses a true seed"
    free, used = free_bits(pair_seeds()), used_bits(hidden)
    return Finding(
        SEEDS,
        bool(found) or not upload.hidden or min(free, used) < 8 * keys.SEED_BYTES,
        f"{free} bits of a seed are free and {used} change the mask; {len(numbers):,} seeds tried, "
        f"{len(found) or 'none'} fits; with all but {UNKNOWN_BITS} bits known, the search finds it",
    )


def pair_seeds() -> list[bytes]:
    """Seeds of masks of pairs of fresh keys."""
    rnd, cohort = random.Random(1), bytes(32)
    secrets = [keys.CardSecrets(rnd.randbytes(32)).mask_key for _ in range(2 * _SAMPLES)]
    pairs = zip(secrets[::2], secrets[1::2], strict=True)
    return [keys.pair_mask(one, keys.public_of(other), cohort) for one, other in pairs]


def used_bits(seed: bytes) -> int:
    """How many bits of a seed change its mask."""
    of, number, buffer = partial(stream, _FIRST), int.from_bytes(seed, "big"), new_buffer()
    flipped = ((number ^ 1 << bit).to_bytes(len(seed), "big") for bit in range(8 * len(seed)))
    return len({of(buffer, other).tobytes() for other in flipped} - {of(buffer, seed).tobytes()})


def ask_for_both_shares() -> Finding:
    """The coordinator names the victim to some peers as a survivor and to the others as gone.

    Then it names it the other way around. Each time, it asks for shares with all signatures.
    """
    ways = [_split(gone) for gone in range(_SPLIT)]
    worked, refused = sum(told for told, _ in ways), sum(refusals for _, refusals in ways)
    return Finding(
        BOTH_SHARES,
        worked > 0,
        f"{_SPLIT} peers, split in {len(ways)} ways: {refused} requests refused; both secrets of a "
        f"peer were told in {worked or 'none'}",
    )


def _split(gone: int) -> tuple[bool, int]:
    """Whether both secrets of the victim got out, and how many requests were refused.

    `gone`: to how many peers the victim is first named as gone.
    """
    fleet, refused = Fleet(_SPLIT, elements=16), 0
    state = fleet.masked()
    victim, everyone = fleet.victim.peer, state.survivors
    without = tuple(peer for peer in everyone if peer != victim)
    signed: dict[tuple[str, ...], dict[str, bytes]] = {everyone: {}, without: {}}
    seeds, mask_keys = set[str](), set[str]()

    def ask(machine: Machine, request: AgreeRequest | UnmaskRequest) -> Answer | None:
        nonlocal refused
        try:
            return machine.answer(request)
        except SecureRefused:
            refused += 1
            return None

    for time in range(2):
        for place, machine in enumerate(reversed(fleet.machines.values())):
            survivors = without if (place < gone) == (time == 0) else everyone
            asked = AgreeRequest(cohort=state.cohort.id, survivors=survivors)
            if isinstance(answer := ask(machine, asked), AgreeAnswer):
                signed[survivors][machine.peer] = answer.signature
        for signatures in (*signed.values(), signed[without] | signed[everyone]):
            request = UnmaskRequest(cohort=state.cohort.id, signatures=signatures)
            for peer, machine in fleet.machines.items():
                if isinstance(told := ask(machine, request), UnmaskAnswer):
                    seeds |= {peer} if victim in told.seeds else set()
                    mask_keys |= {peer} if victim in told.keys else set()
    needed = state.cohort.threshold
    both = len(seeds) >= needed and len(mask_keys) >= needed
    return both or bool(seeds & mask_keys), refused


def look_at_an_upload() -> list[Finding]:
    """All peers upload and the sum is unmasked. What is left of the victim's upload?"""
    fleet = Fleet(3)
    upload = Upload(fleet, fleet.summed())
    found = correlation(upload.values, upload.secret)
    same = revealed_differences(upload.values, upload.secret)
    p = chi_squared_p(upload.left)
    return [
        Finding(CORRELATE, abs(found) > MAX_CORRELATION, f"correlation {found:.4f}"),
        Finding(SUBTRACT, same > 0.001, f"{same:.0%} of the differences are those of the update"),
        Finding(
            STORED,
            p < MIN_P or not upload.hidden,
            f"{len(upload.hidden)} masks are unknown to the coordinator; without the others, the "
            f"upload looks random (chi-squared p = {p:.2g})",
        ),
    ]


def main() -> None:
    tell("commonweight", [try_seeds(), ask_for_both_shares(), *look_at_an_upload()])


if __name__ == "__main__":
    main()
