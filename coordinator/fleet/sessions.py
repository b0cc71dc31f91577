"""Which peers are there and could be given work now, from Flower sessions and presence.

A peer that says until when it can work gets none that it would not end by then, as far as its last
work tells: its measured speed against its declared window.
"""

from __future__ import annotations

import time

from coordinator.fleet.state import Fleet
from protocols import VERSION
from protocols.messages.envelope import Presence
from protocols.messages.states import PeerState
from protocols.network import version_check


class NoSession(Exception):
    """The peer has none open with this life of the coordinator: it must open one."""


class Sessions:
    """Peers by their Flower node ids, and what was last heard of them. `fleet` is read only."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._node_of: dict[str, int] = {}
        self._peer_of: dict[int, str] = {}
        self._online: frozenset[str] = frozenset()
        self._session_numbers: dict[str, int] = {}
        self._requested_at: dict[str, float] = {}
        self._will_at: dict[str, float] = {}
        self._tasks: dict[str, tuple[str, ...]] = {}
        #: The work that a peer trains at since then, and how long its last one took, in s.
        self._training_since: dict[str, tuple[tuple[str, int], float]] = {}
        self._last_duration_s: dict[str, float] = {}

    def add(self, peer: str, node: int) -> None:
        """This peer's Flower node id, which stays its own even after it was removed."""
        self._node_of[peer], self._peer_of[node] = node, peer

    def remove(self, peer: str) -> int | None:
        """Forget a removed peer; the node id to shut out."""
        self._online -= {peer}
        return self._node_of.pop(peer, None)

    def node_of(self, peer: str) -> int | None:
        return self._node_of.get(peer)

    def peer_of(self, node: int) -> str:
        """The peer with this node id, also a removed one; empty for nobody."""
        return self._peer_of.get(node, "")

    @property
    def any_online(self) -> bool:
        return bool(self._online)

    def on_request(self, peer: str) -> bool:
        """A request of this peer succeeded; True if it could not be given work until now."""
        was_eligible = self.is_eligible(peer)
        self._requested_at[peer] = time.monotonic()
        return not was_eligible

    def is_open(self, peer: str) -> bool:
        return peer in self._online

    def open(self, peer: str) -> None:
        self._online |= {peer}
        self._session_numbers[peer] = self.session_number(peer) + 1

    def session_number(self, peer: str) -> int:
        """Which of its sessions this is, counted from 1; 0 before the first."""
        return self._session_numbers.get(peer, 0)

    def close(self, peer: str) -> None:
        self._online -= {peer}

    def set_online(self, nodes: set[int]) -> bool:
        """Nodes whose heartbeat holds; True if that changed anything."""
        online = frozenset(self._peer_of[n] for n in nodes if n in self._peer_of)
        online &= self._node_of.keys()
        changed, self._online = online != self._online, online
        return changed

    def on_presence(self, peer: str, presence: Presence) -> None:
        if presence.will:
            self._will_at[peer] = time.monotonic()
            return
        if presence.tasks:
            self._tasks[peer] = presence.tasks
        work, now = (presence.run, presence.round), time.monotonic()
        began = self._training_since.get(peer)
        if presence.state is PeerState.TRAINING:
            if began is None or began[0] != work:
                self._training_since[peer] = work, now
        elif began is not None and presence.state is not PeerState.PAUSED:
            del self._training_since[peer]
            if presence.state is PeerState.SENDING and began[0] == work:
                self._last_duration_s[peer] = now - began[1]

    def tasks(self) -> set[str]:
        """Tasks that somebody who is there can and may run."""
        return {task for peer in self._online for task in self._tasks.get(peer, ())}

    def eligible(self) -> frozenset[str]:
        """Peers that can be given work now: a live session, and no word against it."""
        return frozenset(peer for peer in self._online if self._is_willing(peer))

    def is_eligible(self, peer: str) -> bool:
        """`peer in eligible()`, without a look at all the others."""
        return peer in self._online and self._is_willing(peer)

    def _is_willing(self, peer: str) -> bool:
        shown = self._fleet.peers.get(peer)
        if shown is None or shown.standing != "enrolled":
            return False
        if shown.state in (PeerState.PAUSED, PeerState.ERROR):
            return False
        if not version_check.are_compatible(VERSION, shown.version):
            return False
        if shown.state is PeerState.IDLE and shown.free_until:
            left_s = shown.free_until - time.time() - shown.skew_s
            if left_s < self._last_duration_s.get(peer, 0.0):
                return False
        # A will alone proves nothing: a peer that has asked us something since then is there.
        return self._will_at.get(peer, 0.0) <= self._requested_at.get(peer, 0.0)
