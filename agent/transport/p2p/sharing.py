"""Decides when and where this agent serves versions to other peers.

The owner's setting `share`: `lan` serves only in a private network, `on` everywhere, `off` never.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from msgspec.structs import replace

from agent.home.credentials import Credentials
from agent.transport.bandwidth import BYTES_PER_MBIT
from agent.transport.p2p.authorization import RequestAuthorizer
from agent.transport.p2p.gossip import GossipState
from agent.transport.p2p.networks import LocalNetwork, locate
from agent.transport.p2p.piece_store import PieceStore
from agent.transport.p2p.server import PeerServer
from protocols.enrollment import certificates
from protocols.local.atomic_files import write_private
from protocols.network import addresses
from protocols.p2p import peer_addresses
from protocols.p2p.swarm import MIN_SHARED_BYTES, DownloadPlanRequest

log = logging.getLogger("commonweight.share")

CERTIFICATE, PORT = "share.pem", "share.port"
#: How often the agent checks whether the machine has changed networks.
_CHECK_EVERY_S = 15.0


class Sharing:
    """The piece store, and the server over it while there is a network to serve.

    `run` belongs to the event loop; all else is callable from any thread.
    """

    def __init__(
        self,
        policy: Literal["lan", "on", "off"],
        home: Path,
        credentials: Credentials,
        coordinator_public: bytes,
        *,
        port: int = 0,
        mbit_s: float = 0.0,
        gossip_state: GossipState | None = None,
    ) -> None:
        self.pieces = PieceStore()
        self._gossip = gossip_state
        self._policy, self._port, self._home = policy, port, home
        self.credentials = credentials
        self._authorizer = RequestAuthorizer(coordinator_public, credentials.peer, gossip_state)
        self._bytes_per_s = mbit_s * BYTES_PER_MBIT
        self._request: DownloadPlanRequest | None = None
        self._sent = 0
        self._warned_host = ""
        self._server: PeerServer | None = None
        #: Asked before each piece for another peer, with its bytes; False: it gets no more today.
        self.may_pass_on: Callable[[int], bool] = lambda nbytes: True

    @property
    def is_off(self) -> bool:
        """True if the owner has turned sharing off."""
        return self._policy == "off"

    @property
    def bytes_sent(self) -> int:
        """Bytes sent to other peers."""
        return self._sent + (self._server.bytes_sent if self._server else 0)

    def is_large_enough(self, nbytes: int) -> bool:
        """True if a version of this size should be exchanged with other peers."""
        return self._request is not None and nbytes >= MIN_SHARED_BYTES

    def address(self) -> str:
        """This agent's address for other peers; empty if it does not serve."""
        return self._request.address if self._request else ""

    def plan_request(self, faulty: tuple[str, ...] = ()) -> DownloadPlanRequest:
        """Returns the request for a download plan."""
        return replace(self._request or DownloadPlanRequest(), faulty=faulty)

    async def run(self) -> None:
        """Serves while there is a network to serve, and follows changes of it, until cancelled."""
        if self.is_off:
            await asyncio.Event().wait()
        if 0 < self._port < peer_addresses.MIN_PORT:
            log.warning(
                "share_port %d is below %d, where no peer connects; not sharing. Choose another: "
                "commonweight-agent policy set share_port 0",
                *(self._port, peer_addresses.MIN_PORT),
            )
            await asyncio.Event().wait()
        while True:
            here = await asyncio.to_thread(self._find_network)
            if here is None:
                await asyncio.sleep(_CHECK_EVERY_S)
            else:
                await self._serve(here)

    def _find_network(self) -> LocalNetwork | None:
        """Returns the network to serve now, or None."""
        coordinator = addresses.parse(self.credentials.address)
        here = locate(coordinator.host, coordinator.port)
        if here is None or (self._policy != "on" and not here.is_private):
            return None
        is_local = self.credentials.is_local_fleet
        address = addresses.netloc(here.host, peer_addresses.MIN_PORT)
        if reason := peer_addresses.refusal(address, allow_loopback=is_local):
            if self._warned_host != here.host:
                log.warning("not sharing at %s: %s, and no peer connects there", here.host, reason)
            self._warned_host = here.host
            return None
        return here

    def _listen(self, server: PeerServer, host: str) -> int:
        """Listens on the owner's port, else on the last one, which peers remember."""
        if self._port:
            return server.listen(host, self._port)
        remembered = self._home / PORT
        try:
            return server.listen(host, int(remembered.read_text()))
        except (OSError, ValueError, OverflowError):
            port = server.listen(host, 0)
        write_private(remembered, str(port).encode())
        return port

    async def _serve(self, here: LocalNetwork) -> None:
        """Serves in this network until the machine has left it."""
        certificate, key = self._home / CERTIFICATE, self._home / "node.key"
        pem = certificates.new_node_tls(self.credentials.node_key, self.credentials.peer)
        try:
            write_private(certificate, pem)
            server = PeerServer(
                self.pieces, self._authorizer, self._bytes_per_s, self._gossip, certificate, key
            )
            server.may_send = lambda nbytes: self.may_pass_on(nbytes)
            port = self._listen(server, here.host)
        except OSError as err:
            log.warning("cannot share versions on %s port %d: %s", here.host, self._port, err)
            await asyncio.sleep(_CHECK_EVERY_S)
            return
        self._server = server
        self._request = DownloadPlanRequest(
            address=addresses.netloc(here.host, port),
            networks=here.networks,
            serves_other_networks=self._policy == "on",
        )
        log.info("other peers may fetch shared versions at %s", self._request.address)
        serving = asyncio.create_task(server.serve(), name="peer server")
        try:
            while not serving.done() and await asyncio.to_thread(self._find_network) == here:
                await asyncio.wait({serving}, timeout=_CHECK_EVERY_S)
            if serving.done():
                serving.result()
        except OSError as err:  # too many open files, for example; this ends only sharing
            log.warning("cannot share versions for now, retrying: %s", err)
            await asyncio.sleep(_CHECK_EVERY_S)
        finally:
            self._request, self._server = None, None
            self._sent += server.bytes_sent
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
