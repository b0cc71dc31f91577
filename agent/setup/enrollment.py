"""Joins a fleet, and leaves it.

Sends nothing before it has checked that the server's CA has the hash in the ticket. Only public
keys leave the machine.
"""

from __future__ import annotations

import contextlib
import shutil
from functools import partial
from pathlib import Path

from agent.home import fleet_trust, secure_store, status_files
from agent.home.enrollment_file import ENROLLMENT_FILE, Enrollment, write_enrollment
from agent.transport.p2p.gossip import FILE as NEIGHBOURS
from agent.transport.p2p.sharing import CERTIFICATE
from protocols import VERSION
from protocols.enrollment import fleet_card, identity, names, tickets
from protocols.enrollment.joining import JOIN_PATH, JoinRequest, JoinResponse, join_proof
from protocols.enrollment.tickets import Ticket
from protocols.errors import BadMessage, HomeError, Refused, Unreachable
from protocols.local import homes, join_client
from protocols.local.atomic_files import write_private
from protocols.local.join_client import find_coordinator, old_coordinator, post_join
from protocols.network import addresses

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
    ticket, name = tickets.decode(text), names.normalize(name)
    if (home / ENROLLMENT_FILE).exists() and not replace:
        raise HomeError(
            f"{home} has joined a fleet already",
            "use --replace to join again with a new key, or set COMMONWEIGHT_AGENT_HOME",
        )
    with lock_home(home):
        return _join(home, ticket, name=name, labels=labels, replace=replace)


def lock_home(home: Path) -> contextlib.AbstractContextManager[None]:
    """Lock the home, as a running agent would overwrite a new enrollment with its old one.

    Raises HomeLocked.
    """
    return homes.hold(
        home,
        f"the agent of {home} is running",
        "stop it first: Ctrl-C where it runs, or commonweight-agent service stop",
    )


def _join(
    home: Path, ticket: Ticket, *, name: str, labels: dict[str, str], replace: bool
) -> tuple[Enrollment, bool]:
    announced = not ticket.addresses
    if announced:
        from agent.setup import discovery

        ticket = discovery.resolve_code(ticket, discovery.discover())
    address, ca_pem = find_coordinator(ticket)
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
        follows_ca=True,
    )
    answer = post_join(address, ca_pem, JOIN_PATH, joining, JoinResponse)
    if not answer.card:
        again = "update the coordinator, then join with the same ticket"
        raise old_coordinator(address, ca_pem, answer.peer, sign_key.sign, again)
    host = addresses.parse(address).host
    try:
        keys = (joining.sign_public, joining.node_public)
        card = fleet_trust.check_join(ca_pem, answer, *keys, at_least=ticket.card)
        mqtt = fleet_card.checked_broker(card, answer.mqtt, host)
    except BadMessage as err:
        raise Refused(
            f"the coordinator's answer is not what this fleet's CA signed: {err.message}",
            "nothing was stored: this machine has not joined. Ask the operator who answers there",
        ) from err
    # Other announced addresses are not kept, as they may be forged.
    others = () if announced else tuple(other for other in ticket.addresses if other != address)
    enrollment = Enrollment(
        peer=answer.peer,
        name=answer.name,
        fleet=answer.fleet,
        addresses=fleet_trust.known_addresses((address, *others), card),
        ca_pem=ca_pem.decode(),
        certificate=answer.certificate,
        coordinator_public=answer.coordinator_public,
        mqtt=mqtt,
        card=answer.card,
        transitions=answer.transitions,
    )
    if replace:
        _delete_identity(home)
        secure_store.forget_all(home)
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
        hint = "leave without the coordinator: commonweight-agent leave --yes --offline"
        try:
            _tell_leaving(home, enrollment)
        except Unreachable as err:
            raise Unreachable(err.message, hint) from err
        except Refused as err:
            raise Refused(
                f"the coordinator does not know this peer, or a clock is wrong ({err.message})",
                hint,
            ) from err
    _delete_identity(home)
    secure_store.forget_all(home)
    for file in _KEY_FILES:
        (home / (file + _NEW_SUFFIX)).unlink(missing_ok=True)
    for folder in ("cache", "outbox"):
        shutil.rmtree(home / folder, ignore_errors=True)


def _tell_leaving(home: Path, enrollment: Enrollment) -> None:
    """Ask the coordinator to revoke our key, also if the fleet has a new CA."""
    from agent.home.credentials import Credentials
    from agent.transport.coordinator_client import CoordinatorClient

    link = CoordinatorClient(Credentials.load(home, enrollment))
    try:
        link.leave()
    except Unreachable as err:
        newer = enrollment
        if join_client.is_other_ca(err):
            follow = partial(fleet_trust.with_new_ca, enrollment)
            with contextlib.suppress(Refused):  # of another fleet
                newer = join_client.find_new_ca(enrollment.addresses, enrollment, follow)
        if newer == enrollment:
            raise
        _tell_leaving(home, newer)
    finally:
        link.close()


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
