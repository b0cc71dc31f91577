"""Access of an operator or observer to a fleet, from any machine.

`commonweight ticket create --role observer|operator` creates a ticket, and `commonweight monitor
--join` uses it. The signing key is created here and never leaves; the coordinator decides by the
role what each request may do. On the coordinator's own machine its home gives access.
"""

from __future__ import annotations

import json
import math
import socket
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
from msgspec import Struct

from coordinator.api.schema import STATUS, ErrorResponse, WatchResponse
from coordinator.fleet.auth import OPERATOR
from coordinator.storage import ca_files, ledger_place
from coordinator.storage.settings import UP_FILE
from protocols import VERSION
from protocols.enrollment import ca_chain, fleet_card, identity, joining, tickets
from protocols.enrollment.ca_chain import CaTrust, ChainResponse
from protocols.enrollment.identity import SigningKey
from protocols.errors import (
    BadMessage,
    CommonweightError,
    ExitCode,
    HomeError,
    NotRunning,
    Refused,
    Unreachable,
)
from protocols.local import homes
from protocols.local.atomic_files import write_private
from protocols.local.join_client import (
    find_coordinator,
    find_new_ca,
    old_coordinator,
    post_join,
)
from protocols.messages.decoding import MALFORMED
from protocols.network import addresses

ACCESS_FILE = "access.json"
_KEY = "access.key"


class Access(Struct, frozen=True, kw_only=True):
    """Our id and role in a fleet, its coordinator and its CA: the result of joining.

    `card`: of the fleet, as we know it. `transitions`: from the CA that gave the fleet its id to
    `ca_pem`.
    """

    operator: str
    role: str
    fleet: str
    addresses: tuple[str, ...]
    ca_pem: str
    card: bytes = b""
    transitions: tuple[bytes, ...] = ()


class ConnectionInfo(NamedTuple):
    """An access and its key. `receiver`: the fleet, as requests name it; empty for an older
    coordinator."""

    access: Access
    key: SigningKey
    receiver: str = ""


def open_home(home: Path | None = None) -> Path:
    """The coordinator's home on this machine, or else the home of a joined access; or this one.

    Raises NotRunning if there is neither, HomeError.
    """
    if home is not None:
        is_joined = (home / ACCESS_FILE).exists()
        return homes.open_home("operator" if is_joined else "coordinator", at=home)
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
        access = _read_access(home)
        key = identity.load_signing_key(home / _KEY)
        return ConnectionInfo(access, key, access.fleet if access.card else "")
    try:
        up = json.loads((home / UP_FILE).read_bytes()) if is_up else {}
        addresses = (str(up["address"]),) if is_up else ()
    except (OSError, ValueError, KeyError, TypeError) as err:
        hint = "start it: commonweight up"
        if ledger_place.address_of(home):
            hint += "; if a replica waits here, use the machine of the one that leads"
        raise NotRunning(f"no coordinator is running over {home}", hint) from err
    key = identity.load_signing_key(home / "operator.key")
    ca_pem, chain = ca_files.read_public(home)
    access = Access(
        operator=OPERATOR,
        role="operator",
        fleet=ca_chain.fleet_of(ca_pem, chain),
        addresses=addresses,
        ca_pem=ca_pem.decode(),
        transitions=chain,
    )
    return ConnectionInfo(access, key, str(up.get("fleet", "")))


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
        follows_ca=True,
    )
    joined = post_join(
        address, ca_pem, joining.OPERATOR_JOIN_PATH, request, joining.OperatorJoinResponse
    )
    if not joined.card:
        again = "update the coordinator, then create a new ticket"
        raise old_coordinator(address, ca_pem, joined.operator, key.sign, again)
    try:
        fleet = ca_chain.fleet_of(ca_pem, joined.transitions)
        fleet_card.verify_card(ca_pem, joined.card, fleet=fleet, at_least=ticket.card)
        if joined.fleet != fleet:
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
        transitions=joined.transitions,
    )
    write_private(home / _KEY, identity.private_pem(key))
    write_private(home / ACCESS_FILE, msgspec.json.encode(access))
    return access


