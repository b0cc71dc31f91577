"""How a fleet replaces its CA: each CA signs the next one. Pure.

The fleet keeps its id, which comes from its first CA. The chain of transitions from that CA proves
which CA it has now. A machine follows the chain from the CA that it trusts to the newest, never
back, so it does not matter who brings the chain or how many rotations the machine has missed.
Only the CA's own key signs a transition, not that of an issuer.
"""

from __future__ import annotations

import contextlib
from functools import partial
from typing import Annotated, NamedTuple

from msgspec import Meta, Struct

from protocols.enrollment import certificates, fleet_card, identity
from protocols.enrollment.certificates import NodeCertificate
from protocols.enrollment.fleet_card import FleetCard
from protocols.enrollment.identity import SigningKey
from protocols.enrollment.joining import Card, Chain
from protocols.errors import BadMessage
from protocols.messages.envelope import Count, Id
from protocols.messages.signing import SignedJson

FORMAT = 1
#: Days for which node certificates of the CA before still count, unless the operator chose others.
OLD_CA_DAYS, MAX_OLD_CA_DAYS = 30.0, 90.0

_Pem = Annotated[bytes, Meta(max_length=2048)]
_Time = Annotated[float, Meta(ge=0, le=2**40)]


class Transition(Struct, frozen=True, kw_only=True):
    """The CA `old_ca` (PEM) of a fleet names the one that takes its place `at` a time (Unix s).

    `counter`: 1 for the fleet's first rotation, then 2, and so on. `old_until`: node certificates
    of the old CA count until then (Unix s).
    """

    v: Count = FORMAT
    fleet: Id
    counter: Count
    old_ca: _Pem
    new_ca: _Pem
    at: _Time
    old_until: _Time


class ChainResponse(Struct, frozen=True, kw_only=True):
    """All transitions of a fleet, oldest first, and the fleet card by its newest CA."""

    transitions: Chain = ()
    card: Card = b""


_SIGNED = SignedJson(Transition, "ca transition", "transition of the CA", "the CA before it")


def sign_transition(old_key: SigningKey, transition: Transition) -> bytes:
    """The signed transition: 64 bytes of signature, then JSON."""
    return _SIGNED.pack(transition, old_key.sign)


def read_chain(chain: Chain) -> tuple[Transition, ...]:
    """The transitions. Raises BadMessage unless each CA signed the next, from the first CA on."""
    found: list[Transition] = []
    for number, signed in enumerate(chain, 1):
        old = found[-1].new_ca if found else _SIGNED.decode(signed[64:]).old_ca
        step = _SIGNED.unpack(signed, partial(identity.verify, certificates.ca_public(old)))
        fleet = found[0].fleet if found else certificates.fleet_id(old)
        if step.v != FORMAT:
            raise BadMessage(
                f"a transition of the CA has format {step.v}; this version reads {FORMAT}",
                "update commonweight on this machine",
            )
        if (step.fleet, step.counter, step.old_ca) != (fleet, number, old):
            raise BadMessage(f"transition {number} of the CA is not the next one of fleet {fleet}")
        earlier = [certificates.ca_public(one.old_ca) for one in (*found, step)]
        if certificates.ca_public(step.new_ca) in earlier:
            raise BadMessage(f"transition {number} goes back to a CA that was replaced")
        found.append(step)
    return tuple(found)


def fleet_of(ca_pem: bytes, chain: Chain) -> str:
    """The id of the fleet whose CA this is by the chain. Raises BadMessage."""
    if not chain:
        return certificates.fleet_id(ca_pem)
    steps = read_chain(chain)
    if steps[-1].new_ca != ca_pem:
        raise BadMessage("the transitions lead to another CA")
    return steps[0].fleet


def follow(ca_pem: bytes, known: Chain, told: Chain) -> bytes:
    """The newest CA of a longer chain `told`, for a machine that trusts `ca_pem` by `known`.

    It is `ca_pem` if there is no newer one. Raises BadMessage.
    """
    fleet = fleet_of(ca_pem, known)
    if len(told) < len(known) or told[: len(known)] != known:
        raise BadMessage(
            f"the server's {len(told)} transitions of the CA do not begin with the {len(known)} "
            "known here"
        )
    if told == known:
        return ca_pem
    steps = read_chain(told)
    if steps[len(known)].old_ca != ca_pem or steps[0].fleet != fleet:
        raise BadMessage("the new CA is not signed by the one that is trusted here")
    return steps[-1].new_ca


def first_card(ca_pem: bytes, card: bytes, old_ca: bytes, known: bytes, fleet: str) -> FleetCard:
    """The first card by a new CA that a machine sees. Raises BadMessage.

    `known`: the newest card of the CA that it trusted before, or empty; counters continue from it.
    """
    found = fleet_card.verify_card(ca_pem, card, fleet=fleet)
    before = fleet_card.verify_card(old_ca, known, fleet=fleet).counter if known else 0
    if found.counter <= before:
        raise BadMessage(
            f"the fleet card is older (number {found.counter}) than the one known here ({before})"
        )
    return found


class CaTrust(NamedTuple):
    """The CA of a fleet, and the one before it, whose node certificates count `until` (Unix s)."""

    ca_pem: bytes
    old_ca: bytes = b""
    until: float = 0.0

    @classmethod
    def of(cls, ca_pem: bytes, chain: Chain, until: float) -> CaTrust:
        """`until`: from the fleet card. Raises BadMessage."""
        steps = read_chain(chain)
        old = steps[-1].old_ca if steps else b""
        return cls(ca_pem, old, min(until, steps[-1].old_until) if steps else 0.0)

    def verify_certificate(self, data: bytes, now: float) -> NodeCertificate:
        """The node certificate in `data`, if it counts at this time (Unix s). Raises BadMessage."""
        if self.old_ca and now < self.until:
            with contextlib.suppress(BadMessage):
                return certificates.verify_certificate(self.old_ca, data)
        return certificates.verify_certificate(self.ca_pem, data)
