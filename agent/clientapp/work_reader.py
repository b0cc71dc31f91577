"""Reads the work in a message, and refuses what the coordinator has not signed or the owner has not
allowed."""

from __future__ import annotations

from typing import NamedTuple, cast

from flwr.app import ConfigRecord, Message

from agent.clientapp import consent, secure_rules
from agent.clientapp.interfaces import CheckLog, PeerIdentity, signed_payload
from agent.clientapp.owner_rules import OwnerRules
from agent.tasks import floors as owner_floors
from protocols.codecs import registry
from protocols.errors import BadMessage
from protocols.messages.fleet_names import FleetNames
from protocols.messages.work import SIGNED_WORK, Work


class SignedRequest(NamedTuple):
    """The work, its bytes, and the coordinator's signature over them."""

    work: Work
    payload: bytes
    signature: bytes


class WorkReader:
    """Reads work that the coordinator has signed and `owner` allows. `check_log`: as in
    `Transport`."""

    def __init__(self, me: PeerIdentity, owner: OwnerRules, check_log: CheckLog) -> None:
        self._me, self._owner, self._check_log = me, owner, check_log
        self._fleet_names = FleetNames(me.fleet)

    def read(self, message: Message) -> SignedRequest:
        """The work, if it may be done. Raises CommonweightError."""
        payload, signature = signed_payload(message, "config", "work")
        work = SIGNED_WORK.open(payload, signature, self._me.is_coordinators)
        self._fleet_names.check("coordinator", work.fleet)
        chosen = self._owner.settings()
        consent.check(chosen, work.run, work.task, work.settings)
        secure_rules.check(work, chosen)
        self._owner.budget.check(work)
        if work.kind in ("describe", "train"):
            owner_floors.check_cohort(work.cohort, self._owner.floors)
        config = cast(ConfigRecord, message.content["config"])  # `signed_payload` has read it
        head, page = config.get("head", b""), config.get("log", b"")
        if not isinstance(head, bytes) or not isinstance(page, bytes):
            raise BadMessage("a message whose log of versions is not bytes")
        self._check_log(work, head, page)
        if work.kind == "train" and not secure_rules.is_secure(work):
            registry.parse_in_work(work.codec)  # fail before an hour of training, not after
        return SignedRequest(work, payload, signature)

    def columns(self, work: Work) -> tuple[str, ...]:
        """Patterns of the columns that its owner lets the task use now."""
        return self._owner.settings().columns_of(work.task)

    def check_consent(self, work: Work, used: tuple[str, ...] = ()) -> None:
        """Raise what `consent.check` does, and `check_used` for work that was done with the columns
        `used`. The owner may withdraw a consent at any time."""
        chosen = self._owner.settings()
        consent.check(chosen, work.run, work.task, work.settings)
        consent.check_used(chosen, work.task, used)
