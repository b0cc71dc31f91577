"""The task files that operators offer to owners, from the ledger's "fleet" entries.

An offer replaces an earlier one of its name. Owners get a signed list of the present ones.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from coordinator.fleet import fleet_events
from coordinator.fleet.fleet_events import TaskOffered, TaskWithdrawn
from coordinator.storage.ledger import Ledger
from protocols.errors import BadMessage, UnknownName, UsageError
from protocols.messages.envelope import Sign
from protocols.messages.offers import (
    MAX_OFFERS,
    SIGNED_OFFERS,
    Offer,
    OfferList,
    OfferRequest,
    check_text,
)


class TaskOffers:
    """The present offers. `on_change(text)` is called after a change, with a line about it."""

    def __init__(self, ledger: Ledger, fleet: str, sign: Sign) -> None:
        self._ledger, self._fleet, self._sign = ledger, fleet, sign
        #: The number of the list; 0 if nothing was ever offered.
        self.number = 0
        #: By name: each offer, and its file.
        self._present: dict[str, tuple[Offer, bytes]] = {}
        self._signed = b""
        self.on_change: Callable[[str], None] = lambda text: None
        for entry in ledger.entries(fleet_events.SUBJECT):
            self._apply(fleet_events.decode(entry.body))

    def offers(self) -> list[Offer]:
        """The present offers, by name."""
        return sorted((offer for offer, _ in self._present.values()), key=lambda one: one.name)

    def offer(self, request: OfferRequest, operator: str, by: str) -> Offer:
        """Offer a file to all owners. `by`: the operator's name. Raises UsageError."""
        try:
            check_text(request.data)
        except BadMessage as err:
            raise UsageError(err.message, "offer one small Python file") from err
        if request.name not in self._present and len(self._present) >= MAX_OFFERS:
            raise UsageError(
                f"{MAX_OFFERS} tasks are offered already", "commonweight task withdraw NAME"
            )
        made = Offer(
            name=request.name,
            digest=hashlib.sha256(request.data).hexdigest(),
            nbytes=len(request.data),
            at=time.time(),
            by=by,
            note=request.note,
        )
        number = self._next_number()
        self._record(
            TaskOffered(number=number, offer=made, operator=operator, data=request.data),
            f"{by} offers the task {made.name} ({made.id}) to the owners",
        )
        return made

    def withdraw(self, name: str, operator: str, by: str) -> None:
        """Withdraw an offer. Raises UnknownName."""
        if name not in self._present:
            raise UnknownName(f"no task {name!r} is offered", "commonweight task list")
        made, _ = self._present[name]
        number = self._next_number()
        self._record(
            TaskWithdrawn(number=number, name=name, digest=made.digest, operator=operator),
            f"{by} withdrew the offer of the task {name} ({made.id})",
        )

    def signed_list(self) -> bytes:
        """The signed list of all present offers."""
        if not self._signed:
            made = OfferList(fleet=self._fleet, number=self.number, offers=tuple(self.offers()))
            self._signed = SIGNED_OFFERS.pack(made, self._sign)
        return self._signed

    def file(self, digest: str) -> bytes | None:
        """The offered file of this digest; None if none is offered."""
        return next((data for one, data in self._present.values() if one.digest == digest), None)

    def _next_number(self) -> int:
        # The clock keeps it growing when the coordinator is restored from a backup.
        return max(self.number + 1, int(time.time()))

    def _record(self, event: TaskOffered | TaskWithdrawn, text: str) -> None:
        self._ledger.append(fleet_events.SUBJECT, [fleet_events.encode(event)])
        self._apply(event)
        self.on_change(text)

    def _apply(self, event: fleet_events.FleetEvent) -> None:
        match event:
            case TaskOffered(number=number, offer=made, data=data):
                self._present[made.name] = made, data
            case TaskWithdrawn(number=number, name=name):
                self._present.pop(name, None)
            case _:
                return
        self.number, self._signed = number, b""
