"""An operator's or observer's access to a fleet from any machine: a key of its own, and a role.

`commonweight ticket create --role observer|operator` makes the ticket, `commonweight monitor
--join` spends it. The key is made here and never leaves; the coordinator decides by its role what
each request may do. On the coordinator's own machine its home is the access.
"""

from __future__ import annotations

import json
import socket
import ssl
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec
from msgspec import Struct

from coordinator.api.schema import STATUS
from coordinator.fleet.auth import OPERATOR
from coordinator.storage.settings import UP_FILE
from protocols import VERSION
from protocols.enrollment import identity, tickets
from protocols.enrollment.identity import SigningKey
from protocols.enrollment.joining import (
    CA_PATH,
    OPERATOR_JOIN_PATH,
    OperatorJoinRequest,
    OperatorJoinResponse,
    operator_join_proof,
)
from protocols.enrollment.tickets import Ticket
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
from protocols.network.error_text import describe_error

ACCESS_FILE = "access.json"
_KEY = "access.key"
_TIMEOUT_S = 10.0


class Access(Struct, frozen=True, kw_only=True):
    """What joining gave: who we are to the fleet, where its coordinator is, and its CA."""

    operator: str
    role: str
    fleet: str
    addresses: tuple[str, ...]
    ca_pem: str


class ConnectionInfo(NamedTuple):
    """How to ask a coordinator: its addresses, its CA, our name and key there, and what we may."""

    addresses: tuple[str, ...]
    ca_pem: str
    sender: str
    key: SigningKey
    role: str


def open_home() -> Path:
    """The coordinator's home on this machine, else that of a joined access.

    Raises NotRunning when there is neither, HomeError.
    """
    if (homes.home_path("coordinator") / homes.STAMP).exists():
        return homes.open_home("coordinator")
    if (homes.home_path("operator") / ACCESS_FILE).exists():
        return homes.open_home("operator")
    raise NotRunning(
        f"there is no coordinator in {homes.home_path('coordinator')}, and no access to another",
        "make one: commonweight init; or join one: commonweight monitor --join file:TICKET",
    )


def connection_info(home: Path) -> ConnectionInfo:
    """The way in from this home. Raises NotRunning (no coordinator is up here), HomeError."""
    if (home / ACCESS_FILE).exists():
        try:
            access = msgspec.json.decode((home / ACCESS_FILE).read_bytes(), type=Access)
        except (OSError, msgspec.DecodeError) as err:
            raise HomeError(
                f"{home / ACCESS_FILE} is damaged: {err}", "join again with a ticket"
            ) from err
        key = identity.load_signing_key(home / _KEY)
        return ConnectionInfo(access.addresses, access.ca_pem, access.operator, key, access.role)
    try:
        address = str(json.loads((home / UP_FILE).read_bytes())["address"])
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise NotRunning(
            f"no coordinator is running over {home}", "start it: commonweight up"
        ) from err
    key = identity.load_signing_key(home / "operator.key")
    return ConnectionInfo((address,), (home / "ca.pem").read_text(), OPERATOR, key, "operator")


def join(text: str, name: str = "") -> Access:
    """Spend a ticket; nothing is sent before the CA has the hash that is in it.

    Raises TicketMalformed, Unreachable, Refused.
    """
    ticket = tickets.decode(text)
    address, ca_pem = _find(ticket)
    home = homes.open_home("operator", create=True)
    key = identity.new_signing_key()
    public = identity.public_bytes(key)
    joining = OperatorJoinRequest(
        ticket=ticket.id,
        secret=ticket.secret,
        name=name or socket.gethostname(),
        sign_public=public,
        proof=key.sign(operator_join_proof(ticket.id, ticket.secret, public)),
        version=VERSION,
    )
    context = ssl.create_default_context(cadata=ca_pem.decode())
    try:
        with httpx.Client(verify=context, timeout=_TIMEOUT_S) as http:
            answer = http.post(
                f"https://{address}{OPERATOR_JOIN_PATH}", content=msgspec.json.encode(joining)
            )
    except httpx.HTTPError as err:
        raise Unreachable(f"{address}: {describe_error(err)}", "try again") from err
    if not answer.is_success:
        raise error_from(answer)
    told = msgspec.json.decode(answer.content, type=OperatorJoinResponse)
    others = tuple(other for other in ticket.addresses if other != address)
    access = Access(
        operator=told.operator,
        role=told.role,
        fleet=told.fleet,
        addresses=(address, *others),
        ca_pem=ca_pem.decode(),
    )
    write_private(home / _KEY, identity.private_pem(key))
    write_private(home / ACCESS_FILE, msgspec.json.encode(access))
    return access


def _find(ticket: Ticket) -> tuple[str, bytes]:
    """The first address that answers, and its CA certificate, checked against the ticket."""
    tried: list[str] = []
    # Not verified on purpose: this first request only fetches the CA, whose hash then decides.
    with httpx.Client(verify=False, timeout=_TIMEOUT_S) as http:
        for address in ticket.addresses:
            try:
                answer = http.get(f"https://{address}{CA_PATH}").raise_for_status()
                genuine = tickets.matches_ca(ticket, identity.ca_fingerprint(answer.content))
            except (httpx.HTTPError, httpx.InvalidURL) as err:
                tried.append(f"{address} ({err or type(err).__name__})")
                continue
            except BadMessage:
                genuine = False
            if not genuine:
                raise Refused(
                    f"{address} is not the coordinator that made this ticket",
                    "somebody else answers there: nothing was sent; ask for a new ticket",
                )
            return address, answer.content
    raise Unreachable(
        f"no coordinator answers: {'; '.join(tried)}",
        "is it up (commonweight up), and can this machine reach it?",
    )


def error_from(answer: httpx.Response) -> CommonweightError:
    """The error in a coordinator's answer, with its own words, code and exit status."""
    try:
        told = msgspec.json.decode(answer.content, type=dict[str, str])
        code, message, hint = told["code"], told["message"], told["hint"]
    except (msgspec.DecodeError, KeyError):
        return Refused(f"the coordinator refused ({answer.status_code})", "commonweight doctor")
    error = CommonweightError(message, hint)
    error.code = code
    by_status = {status: exit_code for exit_code, status in STATUS.items()}
    error.exit_code = by_status.get(answer.status_code, ExitCode.FAILED)
    return error
