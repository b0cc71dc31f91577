"""Access of an operator or observer to a fleet, from any machine.

`commonweight ticket create --role observer|operator` creates a ticket, and `commonweight monitor
--join` uses it. The signing key is created here and never leaves; the coordinator decides by the
role what each request may do. On the coordinator's own machine its home gives access.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
from msgspec import Struct

from coordinator.api.schema import STATUS, WatchResponse
from coordinator.fleet.auth import OPERATOR
from coordinator.storage.settings import UP_FILE
from protocols import VERSION
from protocols.enrollment import fleet_card, identity, joining, tickets
from protocols.enrollment.identity import SigningKey
from protocols.errors import BadMessage, CommonweightError, ExitCode, HomeError, NotRunning, Refused
from protocols.local import homes
from protocols.local.atomic_files import write_private
from protocols.local.join_client import ask_version, find_coordinator, post_join
from protocols.network import addresses

ACCESS_FILE = "access.json"
_KEY = "access.key"


class Access(Struct, frozen=True, kw_only=True):
    """The result of joining: our id and role in the fleet, its coordinator and its CA."""

    operator: str
    role: str
    fleet: str
    addresses: tuple[str, ...]
    ca_pem: str
    card: bytes = b""
    receiver: str = ""


class ConnectionInfo(NamedTuple):
    """The addresses and CA of a coordinator, our id, key and role there, and the card we know.

    `receiver`: the fleet, as requests name it; empty for an older coordinator.
    """

    addresses: tuple[str, ...]
    ca_pem: str
    sender: str
    key: SigningKey
    role: str
    card: bytes = b""
    receiver: str = ""


def open_home() -> Path:
    """The coordinator's home on this machine, or else the home of a joined access.

    Raises NotRunning if there is neither, HomeError.
    """
    if (homes.home_path("coordinator") / homes.STAMP).exists():
        return homes.open_home("coordinator")
    if (homes.home_path("operator") / ACCESS_FILE).exists():
        return homes.open_home("operator")
    raise NotRunning(
        f"there is no coordinator in {homes.home_path('coordinator')}, and no access to another",
        "create one: commonweight init; or join one: commonweight monitor --join file:TICKET",
    )


def connection_info(home: Path, *, is_up: bool = True) -> ConnectionInfo:
    """The connection of this home, without addresses if the coordinator need not be up.

    Raises NotRunning (no coordinator runs here), HomeError.
    """
    if (home / ACCESS_FILE).exists():
        try:
            access = msgspec.json.decode((home / ACCESS_FILE).read_bytes(), type=Access)
        except (OSError, msgspec.DecodeError) as err:
            raise HomeError(
                f"{home / ACCESS_FILE} is damaged: {err}", "join again with a ticket"
            ) from err
        _check_trust(home, access)
        key = identity.load_signing_key(home / _KEY)
        return ConnectionInfo(
            access.addresses,
            access.ca_pem,
            access.operator,
            key,
            access.role,
            access.card,
            access.fleet if access.card else "",
        )
    try:
        up = json.loads((home / UP_FILE).read_bytes()) if is_up else {}
        addresses = (str(up["address"]),) if is_up else ()
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise NotRunning(
            f"no coordinator is running over {home}", "start it: commonweight up"
        ) from err
    key = identity.load_signing_key(home / "operator.key")
    ca_pem = (home / "ca.pem").read_text()
    receiver = identity.fleet_id(ca_pem.encode()) if up.get("signs") else ""
    return ConnectionInfo(addresses, ca_pem, OPERATOR, key, "operator", receiver=receiver)


def join(text: str, name: str = "") -> Access:
    """Join with a ticket. Nothing is sent before the CA matches the hash in the ticket.

    Raises TicketMalformed, Unreachable, Refused.
    """
    ticket = tickets.decode(text)
    address, ca_pem = find_coordinator(ticket)
    home = homes.open_home("operator", create=True)
    key = identity.new_signing_key()
    public = identity.public_bytes(key)
    request = joining.OperatorJoinRequest(
        ticket=ticket.id,
        secret=ticket.secret,
        name=name or socket.gethostname(),
        sign_public=public,
        proof=key.sign(joining.operator_join_proof(ticket.id, ticket.secret, public)),
        version=VERSION,
    )
    joined = post_join(
        address, ca_pem, joining.OPERATOR_JOIN_PATH, request, joining.OperatorJoinResponse
    )
    if not joined.card:
        version = ask_version(address, ca_pem, joined.operator, key.sign) or "an older version"
        raise Refused(
            f"the coordinator runs commonweight {version}, which does not sign its key and broker "
            f"with the fleet's CA; commonweight {VERSION} joins only with this signature",
            "update the coordinator, then create a new ticket",
        )
    try:
        if fleet_card.verify_card(ca_pem, joined.card, at_least=ticket.card).fleet != joined.fleet:
            raise BadMessage(f"fleet {joined.fleet} is not the fleet of this CA")
    except BadMessage as err:
        raise Refused(
            f"the coordinator's answer is not what this fleet's CA signed: {err.message}",
            "nothing was stored. Ask who answers at this address",
        ) from err
    access = Access(
        operator=joined.operator,
        role=joined.role,
        fleet=joined.fleet,
        addresses=tuple(dict.fromkeys((address, *ticket.addresses))),
        ca_pem=ca_pem.decode(),
        card=joined.card,
    )
    write_private(home / _KEY, identity.private_pem(key))
    write_private(home / ACCESS_FILE, msgspec.json.encode(access))
    return access


def _check_trust(home: Path, access: Access) -> None:
    """Raise HomeError unless there is one CA, and the fleet is of this CA."""
    try:
        if identity.fleet_id(access.ca_pem.encode()) != access.fleet:
            raise BadMessage(f"its CA is not that of fleet {access.fleet}")
    except BadMessage as err:
        raise HomeError(
            f"{home / ACCESS_FILE} trusts more than this fleet's CA: {err}",
            "join again with a new ticket",
        ) from err


def check_watch(connection: ConnectionInfo, address: str, watch: WatchResponse) -> WatchResponse:
    """The response with the broker to use, if the CA signed its key and broker. Raises Refused.

    Older coordinators send no card. A monitor that joined one goes on without.
    """
    if not watch.card and not connection.card:
        return watch
    try:
        ca_pem = connection.ca_pem.encode()
        card = fleet_card.verify_card(ca_pem, watch.card, newer_than=connection.card)
        if (watch.fleet, watch.coordinator_public) != (card.fleet, card.coordinator_public):
            raise BadMessage("its signing key is not the one on the card")
        host = addresses.parse(address).host
        mqtt = fleet_card.checked_broker(card, watch.mqtt, host)
    except BadMessage as err:
        raise Refused(
            f"the coordinator's answer is not what this fleet's CA signed: {err.message}",
            "ask who answers at this address",
        ) from err
    return msgspec.structs.replace(watch, mqtt=mqtt)


def error_from(response: httpx.Response) -> CommonweightError:
    """The error in a coordinator's response, with its message, code and exit status."""
    status = response.status_code
    try:
        body = msgspec.json.decode(response.content, type=dict[str, str])
        error = CommonweightError(body["message"], body["hint"])
        error.code = body["code"]
    except (msgspec.DecodeError, KeyError):
        return Refused(f"the coordinator refused ({status})", "commonweight doctor")
    codes = (exit_code for exit_code, known in STATUS.items() if known == status)
    error.exit_code = next(codes, ExitCode.FAILED)
    return error
