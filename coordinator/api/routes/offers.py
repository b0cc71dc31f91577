"""The task files that operators offer to owners."""

from __future__ import annotations

from coordinator.api.routes.endpoint import Call, get, record
from coordinator.fleet.auth import OPERATOR
from protocols.enrollment.signed_requests import SENDER
from protocols.messages.offers import (
    TASKS_PATH,
    WITHDRAW_PATH,
    Offer,
    OfferRequest,
    WithdrawRequest,
)


def offer(call: Call) -> Offer:
    return call.service.offers.offer(call.read(OfferRequest), *_operator(call))


def withdraw(call: Call) -> None:
    call.service.offers.withdraw(call.read(WithdrawRequest).name, *_operator(call))


def _operator(call: Call) -> tuple[str, str]:
    """The id of the operator who calls, and a name that owners can read."""
    sender = call.request.headers[SENDER]
    known = call.service.registry.operators.get(sender)
    name = known.name if known else call.service.fleet.name
    return sender, name if sender != OPERATOR else f"the operator on {name}"[:64]


ROUTES = (
    get(TASKS_PATH, lambda call: call.service.offers.offers()),
    record(TASKS_PATH, offer),
    record(WITHDRAW_PATH, withdraw),
)