def _check_trust(home: Path, access: Access) -> None:
    """Raise HomeError unless there is one CA, and the fleet is of this CA."""
    try:
        if ca_chain.fleet_of(access.ca_pem.encode(), access.transitions) != access.fleet:
            raise BadMessage(f"its CA is not that of fleet {access.fleet}")
    except BadMessage as err:
        raise HomeError(
            f"{home / ACCESS_FILE} trusts more than this fleet's CA: {err}",
            "join again with a new ticket",
        ) from err


def follow_ca(home: Path) -> bool:
    """Trust the newest CA of the fleet, if the one trusted here leads to it at any address; False
    if not.

    Raises Refused if servers show only transitions that do not begin with this CA.
    """
    if not (home / ACCESS_FILE).exists():  # the coordinator's own home
        return False
    access = _read_access(home)
    changed = find_new_ca(access.addresses, access, partial(_with_new_ca, access))
    if changed == access:
        return False
    write_private(home / ACCESS_FILE, msgspec.json.encode(changed))
    return True


def _with_new_ca(access: Access, told: ChainResponse) -> Access:
    """The access with the newest CA; the same if there is no newer one. Raises BadMessage."""
    old = access.ca_pem.encode()
    ca_pem = ca_chain.follow(old, access.transitions, told.transitions)
    if ca_pem == old:
        return access
    ca_chain.first_card(ca_pem, told.card, old, access.card, access.fleet)
    return msgspec.structs.replace(
        access, ca_pem=ca_pem.decode(), card=told.card, transitions=told.transitions
    )


def _read_access(home: Path) -> Access:
    """The access in this home. Raises HomeError."""
    try:
        access = msgspec.json.decode((home / ACCESS_FILE).read_bytes(), type=Access)
    except (OSError, msgspec.DecodeError) as err:
        raise HomeError(
            f"{home / ACCESS_FILE} is damaged: {err}", "join again with a ticket"
        ) from err
    _check_trust(home, access)
    return access


def trusted_cas(access: Access) -> CaTrust:
    """The CAs whose node certificates count. Raises BadMessage."""
    # Without the present card, the period of the transition counts in full.
    return CaTrust.of(access.ca_pem.encode(), access.transitions, math.inf)


def check_watch(access: Access, address: str, watch: WatchResponse) -> WatchResponse:
    """The response with the broker to use, if the CA signed its key and broker. Raises Refused.

    Older coordinators send no card. A monitor that joined one works without.
    """
    if not watch.card and not access.card:
        return watch
    try:
        ca_pem = access.ca_pem.encode()
        card = fleet_card.verify_card(
            ca_pem, watch.card, fleet=access.fleet, newer_than=access.card
        )
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
    """The error in a coordinator's response, with its class, message, code and exit status.

    It is never Unreachable, as the coordinator has answered.
    """
    status = response.status_code
    try:
        body = msgspec.json.decode(response.content, type=ErrorResponse)
        kind = _class_of(body.code)
        error = (CommonweightError if issubclass(kind, Unreachable) else kind)(
            body.message, body.hint
        )
        error.code = body.code
    except MALFORMED:
        if status == 404:
            return Refused(
                "the coordinator does not know this request", "it may be older: update it"
            )
        return Refused(f"the coordinator refused ({status})", "commonweight doctor")
    codes = (exit_code for exit_code, known in STATUS.items() if known == status)
    error.exit_code = next(codes, ExitCode.FAILED)
    return error


def _class_of(code: str) -> type[CommonweightError]:
    """The class with this code; the base if there is none, or its errors take other arguments."""
    kinds = [CommonweightError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    found = (k for k in kinds if k.code == code and k.__init__ is CommonweightError.__init__)
    return next(found, CommonweightError)
