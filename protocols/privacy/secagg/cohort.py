"""A cohort: its cards, who neighbors whom, thresholds and weights. Pure.

Coordinator and peers compute all of it from the same bytes, so a peer trusts nothing of it to the
coordinator but the choice of the cards.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

import msgspec

from protocols.enrollment import identity
from protocols.errors import BadMessage
from protocols.privacy.secagg.messages import (
    MAX_COHORT,
    SIGNED_CARD,
    Card,
    Plan,
    ShareRequest,
    SignedCard,
    encode,
)
from protocols.privacy.secagg.ring import integer_weights, value_bits

MIN_COHORT = 3
#: Up to this many peers, each is a neighbor of all others.
MAX_COMPLETE = 65
#: Neighbors by the largest size of the cohort. With a tenth of the peers colluding at places of an
#: unpredictable ring, the chance that somewhere 2t - n of them are together is below 2^-80. The
#: numbers are part of the protocol: with others, `keys` needs another salt.
_NEIGHBORS = (
    *((229, 64), (256, 76), (320, 94), (384, 112), (512, 142), (768, 178), (MAX_COHORT, 196)),
)
_PLAN = msgspec.msgpack.Decoder(Plan)
_AGREE = b"commonweight secagg agree 1\n"


def neighbor_count(peers: int) -> int:
    """How many neighbors each peer has in a cohort of that size: even, or all others."""
    if peers <= MAX_COMPLETE:
        return peers - 1
    return _NEIGHBORS[bisect_left(_NEIGHBORS, (peers, 0))][1]


def threshold(group: int) -> int:
    """How many shares give a secret, of a peer and its neighbors together: two thirds.

    Bonawitz et al. 2017, section 6: fewer than 2t - n colluding members learn nothing.
    """
    return -(-2 * group // 3)


class Pins(NamedTuple):
    """The owner's rule: the peers that it pinned, and how many of them (with this one) a sum has.

    Others may take part, but the coordinator could have invented them, so they count for nothing.
    """

    peers: frozenset[str]
    minimum: int = MIN_COHORT


def open_card(signed: SignedCard) -> Card:
    """The card, if it is signed by the key of the peer that it names. Raises BadMessage."""
    card = SIGNED_CARD.decode(signed.card)
    if identity.peer_id(card.public) != card.peer:
        raise BadMessage(f"the card of {card.peer} contains the key of another peer")
    return SIGNED_CARD.open(
        signed.card,
        signed.signature,
        lambda signature, message: identity.verify(card.public, signature, message),
    )


class Cohort:
    """The peers of one secure sum. Raises BadMessage for cards that do not fit together.

    `is_checked`: the signatures were verified when this cohort was first opened.
    """

    def __init__(self, request: ShareRequest, *, is_checked: bool = False) -> None:
        try:
            self.plan = _PLAN.decode(request.plan)
        except msgspec.DecodeError as err:
            raise BadMessage(f"not a valid plan of a cohort: {err}") from err
        if len(self.plan.sizes) != len(self.plan.limits):
            raise BadMessage(
                f"the plan has {len(self.plan.sizes)} tensors and {len(self.plan.limits)} limits"
            )
        read = (lambda one: SIGNED_CARD.decode(one.card)) if is_checked else open_card
        cards = [(read(signed), signed) for signed in request.cards]
        cards.sort(key=lambda pair: pair[0].peer)
        self.request = request
        self.cards: dict[str, Card] = {card.peer: card for card, _ in cards}
        self.signed: dict[str, SignedCard] = {card.peer: signed for card, signed in cards}
        self.peers = tuple(self.cards)
        self._check()
        #: The neighbors of a peer are so far ahead or behind on the ring.
        self._reach = neighbor_count(len(self.peers)) // 2
        self._is_complete = neighbor_count(len(self.peers)) == len(self.peers) - 1
        self._groups: dict[str, tuple[str, ...]] = {}
        sha = hashlib.sha256(b"commonweight secagg cohort 1\n")
        for part in (request.plan, *(signed.card for _, signed in cards)):
            sha.update(hashlib.sha256(part).digest())
        self.id = sha.digest()

    def _check(self) -> None:
        cards, plan = self.cards.values(), self.plan
        if len(self.cards) != len(self.request.cards):
            raise BadMessage("a peer has two cards in one cohort")
        if len(self.cards) < MIN_COHORT:
            raise BadMessage(
                f"the cohort has {len(self.cards)} peers, which is fewer than {MIN_COHORT}",
                "a sum of so few reveals the update of each; wait for more peers",
            )
        for card in cards:
            if (card.fleet, card.run, card.round, card.kind, card.base) != (
                *(plan.fleet, plan.run, plan.round, plan.kind, plan.base),
            ):
                raise BadMessage(
                    f"the card of {card.peer} is of another run, round, kind or version"
                )
        if len({card.terms for card in cards}) > 1:
            raise BadMessage(
                "two cards of a cohort are for work with different settings",
                "a sum of such work can reveal the update of one peer; check the coordinator",
            )
        keys = {key for card in cards for key in (card.mask_key, card.channel_key)}
        if len(keys) != 2 * len(self.cards):
            raise BadMessage("two cards of a cohort have the same key")

    @cached_property
    def weights(self) -> dict[str, int]:
        """The integer weight of each peer, from the examples that its card says."""
        examples = [card.examples for card in self.cards.values()]
        weights = integer_weights(examples, self.plan.max_weight, self.plan.max_examples)
        return dict(zip(self.peers, weights, strict=True))

    @cached_property
    def bits(self) -> int:
        """Bits of a value. Raises UsageError if the ring has too few."""
        return value_bits(self.plan.ring, sum(self.weights.values()))

    @cached_property
    def _ring(self) -> list[str]:
        """The peers in an order derived from all cards, so that no peer can choose its place."""
        return sorted(
            self.peers,
            key=lambda peer: hashlib.sha256(self.id + self.cards[peer].public).digest(),
        )

    @cached_property
    def _places(self) -> dict[str, int]:
        return {peer: place for place, peer in enumerate(self._ring)}

    def group(self, peer: str) -> tuple[str, ...]:
        """A peer and its neighbors, in name order."""
        if self._is_complete:
            return self.peers
        if peer not in self._groups:
            first = self._places[peer] - self._reach
            ring = self._ring
            whole = range(first, first + 2 * self._reach + 1)
            self._groups[peer] = tuple(sorted(ring[place % len(ring)] for place in whole))
        return self._groups[peer]

    def neighbors(self, peer: str) -> tuple[str, ...]:
        """The neighbors of a peer, without itself. Being neighbors is mutual."""
        return tuple(one for one in self.group(peer) if one != peer)

    @property
    def threshold(self) -> int:
        """How many members of a group give its secrets."""
        return threshold(neighbor_count(len(self.peers)) + 1)

    def place(self, owner: str, holder: str) -> int:
        """Where the holder's share of the owner's secrets lies: 1 to the size of the group."""
        return bisect_left(self.group(owner), holder) + 1

    def together(self, peer: str, among: Collection[str]) -> set[str]:
        """The peers of `among` that masks bind to this one, directly or over others of them."""
        among = {*among, peer}
        if self._is_complete:
            return among
        size, start = len(self._ring), self._places[peer]
        # By how far they are ahead on the ring: a gap that is wider than the reach parts them.
        ahead = sorted(((self._places[one] - start) % size, one) for one in among)
        found = {peer}
        for way in (ahead, [(size - far, one) for far, one in reversed(ahead[1:])]):
            last = 0
            for far, one in way:
                if far - last > self._reach:
                    break
                found.add(one)
                last = far
        return found

    def agreement(self, sharers: Iterable[str], survivors: Iterable[str]) -> bytes:
        """The bytes that a survivor signs."""
        sets = [hashlib.sha256(encode(sorted(peers))).digest() for peers in (sharers, survivors)]
        return _AGREE + self.id + b"".join(sets)

    def signs(self, peer: str, signature: bytes, message: bytes) -> bool:
        """Whether this peer of the cohort has signed these bytes."""
        card = self.cards.get(peer)
        return card is not None and identity.verify(card.public, signature, message)


def in_order(peers: Sequence[str]) -> bool:
    """Whether the names are sorted and each is there once, as sets are sent."""
    return all(one < other for one, other in pairwise(peers))
