"""`commonweight ticket …`, `commonweight peers …` and `commonweight admin operators …`."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from coordinator.cli.common import (
    Columns,
    Json,
    Yes,
    confirm,
    connect,
    print_json,
    print_line,
    print_list,
)
from coordinator.cli.names import PeerName, TicketName
from protocols.errors import CommonweightError, UnknownName, UsageError
from protocols.local.command_line import App
from protocols.local.durations import parse_seconds

tickets = App(help="Create, list and revoke tickets that let machines join.")
peers = App(help="List, approve, pause, drain and remove machines.")
operators = App(help="List and remove access from other machines.")

_POLL_S = 0.5
#: After a restart of the coordinator, agents connect again within this time.
_SETTLE_S = 45.0


def add_to(app: typer.Typer) -> None:
    app.add_typer(tickets, name="ticket")
    app.add_typer(peers, name="peers")


def add_operators_to(app: typer.Typer) -> None:
    app.add_typer(operators, name="operators")


@tickets.command("create")
def create_ticket(
    ttl: Annotated[str, typer.Option(help="How long the ticket is valid.")] = "24h",
    uses: Annotated[int, typer.Option(min=1, help="How many machines may use it.")] = 1,
    label: Annotated[str, typer.Option(help="A note for yourself.")] = "",
    role: Annotated[
        str, typer.Option(help="agent; or observer, operator: to watch from another machine.")
    ] = "agent",
    code: Annotated[
        bool,
        typer.Option("--code", help="A short code, for machines in the coordinator's network."),
    ] = False,
    json: Json = False,
) -> None:
    """Create a ticket: the string with which a machine joins. It is shown only once."""
    from coordinator.api.schema import TicketRequest
    from protocols.enrollment import tickets as formats

    if role not in ("agent", "observer", "operator"):
        raise UsageError(f"a role is agent, observer or operator, not {role!r}")
    if code and role != "agent":
        raise UsageError("a short code is for agents only", "leave out --code")
    order = TicketRequest(ttl_s=parse_seconds(ttl), uses=uses, label=label, role=role)  # type: ignore[arg-type]
    created = connect().make_ticket(order)
    if code:
        created["ticket"] = formats.encode_code(formats.decode(created["ticket"]))
    if json:
        print_json(created)
        return
    machines = "one machine" if uses == 1 else f"{uses} machines"
    join = "commonweight-agent join" if role == "agent" else "commonweight monitor --join -"
    print_line(f"for {machines}, valid for {ttl}; run {join} on each, then paste this line")
    sys.stdout.write(created["ticket"] + "\n")


@tickets.command("list")
def list_tickets(json: Json = False) -> None:
    """List the tickets and their uses left. Secrets are never shown."""
    columns: Columns[dict[str, Any]] = {
        "Ticket": "id",
        "For": "role",
        "Left": lambda row: "revoked" if row["revoked"] else f"{row['uses_left']} uses",
        "Expires in": lambda row: f"{row['expires_in_s'] / 3600:.1f} h",
        "Label": "label",
    }
    empty = "no tickets; create one: commonweight ticket create"
    print_list(connect().tickets(), columns, empty, json=json)


@tickets.command("revoke")
def revoke_ticket(ticket: TicketName) -> None:
    """Revoke a ticket: nobody can join with it any more."""
    connect().revoke_ticket(ticket)
    print_line(f"ticket {ticket} is revoked")


@operators.command("list")
def list_operators(json: Json = False) -> None:
    """List who has access from another machine, and with which role."""
    columns = {"Name": "name", "Id": "operator", "Role": "role"}
    empty = "nobody; create a ticket: commonweight ticket create --role observer"
    print_list(connect().operators(), columns, empty, json=json)


@operators.command("remove")
def remove_operator(
    operator: Annotated[str, typer.Argument(help="An operator's name or id.")],
) -> None:
    """Withdraw the access of an operator or observer."""
    connect().remove_operator(operator)
    print_line(f"{operator} has no access any more")


@peers.command("list")
def list_peers(json: Json = False) -> None:
    """List every machine that has joined."""
    columns: Columns[dict[str, Any]] = {
        "Name": "name",
        "Id": "peer",
        "Standing": "standing",
        "State": _state_text,
    }
    empty = "no peers yet; on each machine: commonweight-agent join TICKET"
    print_list(connect().peers(), columns, empty, json=json)


def _state_text(row: dict[str, Any]) -> str:
    from coordinator.fleet.readings import SHORT_REASONS
    from protocols.messages.states import PeerState, label

    if not row.get("state"):  # a removed peer, or an older coordinator
        return ""
    return label(PeerState(row["state"]), SHORT_REASONS.get(row["reason"], row["reason"]))


@peers.command("approve")
def approve(peer: PeerName) -> None:
    """Approve a machine that waits for approval."""
    connect().approve(peer)
    print_line(f"{peer} is approved")


@peers.command("remove")
def remove(peer: PeerName, yes: Yes = False) -> None:
    """Remove a machine permanently. It can join again only with a new key."""
    if not yes:
        command = f"commonweight peers remove {peer}"
        confirm(f"remove {peer} permanently?", "nothing was removed", command)
    connect().remove(peer)
    print_line(f"{peer} is removed")


@peers.command("drain")
def drain(
    peer: PeerName,
    deadline: Annotated[str, typer.Option(help="How long to wait for it.")] = "10m",
) -> None:
    """Ask a machine to finish its round and stop. Waits until it has."""
    from coordinator.fleet.readings import describe_state, is_unclear, shown_state
    from protocols.messages.states import PeerState

    remote, began, sent = connect(), time.monotonic(), False
    until = began + parse_seconds(deadline)
    while True:
        fleet = remote.fleet()
        found = next((p for p in fleet.peers.values() if peer in (p.peer, p.name)), None)
        if found is None:
            raise UnknownName(f"no peer {peer!r}", "commonweight peers list")
        state = shown_state(found, fleet.at)
        settled = not is_unclear(found) or time.monotonic() > began + _SETTLE_S
        if state is PeerState.AWAITING or (state is PeerState.OFFLINE and settled):
            print_line(f"{peer} has no work any more: {describe_state(found, fleet.at)}")
            return
        may_send = state is not PeerState.OFFLINE and (settled or not fleet.links.mqtt)
        if may_send and not sent:
            _command(peer, "finish")
            sent = True
        if time.monotonic() > until:
            raise CommonweightError(
                f"after {deadline} {peer} is still {describe_state(found, fleet.at)}",
                f"wait longer, or give up its round: commonweight peers pause {peer}",
            )
        time.sleep(_POLL_S)


@peers.command("pause")
def pause(
    peer: PeerName,
    duration: Annotated[str, typer.Option("--for", help="For how long; else until resume.")] = "0",
) -> None:
    """Ask a machine to pause."""
    _command(peer, "pause", parse_seconds(duration))


@peers.command("resume")
def resume(peer: PeerName) -> None:
    """Ask a machine to work again."""
    _command(peer, "resume")


def _command(peer: str, action: Any, for_s: float = 0.0) -> None:
    from protocols.messages.envelope import Command

    print_line(connect().command(peer, Command(action=action, for_s=for_s)))
