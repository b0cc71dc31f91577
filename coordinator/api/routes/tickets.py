"""Join tickets, and the operators and observers who joined with one."""

from __future__ import annotations

import time

from coordinator.api.routes.endpoint import Call, get, record
from coordinator.api.schema import OperatorRow, TicketRequest, TicketRow
from protocols.enrollment import fleet_card, tickets
from protocols.errors import UsageError


def make_ticket(call: Call) -> dict[str, str]:
    order = call.read(TicketRequest)
    if not 0 < order.ttl_s <= 366 * 86400 or not 0 < order.uses <= 100_000:
        raise UsageError("a ticket is valid for at most a year and 100,000 machines")
    ours = call.service.identity
    card = fleet_card.verify_card(ours.ca_pem, call.service.fleet_card(), fleet=ours.fleet)
    ticket = tickets.new_ticket(call.service.addresses(), ours.ca_sha256, card.counter)
    call.service.registry.create_ticket(
        ticket, ttl_s=order.ttl_s, uses=order.uses, label=order.label, role=order.role
    )
    return {"ticket": tickets.encode(ticket), "id": ticket.id}


def list_tickets(call: Call) -> list[TicketRow]:
    return [
        TicketRow(
            id=ticket.id,
            label=ticket.label,
            role=ticket.role,
            uses_left=ticket.uses_left,
            expires_in_s=ticket.expires_at - time.time(),
            revoked=ticket.revoked,
        )
        for ticket in call.service.registry.tickets.values()
    ]


def list_operators(call: Call) -> list[OperatorRow]:
    return [
        OperatorRow(operator=operator.operator, name=operator.name, role=operator.role)
        for operator in call.service.registry.operators.values()
        if not operator.removed
    ]


ROUTES = (
    get("/cw/v1/tickets", list_tickets),
    record("/cw/v1/tickets", make_ticket),
    record(
        "/cw/v1/tickets/{ticket}/revoke",
        lambda call: call.service.registry.revoke_ticket(call.param("ticket")),
    ),
    get("/cw/v1/operators", list_operators),
    record(
        "/cw/v1/operators/{operator}/remove",
        lambda call: call.service.registry.remove_operator(call.param("operator")),
    ),
)
