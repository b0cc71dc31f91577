"""`commonweight ticket …` and `commonweight peers …`."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from coordinator.cli.common import Json, connect, print_table
from coordinator.remote.durations import parse_seconds
from protocols.errors import UsageError
from protocols.local import json_output

tickets = typer.Typer(help="Join tickets: make, list, revoke.", no_args_is_help=True)
peers = typer.Typer(help="The machines of the fleet.", no_args_is_help=True)
operators = typer.Typer(help="Who watches from other machines.", no_args_is_help=True)

_POLL_S = 0.5


def add_to(app: typer.Typer) -> None:
    app.add_typer(tickets, name="ticket")
    app.add_typer(peers, name="peers")
    app.add_typer(operators, name="operators")


@tickets.command("create")
def create_ticket(
    ttl: Annotated[str, typer.Option(help="How long it is good for.")] = "24h",
    uses: Annotated[int, typer.Option(min=1, help="For how many machines.")] = 1,
    label: Annotated[str, typer.Option(help="A note for yourself.")] = "",
    role: Annotated[
        str, typer.Option(help="agent; or observer, operator: to watch from another machine.")
    ] = "agent",
    code: Annotated[
        bool,
        typer.Option("--code", help="Its short form, for a network that the coordinator is in."),
    ] = False,
    json: Json = False,
) -> None:
    """Make a ticket: the one string that lets a machine join. It is shown once."""
    from coordinator.api.schema import TicketOrder

    if role not in ("agent", "observer", "operator"):
        raise UsageError(f"a role is agent, observer or operator, not {role!r}")
    if code and role != "agent":
        raise UsageError("a short code is for agents only", "leave out --code")
    order = TicketOrder(ttl_s=parse_seconds(ttl), uses=uses, label=label, role=role)  # type: ignore[arg-type]
    made = connect().make_ticket(order)
    if code:
        from protocols.enrollment import tickets as forms

        made = {**made, "ticket": forms.encode_code(forms.decode(made["ticket"]))}
    if json:
        sys.stdout.write(json_output.ok(made) + "\n")
        return
    machines = "one machine" if uses == 1 else f"{uses} machines"
    join = "commonweight-agent join" if role == "agent" else "commonweight monitor --join -"
    sys.stderr.write(f"for {machines}, good for {ttl}; on each: {join}, then paste this line\n")
    sys.stdout.write(made["ticket"] + "\n")


@tickets.command("list")
def list_tickets(json: Json = False) -> None:
    """Tickets and what is left of them (never their secrets)."""
    found = connect().tickets()
    if json:
        sys.stdout.write(json_output.ok(found) + "\n")
        return
    for row in found:
        row["left"] = "revoked" if row["revoked"] else f"{row['uses_left']} uses"
        row["expires"] = f"{row['expires_in_s'] / 3600:.1f} h"
    columns = {
        "id": "Ticket",
        "role": "For",
        "left": "Left",
        "expires": "Expires in",
        "label": "Label",
    }
    print_table(found, columns, "no tickets; make one: commonweight ticket create")


@tickets.command("revoke")
def revoke_ticket(ticket: str) -> None:
    """Make a ticket useless."""
    connect().revoke_ticket(ticket)
    sys.stderr.write(f"ticket {ticket} is revoked\n")


@operators.command("list")
def list_operators(json: Json = False) -> None:
    """Who has access from another machine, and with what role."""
    found = connect().operators()
    if json:
        sys.stdout.write(json_output.ok(found) + "\n")
        return
    columns = {"name": "Name", "operator": "Id", "role": "Role"}
    print_table(found, columns, "nobody; make a ticket: commonweight ticket create --role observer")


@operators.command("remove")
def remove_operator(operator: str) -> None:
    """Refuse somebody's access from now on (id or name)."""
    connect().remove_operator(operator)
    sys.stderr.write(f"{operator} has no access any more\n")


@peers.command("list")
def list_peers(json: Json = False) -> None:
    """Every machine that has joined."""
    found = connect().peers()
    if json:
        sys.stdout.write(json_output.ok(found) + "\n")
        return
    columns = {"name": "Name", "peer": "Id", "standing": "Standing"}
    print_table(found, columns, "no peers yet; on each machine: commonweight-agent join TICKET")


@peers.command("approve")
def approve(peer: str) -> None:
    """Let a machine in that awaits approval (id or name)."""
    connect().approve(peer)
    sys.stderr.write(f"{peer} is approved\n")


@peers.command("remove")
def remove(peer: str) -> None:
    """Shut a machine out for good (id or name); it can join again only with a new key."""
    connect().remove(peer)
    sys.stderr.write(f"{peer} is removed\n")


@peers.command("drain")
def drain(
    peer: str,
    deadline: Annotated[str, typer.Option(help="How long to wait for it.")] = "10m",
) -> None:
    """Ask a machine to end its round and stop (id or name), and wait until it has."""
    import time

    from coordinator.fleet import reducer as fleets
    from protocols.errors import CommonweightError, UnknownName
    from protocols.messages.envelope import Command
    from protocols.messages.states import PeerState, label

    remote = connect()
    until = time.monotonic() + parse_seconds(deadline)
    asked = False
    while True:
        fleet = remote.fleet()
        found = [one for one in fleet.peers.values() if peer in (one.peer, one.name)]
        if not found:
            raise UnknownName(f"no peer {peer!r}", "commonweight peers list")
        state = fleets.shown_state(found[0], fleet.at)
        idle = {PeerState.OFFLINE, PeerState.AWAITING} | ({PeerState.PAUSED} if asked else set())
        if state in idle:
            sys.stderr.write(f"{peer} has no work any more: {label(state, found[0].reason)}\n")
            return
        if not asked:
            sys.stderr.write(remote.command(peer, Command(action="finish")) + "\n")
            asked = True
        if time.monotonic() > until:
            raise CommonweightError(
                f"after {deadline} {peer} is still {label(state, found[0].reason)}",
                f"wait longer, or give up its round: commonweight peers pause {peer}",
            )
        time.sleep(_POLL_S)


@peers.command("pause")
def pause(
    peer: str,
    duration: Annotated[str, typer.Option("--for", help="For how long; else until resume.")] = "0",
) -> None:
    """Ask a machine to pause (id or name)."""
    _command(peer, "pause", parse_seconds(duration))


@peers.command("resume")
def resume(peer: str) -> None:
    """Ask a machine to work again (id or name)."""
    _command(peer, "resume", 0.0)


def _command(peer: str, action: Any, for_s: float) -> None:
    from protocols.messages.envelope import Command

    outcome = connect().command(peer, Command(action=action, for_s=for_s))
    sys.stderr.write(outcome + "\n")
