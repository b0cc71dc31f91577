"""A peer's state in one turn of secure aggregation, and how it masks its update in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from protocols.errors import BadWeights
from protocols.messages.envelope import Count, Id, MaybeDigest
from protocols.privacy.secagg import keys, ring, tails
from protocols.privacy.secagg.cohort import Cohort
from protocols.privacy.secagg.masks import Masks, RingArray, add_masks, add_words
from protocols.privacy.secagg.messages import (
    AgreeRequest,
    Bytes32,
    MaskRequest,
    ReadyRequest,
    ShareRequest,
    SignedCard,
    TailNames,
    UnmaskAnswer,
)
from protocols.privacy.shared_noise import SharedNoise

Sign = Callable[[bytes], bytes]


class Me(NamedTuple):
    """This peer: its id, its public key (32 raw bytes), and what signs with the private key."""

    peer: str
    public: bytes
    sign: Sign


class Turn(Struct, frozen=True, kw_only=True):
    """A peer's state in one turn; each field is set once.

    `master`: 32 secret bytes that all secrets of the card come from. `names`: the metrics. `ready`,
    `cohort`, `mask`, `agree`: the requests that were answered. `upload`: digest of the masked
    update. `noise`: in a run with shared noise, what the update has of it. `told`: the answer to
    the last step, with which the master is erased.
    """

    ready: ReadyRequest
    peer: Id
    master: Bytes32
    card: SignedCard
    names: TailNames = TailNames()
    noise: SharedNoise | None = None
    cohort: ShareRequest | None = None
    mask: MaskRequest | None = None
    upload: MaybeDigest = ""
    upload_bytes: Count = 0
    agree: AgreeRequest | None = None
    told: UnmaskAnswer | None = None


class Masking(NamedTuple):
    """How to mask this peer's update: seeds to add and to subtract, its weight, its rounding.

    `factor`: what the change is multiplied by in a run with shared noise; 0 in other runs.
    """

    cohort: Cohort
    weight: int
    plus: list[bytes]
    minus: list[bytes]
    rounding_seed: bytes
    factor: float = 0.0

    def tail(self, metrics: Sequence[float]) -> npt.NDArray[np.uint64]:
        """The masked metrics uint64[m], from those of `tails.values`. Raises BadWeights."""
        if len(metrics) != (count := tails.count(self.cohort.plan.names)):
            raise BadWeights(f"{len(metrics)} numbers of metrics; the cohort has {count}")
        tail = ring.encode_tail(metrics, len(self.cohort.peers))
        add_masks(tail, [*map(keys.tail_of, self.plus)], [*map(keys.tail_of, self.minus)])
        return tail

    def words(self, numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """The masked numbers of an answer to a question, uint64[n, w]."""
        masked = numbers.copy()
        add_words(masked, [*map(keys.words_of, self.plus)], [*map(keys.words_of, self.minus)])
        return masked

    def blocks(self, changes: Iterable[tuple[int, npt.NDArray[Any]]]) -> Iterator[RingArray]:
        """The masked update, block by block, from blocks of (tensor's number, float32[n]), or
        int32[n] of an exact plan.

        The same blocks give the same bytes each time. Raises BadWeights.
        """
        plan = self.cohort.plan
        quantizer = ring.Quantizer(plan.ring, self.cohort.bits, self.weight, self.rounding_seed)
        masks = Masks(self.plus, self.minus, plan.ring // 8)
        for number, change in changes:
            if plan.exact:
                block = change.astype("<i4").view(ring.DTYPES[32])
            else:
                block = quantizer.quantize(change, plan.limits[number] / (self.factor or 1.0))
            masks.add_to(block)
            yield block
