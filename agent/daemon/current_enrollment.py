"""The current certificate, CA, broker and keys of this machine's fleet."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from msgspec import structs

from agent.daemon.context import AgentContext
from agent.home import fleet_trust
from agent.home.enrollment_file import write_enrollment
from agent.transport.coordinator_client import CoordinatorClient
from protocols.enrollment import certificates, identity
from protocols.errors import BadMessage, Refused, Unreachable
from protocols.local import join_client
from protocols.messages.mqtt import MqttAddress

log = logging.getLogger("commonweight.agent")

#: Certificates are valid for a year and are renewed in its last two months.
RENEW_BEFORE_S = 60 * 86400.0


class CurrentEnrollment:
    """The enrollment in the agent's home, which it saves when the coordinator's answers change it.

    Its methods are called in the threads of a session. `on_broker_changed(address)` is called on
    the event loop when the broker's address or login changes, `on_key_changed` when the coordinator
    has a new signing key or CA.
    """

    def __init__(self, ctx: AgentContext, on_broker_changed: Callable[[MqttAddress], None]) -> None:
        self._ctx, self._runner, self._enrollment = ctx, ctx.runner, ctx.enrollment
        self.on_broker_changed = on_broker_changed
        self.on_key_changed: Callable[[], None] = lambda: None
        self._saving = threading.Lock()
        self._refused_broker: MqttAddress | None = None

    @property
    def certificate(self) -> bytes:
        """The current node certificate."""
        return self._enrollment.certificate

    def follow_ca(self, err: Unreachable) -> None:
        """Change to the fleet's newest CA, if any address has one that the CA known here has
        signed.

        Raises Unreachable then, as all parts start again with it; Refused for another CA.
        """
        known = self._enrollment
        try:
            follow = partial(fleet_trust.with_new_ca, known)
            changed = join_client.find_new_ca(known.addresses, known, follow)
        except Refused as refused:
            raise refused from err
        if changed == known:
            return
        self._save(**structs.asdict(changed))
        self._runner.call_threadsafe(self.on_key_changed)
        raise Unreachable("the fleet has a new CA, signed by the old one; starting again with it")

    def renew_certificate(self, link: CoordinatorClient) -> None:
        """Renew the node certificate if it expires soon, or is not of the newest CA."""
        known, keys = self._enrollment, self._ctx.credentials
        ca_pem, ends_at = known.ca_pem.encode(), 0.0
        with contextlib.suppress(BadMessage):  # of the CA before
            ends_at = certificates.verify_certificate(ca_pem, known.certificate).not_after
        if ends_at - time.time() < RENEW_BEFORE_S:
            certificate = link.renew()
            node = identity.node_public_pem(keys.node_key)
            public = identity.public_bytes(keys.sign_key)
            fleet_trust.check_certificate(ca_pem, known.fleet, certificate, public, node)
            self._save(certificate=certificate)

    def save_broker(self, link: CoordinatorClient) -> None:
        """Save the broker and the fleet card. The login changes when a peer is removed.

        The address that answered is the first one from now on. Raises Refused if the fleet's CA did
        not sign them.
        """
        told = link.mqtt_address()
        if link.places != self._enrollment.addresses:
            self._save(addresses=link.places)
        try:
            known = fleet_trust.with_broker(self._enrollment, told)
        except BadMessage as err:
            if not told.card:  # an older coordinator: the new broker is not used
                if told.address != self._refused_broker:
                    log.warning("%s: %s", err.message, err.hint)
                self._refused_broker = told.address
                return
            raise Refused(
                f"the coordinator's answer is not what this fleet's CA signed: {err.message}",
                "ask the operator who answers at this address; no work is taken from it",
            ) from err
        if known.card and not self._enrollment.card:  # the coordinator reads a named receiver
            link.name_receiver(known.fleet)
        link.replicas.use(fleet_trust.download_addresses(known))
        moved = known.mqtt != self._enrollment.mqtt
        if known != self._enrollment:
            link.use(known.addresses)
            self._save(
                addresses=known.addresses,
                mqtt=known.mqtt,
                card=known.card,
                coordinator_public=known.coordinator_public,
            )
        if known.coordinator_public != self._ctx.coordinator_public:
            self._runner.call_threadsafe(self.on_key_changed)
            raise Unreachable("the coordinator has a new signing key; starting again with it")
        if moved:
            self._runner.call_threadsafe(self.on_broker_changed, known.mqtt)

    def _save(self, **changes: Any) -> None:
        with self._saving:  # both threads save
            self._enrollment = structs.replace(self._enrollment, **changes)
            write_enrollment(self._ctx.home, self._enrollment)
