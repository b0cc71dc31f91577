"""The entry of an answer of a secure run in the owner's audit log. Pure.

Keys, sealed shares and signatures are random to all others; so their bytes are not logged, only
their receivers and what they depend on.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import msgspec

from protocols.messages.work import UpdateClaim
from protocols.privacy.secagg import messages
from protocols.privacy.secagg.messages import (
    STEPS,
    AgreeAnswer,
    MaskAnswer,
    ShareAnswer,
    ring_of,
)

SecureKind = Literal[
    "card", "sealed shares", "masked update", "signature for a sum", "shares of masks"
]


class SecureEntry(NamedTuple):
    """The kind of the answer, the bytes that left as digest and size, and the rest as JSON."""

    what: SecureKind
    digest: str
    nbytes: int
    told: str


def read(claim: UpdateClaim, answer: bytes) -> SecureEntry | None:
    """What an answer tells; None for one of a plain run. Raises BadMessage."""
    if not ring_of(claim.codec):
        return None
    if claim.kind not in STEPS:
        names = messages.decode_ready(answer).names
        return _entry(claim, "card", sums=claim.kind, metrics=names.metrics, tallies=names.tallies)
    step = messages.decode_answer(claim.kind, answer)
    cohort = step.cohort.hex()[:12]
    match step:
        case ShareAnswer(shares=shares):
            return _entry(claim, "sealed shares", sum=cohort, sealed_for=sorted(shares))
        case MaskAnswer(digest=digest, nbytes=nbytes):
            told = _entry(claim, "masked update", sum=cohort)
            return told._replace(digest=digest, nbytes=nbytes)
        case AgreeAnswer():
            return _entry(claim, "signature for a sum", sum=cohort)
        case _:
            counted, lost = sorted(step.seeds), sorted(step.keys)
            return _entry(claim, "shares of masks", sum=cohort, counted=counted, lost=lost)


def _entry(claim: UpdateClaim, what: SecureKind, **details: Any) -> SecureEntry:
    return SecureEntry(what, claim.digest, claim.nbytes, msgspec.json.encode(details).decode())
