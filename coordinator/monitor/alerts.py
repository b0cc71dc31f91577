"""Conditions of the fleet that an operator should look at. Pure.

`alerts(fleet, now)` lists every condition that holds; `AlertTracker` reports each once, and again
only after it had ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from coordinator.fleet.readings import current_run, display_name, num_available, shown_state
from coordinator.fleet.state import Fleet, Level, Peer
from coordinator.remote.formatting import age, format_bytes
from protocols import VERSION
from protocols.messages.states import ENDED, PeerState
from protocols.network import version_check

#: An agent stores several versions of the model and its own update; with less it soon fails.
LOW_DISK_BYTES = 1_000_000_000
#: Commands and requests with a larger skew than 120 s are refused as replayed
#: (`messages.mqtt` and `enrollment.signed_requests` in `protocols`).
MAX_SKEW_S = 30.0
#: Alerts of one kind that name their peer; the others are counted in one line.
MAX_NAMED = 5


class Alert(NamedTuple):
    """A condition that holds. `key` starts with its kind and stays the same while it holds."""

    key: str
    level: Level
    text: str
    subject: str = ""


def alerts(fleet: Fleet, now: float) -> list[Alert]:
    """Every condition that holds at `now` (Unix s)."""
    enrolled = [peer for peer in fleet.peers.values() if peer.standing == "enrolled"]
    of_peers = [alert for peer in enrolled for alert in _peer_alerts(peer, now)]
    return [*_quorum_alerts(fleet, now), *of_peers, *_clock_alerts(fleet)]


def _quorum_alerts(fleet: Fleet, now: float) -> Iterator[Alert]:
    run = current_run(fleet)
    if run is None or run.changed.state in ENDED:
        return
    online, needed, name = num_available(fleet, now), run.changed.quorum, run.changed.run
    if online < needed:
        text = f"run {name} cannot continue: {online} of the {needed} required peers are online"
        yield Alert(f"quorum {name}", "error", text, name)
    elif online == needed and len(fleet.peers) > needed:
        text = f"the quorum of run {name} is at risk: only the {needed} required peers are online"
        yield Alert(f"margin {name}", "warning", text, name)


def _peer_alerts(peer: Peer, now: float) -> Iterator[Alert]:
    name, key = display_name(peer), peer.peer
    if shown_state(peer, now) is PeerState.STALE:
        text = f"{name} has sent nothing for {age(now - peer.seen_at)}"
        yield Alert(f"silent {key}", "warning", text, key)
    if peer.diverged:
        yield Alert(
            f"diverged {key}", "error", f"{name} has diverged: its loss is not a number", key
        )
    if 0 < peer.disk_free_bytes < LOW_DISK_BYTES:
        text = f"{name} has only {format_bytes(peer.disk_free_bytes)} of disk left"
        yield Alert(f"disk {key}", "warning", text, key)
    if peer.version and peer.version != VERSION:
        near = version_check.are_compatible(VERSION, peer.version)
        text = f"{name} runs commonweight {peer.version}; this monitor runs {VERSION}"
        text += "" if near else ". The versions are too far apart: it gets no work"
        yield Alert(f"version {key} {peer.version}", "warning" if near else "error", text, key)


def _clock_alerts(fleet: Fleet) -> Iterator[Alert]:
    """Wrong clocks. If most peers differ, this machine's clock is probably the wrong one."""
    skewed = [peer for peer in fleet.peers.values() if abs(peer.skew_s) > MAX_SKEW_S]
    if len(skewed) > 1 and len(skewed) * 2 > len(fleet.peers):
        yield Alert("clock here", "warning", "this machine's clock differs from that of most peers")
        return
    for peer in skewed:
        direction = "ahead" if peer.skew_s > 0 else "behind"
        skew = f"{age(abs(peer.skew_s))} {direction}"
        text = f"the clock of {display_name(peer)} is {skew}: set it by NTP"
        yield Alert(f"clock {peer.peer}", "warning", text, peer.peer)


class AlertTracker:
    """Remembers which conditions were reported."""

    def __init__(self) -> None:
        self._active: set[str] = set()

    def new(self, fleet: Fleet, now: float) -> list[Alert]:
        """The conditions that did not hold at the last call; at most `MAX_NAMED` of each kind."""
        current = alerts(fleet, now)
        fresh = [alert for alert in current if alert.key not in self._active]
        self._active = {alert.key for alert in current}
        shown: list[Alert] = []
        counts: Counter[str] = Counter()
        levels: dict[str, Level] = {}
        for alert in fresh:
            kind = alert.key.partition(" ")[0]
            counts[kind] += 1
            levels[kind] = alert.level
            if counts[kind] <= MAX_NAMED:
                shown.append(alert)
        return shown + [
            Alert(kind, levels[kind], f"{kind}: the same for {total - MAX_NAMED} more peers")
            for kind, total in counts.items()
            if total > MAX_NAMED
        ]
