"""Joins a fleet, and leaves it.

Nothing is sent before the server's CA has the hash in the ticket. Only public keys leave the
machine.
"""

from __future__ import annotations

import contextlib
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec

from agent.home import status_files
from agent.home.settings import ENROLLMENT_FILE, Enrollment, write_enrollment
from agent.transport.p2p.gossip import FILE as NEIGHBOURS
from agent.transport.p2p.sharing import CERTIFICATE
from protocols import VERSION
from protocols.enrollment import identity, tickets
from protocols.enrollment.joining import CA_PATH, JOIN_PATH, JoinRequest, JoinResponse, join_proof
from protocols.enrollment.tickets import Ticket
from protocols.errors import (
    BadMessage,
    CommonweightError,
    HomeError,
    HomeLocked,
    Refused,
    Unreachable,
)
from protocols.local import homes
from protocols.local.atomic_files import write_private
from protocols.messages.mqtt import MqttAddress
from protocols.network import addresses
from protocols.network.error_text import describe_error

_TIMEOUT_S = 10.0
_MAX_CA_BYTES = 64 * 1024
_KEY_FILES = ("sign.key", "node.key")
_NEW_SUFFIX = ".new"


def join(
    home: Path,
    text: str,
    *,
    name: str,
    labels: dict[str, str],
    replace: bool = False,
) -> tuple[Enrollment, bool]:
    """Join with a ticket or code. Returns the enrollment, and whether it still awaits approval.

    With `replace`, the old enrollment stays until the coordinator has accepted the new one. Raises
    TicketMalformed, Unreachable, Refused; HomeError if this home has joined a fleet already, and
    HomeLocked while its agent runs.
    """
    ticket = tickets.decode(text)
    if (home / ENROLLMENT_FILE).exists() and not replace:
        raise HomeError(
            f"{home} has joined a fleet already",
            "use --replace to join again with a new key, or set COMMONWEIGHT_AGENT_HOME",
        )
    with lock_home(home):
        return _join(home, ticket, name=name, labels=labels, replace=replace)


@contextlib.contextmanager
def lock_home(home: Path) -> Iterator[None]:
    """Lock the home, as a running agent would overwrite a new enrollment with its old one.

    Raises HomeLocked.
    """
    try:
        held = homes.lock_home(home, "agent")
    except HomeLocked as err:
        raise HomeLocked(
            f"the agent of {home} is running",
            "stop it first: commonweight-agent finish, or commonweight-agent service stop",
        ) from err
    try:
        yield
    finally:
        held.release()


def _join(
    home: Path, ticket: Ticket, *, name: str, labels: dict[str, str], replace: bool
) -> tuple[Enrollment, bool]:
    announced = not ticket.addresses
    if announced:
        from agent.setup import discovery

        ticket = discovery.resolve_code(ticket, discovery.discover())
    address, ca_pem = _find_coordinator(ticket)
    sign_key, node_key = _load_or_create_keys(home, _NEW_SUFFIX if replace else "")
    joining = JoinRequest(
        ticket=ticket.id,
        secret=ticket.secret,
        name=name,
        labels=labels,
        sign_public=identity.public_bytes(sign_key),
        node_public=identity.node_public_pem(node_key),
        proof=sign_key.sign(
            join_proof(ticket.id, ticket.secret, identity.node_public_pem(node_key))
        ),
        version=VERSION,
    )
    answer = _post_join(address, ca_pem, joining)
    certificate = identity.verify_certificate(ca_pem, answer.certificate)
    if certificate.sign_public != joining.sign_public:
        raise Refused("the coordinator's certificate is for another key")
    # Other announced addresses are not kept, as they may be forged.
    others = () if announced else tuple(other for other in ticket.addresses if other != address)
    enrollment = Enrollment(
        peer=answer.peer,
        name=answer.name,
        fleet=answer.fleet,
        addresses=(address, *others),
        ca_pem=ca_pem.decode(),
        certificate=answer.certificate,
        coordinator_public=answer.coordinator_public,
        mqtt=_with_host(answer.mqtt, address),
    )
    if replace:
        _delete_identity(home)
        for file in _KEY_FILES:
            (home / (file + _NEW_SUFFIX)).replace(home / file)
        shutil.rmtree(home / "outbox", ignore_errors=True)  # answers of the old identity
    write_enrollment(home, enrollment)
    return enrollment, answer.awaiting


