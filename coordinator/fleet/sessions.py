"""Which peers are online and can get work now, from Flower sessions and presence.

If a peer's presence has the time until which it can work, it gets no work that would take longer,
judging by the duration of its last training.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from dataclasses import dataclass

from coordinator.fleet.state import Fleet
from protocols import VERSION
from protocols.messages.envelope import Presence
from protocols.messages.states import PeerState
from protocols.network import version_check

#: A peer that is free asks for work at least every 15 s.
MAX_POLL_GAP_S = 30.0
#: After a session opens or a will arrives, presence has this long to come.
PRESENCE_GRACE_S = 5.0


class NoSession(Exception):
    """The peer has no session with this run of the coordinator, and must open one."""


@dataclass
class _Activity:
    """What a peer did last. Times are monotonic s."""

    session_number: int = 0
    opened_at: float = -math.inf
    requested_at: float = -math.inf
    #: When it, or the broker in its place, last published that its connection ended.
    offline_at: float = -math.inf
    #: Work that it got and has not answered; and when it last asked for work in this session.
    has_work: bool = False
    wanted_work_at: float | None = None
    tasks: tuple[str, ...] = ()
    #: The run and round that it trains for, and since when.
    training: tuple[tuple[str, int], float] | None = None
    last_duration_s: float = 0.0


class Sessions:
    """The Flower node and the activity of each peer. `fleet` is only read."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._node_of: dict[str, int] = {}
        self._peer_of: dict[int, str] = {}
        self._online: frozenset[str] = frozenset()
        self._activity: defaultdict[str, _Activity] = defaultdict(_Activity)

    def add(self, peer: str, node: int) -> None:
        """Set this peer's Flower node id. It stays the peer's own after a removal."""
        self._node_of[peer], self._peer_of[node] = node, peer

    def remove(self, peer: str) -> int | None:
        """Forget a removed peer. Returns the node id to refuse."""
        self.close(peer)
        return self._node_of.pop(peer, None)

    def node_of(self, peer: str) -> int | None:
        return self._node_of.get(peer)

    def peer_of(self, node: int) -> str:
        """The peer with this node id, also a removed one, or ""."""
        return self._peer_of.get(node, "")

    @property
    def any_online(self) -> bool:
        return bool(self._online)

    def is_open(self, peer: str) -> bool:
        return peer in self._online

    def open(self, peer: str) -> None:
        self._online |= {peer}
        activity = self._activity[peer]
        activity.session_number += 1
        activity.opened_at = time.monotonic()
        activity.has_work, activity.wanted_work_at = False, None

    def session_number(self, peer: str) -> int:
        """The number of sessions that the peer has opened."""
        return self._activity[peer].session_number

    def close(self, peer: str) -> None:
        self._online -= {peer}

    def set_online(self, nodes: set[int]) -> bool:
        """Set the nodes with a valid heartbeat. Returns True if that changed anything."""
        online = frozenset(self._peer_of[n] for n in nodes if n in self._peer_of)
        online &= self._node_of.keys()
        changed, self._online = online != self._online, online
        return changed

    def on_request(self, peer: str) -> bool:
        """Note a successful request. Returns True if the peer could not get work before it."""
        was_eligible = self.is_eligible(peer)
        self._activity[peer].requested_at = time.monotonic()
        return not was_eligible

    def on_poll(self, peer: str, *, answered: bool, wants_work: bool, got_work: bool) -> None:
        """Note the peer's work by its poll. A heartbeat during work has no information about it."""
        activity = self._activity[peer]
        if wants_work:
            activity.wanted_work_at = time.monotonic()
        elif answered:
            activity.wanted_work_at = -math.inf
        if answered or wants_work:
            activity.has_work = got_work

    def state_from_requests(self, peer: str) -> PeerState | None:
        """The peer's state by its requests: training, idle or paused. None if it sends none."""
        activity, now = self._activity[peer], time.monotonic()
        if peer not in self._online or activity.offline_at > activity.requested_at:
            return None
        if activity.has_work:
            return PeerState.TRAINING
        wanted_at = activity.wanted_work_at
        is_free = wanted_at is None or now - wanted_at <= MAX_POLL_GAP_S
        return PeerState.IDLE if is_free else PeerState.PAUSED

    def presence_is_due(self, peer: str) -> bool:
        """Whether presence had enough time to arrive."""
        activity = self._activity[peer]
        since = max(activity.opened_at, activity.offline_at)
        return time.monotonic() - since > PRESENCE_GRACE_S

    def on_presence(self, peer: str, presence: Presence) -> None:
        activity, now = self._activity[peer], time.monotonic()
        if presence.state is PeerState.OFFLINE:
            activity.offline_at = now
        if presence.will:
            return
        activity.tasks = (*presence.tasks, *presence.askable) or activity.tasks
        work, training = (presence.run, presence.round), activity.training
        if presence.state is PeerState.TRAINING:
            if training is None or training[0] != work:
                activity.training = work, now
        elif training is not None and presence.state is not PeerState.PAUSED:
            activity.training = None
            if presence.state is PeerState.SENDING and training[0] == work:
                activity.last_duration_s = now - training[1]

    def tasks(self) -> set[str]:
        """Tasks that online peers can run and whose owners do not forbid them."""
        return {task for peer in self._online for task in self._activity[peer].tasks}

    def eligible(self) -> frozenset[str]:
        """Online peers that can get work now."""
        return frozenset(peer for peer in self._online if self._can_work(peer))

    def online(self) -> frozenset[str]:
        """Peers with an open session that can answer messages, also paused ones."""
        return frozenset(peer for peer in self._online if self._can_answer(peer))

    def is_eligible(self, peer: str) -> bool:
        """`peer in eligible()`, without a check of all other peers."""
        return peer in self._online and self._can_work(peer)

    def _can_work(self, peer: str) -> bool:
        shown = self._fleet.peers.get(peer)
        if shown is None or shown.state in (PeerState.PAUSED, PeerState.ERROR):
            return False
        if shown.state is PeerState.IDLE and shown.free_until:
            left_s = shown.free_until - time.time() - shown.skew_s
            if left_s < self._activity[peer].last_duration_s:
                return False
        return self._can_answer(peer)

    def _can_answer(self, peer: str) -> bool:
        shown, activity = self._fleet.peers.get(peer), self._activity[peer]
        if shown is None or shown.standing != "enrolled":
            return False
        if not version_check.are_compatible(VERSION, shown.version):
            return False
        # A request after the last will proves that the peer is online.
        return activity.offline_at <= activity.requested_at
