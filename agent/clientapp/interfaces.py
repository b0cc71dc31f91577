"""What the ClientApp needs from the rest of the agent: a peer, a trainer, a transport, an observer.

The daemon implements these with its link and its event loop; tests and benchmarks do it in a few
lines.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flwr.app import ConfigRecord, Message, RecordDict

from protocols.enrollment import identity
from protocols.errors import BadMessage, Refused
from protocols.messages import envelope
from protocols.messages.app_work import RECORD
from protocols.messages.jobs import Score
from protocols.messages.work import SIGNED_CLAIM, UpdateClaim, Work


class PeerIdentity(NamedTuple):
    """This peer's identity and the coordinator's.

    `sign` makes the Ed25519 signature of this peer; `coordinator_public` is the coordinator's
    Ed25519 key (raw, 32 bytes). `fleet`: the id of the fleet, which claims name.
    """

    peer: str
    sign: envelope.Sign
    coordinator_public: bytes
    fleet: str = ""

    def is_coordinators(self, signature: bytes, signed: bytes) -> bool:
        """True if the coordinator signed these bytes."""
        return identity.verify(self.coordinator_public, signature, signed)

    def sign_claim(self, work: Work, **fields: Any) -> tuple[bytes, bytes]:
        """Returns a claim about the result of this work, encoded, and its signature."""
        claim = UpdateClaim(
            run=work.run,
            round=work.round,
            kind=work.kind,
            turn=work.turn,
            peer=self.peer,
            base=work.base,
            nonce=secrets.token_hex(12),
            fleet=self.fleet,
            **fields,
        )
        return SIGNED_CLAIM.seal(claim, self.sign)


#: See `Transport.check_log`.
CheckLog = Callable[[Work, bytes, bytes], None]


class Transport(Protocol):
    """Moves weights by digest, and knows the log of versions. Blocking."""

    def fetch(self, work: Work) -> Path:
        """The file of the version `work.base`, downloaded or patched if it is not here. Raises
        Unreachable."""
        ...

    def send(self, digest: str, path: Path) -> None:
        """Upload the bytes of an update. Raises Unreachable."""
        ...

    def check_log(self, work: Work, head: bytes, page: bytes) -> None:
        """Raise LogConflict if the log of versions does not have the version of the work.

        `head`: the signed head of the log; `page`: the entries before it. Both are empty from older
        coordinators. A transport without a log checks nothing.
        """
        return


class Observer:
    """Callbacks during work, on the work thread. Override those you need."""

    def on_work(self, work: Work | None) -> None:
        """Work has begun, or ended (None)."""

    def on_ahead(self, work: Work | None) -> None:
        """Training for a round that was not asked for yet has begun in the background, or ended
        (None). Not on the work thread."""

    def on_version(self, work: Work, payload: bytes, signature: bytes) -> None:
        """The version of this signed work is in the cache."""

    def on_evaluated(self, work: Work, score: Score) -> None:
        """The metrics of an evaluation are about to be sent. If this raises, nothing is sent."""

    def on_leaving(self, claim: UpdateClaim, task: str, description: bytes) -> None:
        """An answer is about to be sent. If this raises, nothing is sent."""

    def on_sending(self) -> None:
        """The upload of an update begins. A small one travels with its reply instead."""

    def on_sum(self, is_open: bool) -> None:
        """A secure sum waits for this peer's steps, or (False) for none any more."""

    def on_time(self, work: Work, seconds: float) -> None:
        """The training of this work took so long."""

    def on_trained(self) -> None:
        """A trained update is on disk: the trainer's journal is no longer needed."""


def signed_payload(message: Message, record: str, name: str) -> tuple[bytes, bytes]:
    """Returns signed bytes of a message and their signature. Raises BadMessage."""
    config = message.content.get(record)
    if not isinstance(config, ConfigRecord):
        raise BadMessage(f"a message without a {record}")
    payload, signature = config.get(name), config.get("signature")
    if not isinstance(payload, bytes) or not isinstance(signature, bytes):
        raise BadMessage(f"a message without a signed {name}")
    return payload, signature


def refuse(_: object) -> RecordDict:
    """Refuses a request that this peer does not support."""
    raise Refused("this agent does not support such requests")


class Queries(NamedTuple):
    """Handlers for requests other than training; each returns the content of the reply.

    `recall` answers a coordinator that has lost its disk, `job` one unit of a job, `app` a message
    for a Flower app.
    """

    recall: Callable[[Work], RecordDict] = refuse
    job: Callable[[Message], RecordDict] = refuse
    app: Callable[[Message], RecordDict] = refuse

    def answer(self, message: Message) -> RecordDict:
        """The answer to a unit of a job, or to a message for an app."""
        return self.app(message) if RECORD in message.content else self.job(message)