def leave(home: Path, enrollment: Enrollment, *, offline: bool = False) -> None:
    """Revoke our key at the coordinator, unless `offline`; then delete what joining created.

    Raises Unreachable or Refused, and deletes nothing then.
    """
    if not offline:
        from agent.home.credentials import Credentials
        from agent.transport.coordinator_client import CoordinatorClient

        link = CoordinatorClient(Credentials.load(home, enrollment))
        hint = "leave without the coordinator: commonweight-agent leave --yes --offline"
        try:
            link.leave()
        except Unreachable as err:
            raise Unreachable(err.message, hint) from err
        except Refused as err:
            raise Refused(
                f"the coordinator does not know this peer, or a clock is wrong ({err.message})",
                hint,
            ) from err
        finally:
            link.close()
    _delete_identity(home)
    for file in _KEY_FILES:
        (home / (file + _NEW_SUFFIX)).unlink(missing_ok=True)
    for folder in ("cache", "outbox"):
        shutil.rmtree(home / folder, ignore_errors=True)


def _delete_identity(home: Path) -> None:
    """Delete the enrollment first, as no agent starts without it; then keys and certificates."""
    for file in (ENROLLMENT_FILE, *_KEY_FILES, status_files.STATUS_FILE, NEIGHBOURS, CERTIFICATE):
        (home / file).unlink(missing_ok=True)


def _load_or_create_keys(home: Path, suffix: str) -> tuple[identity.SigningKey, identity.NodeKey]:
    """This machine's keys. They are saved before joining, so that a retry uses the same keys."""
    sign, node = (home / (file + suffix) for file in _KEY_FILES)
    if not sign.exists():
        write_private(sign, identity.private_pem(identity.new_signing_key()))
    if not node.exists():
        write_private(node, identity.private_pem(identity.new_node_key()))
    return identity.load_signing_key(sign), identity.load_node_key(node)


def _find_coordinator(ticket: Ticket) -> tuple[str, bytes]:
    """The first address that answers, and its CA certificate, checked against the ticket."""
    failed: list[str] = []
    strangers: list[str] = []
    # TLS is not verified here on purpose: this request only fetches the CA to compare its hash.
    with httpx.Client(verify=False, timeout=_TIMEOUT_S) as http:
        for address in ticket.addresses:
            try:
                ca_pem = _fetch_ca(http, address)
            except (httpx.HTTPError, httpx.InvalidURL) as err:
                failed.append(f"{address} ({err or type(err).__name__})")
                continue
            with contextlib.suppress(BadMessage):  # not a certificate
                if tickets.matches_ca(ticket, identity.ca_fingerprint(ca_pem)):
                    return address, ca_pem
            strangers.append(address)
    if strangers:
        raise Refused(
            f"{', '.join(strangers)} is not the coordinator that made this ticket",
            "another server answers there and nothing was sent to it; ask for a new ticket",
        )
    raise Unreachable(
        f"no coordinator answers: {'; '.join(failed)}",
        "is it up (commonweight up), and can this machine reach it?",
    )


def _fetch_ca(http: httpx.Client, address: str) -> bytes:
    """The CA certificate of a server, cut after `_MAX_CA_BYTES`. Raises httpx.HTTPError."""
    ca_pem = bytearray()
    with http.stream("GET", f"https://{address}{CA_PATH}") as answer:
        answer.raise_for_status()
        for piece in answer.iter_raw():
            ca_pem += piece
            if len(ca_pem) > _MAX_CA_BYTES:
                break
    return bytes(ca_pem)


def _post_join(address: str, ca_pem: bytes, joining: JoinRequest) -> JoinResponse:
    context = ssl.create_default_context(cadata=ca_pem.decode())
    try:
        with httpx.Client(verify=context, timeout=_TIMEOUT_S) as http:
            answer = http.post(
                f"https://{address}{JOIN_PATH}", content=msgspec.json.encode(joining)
            )
    except httpx.HTTPError as err:
        raise Unreachable(f"{address}: {describe_error(err)}", "try again") from err
    if answer.status_code != 200:
        raise _refusal_error(answer)
    try:
        return msgspec.json.decode(answer.content, type=JoinResponse)
    except msgspec.DecodeError as err:
        raise Refused(f"the coordinator's answer cannot be decoded: {err}") from err


def _refusal_error(answer: httpx.Response) -> CommonweightError:
    try:
        error = msgspec.json.decode(answer.content, type=dict[str, str])
        return Refused(error["message"], error.get("hint", ""))
    except (msgspec.DecodeError, KeyError):
        return Refused(f"the coordinator refused ({answer.status_code})", "ask for a new ticket")


def _with_host(mqtt: MqttAddress, address: str) -> MqttAddress:
    """Fill in the broker's host: by default that of the coordinator."""
    return msgspec.structs.replace(mqtt, host=mqtt.host or addresses.parse(address).host)
