"""What a person should look at, read off the fleet as it stands. Pure.

`alerts(fleet, now)` names every condition that holds; a watcher tells those that are new since its
last look, so each is said once, and again only after it was over.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from coordinator.fleet.reducer import (
    Fleet,
    Level,
    Peer,
    called,
    current_run,
    num_available,
    shown_state,
)
from coordinator.remote.formatting import age, format_bytes
from protocols import VERSION
from protocols.messages.states import ENDED, PeerState
from protocols.network import version_check

#: An agent keeps some versions of the model and its own update: with less, it soon cannot.
LOW_DISK_BYTES = 1_000_000_000
#: Beyond this, commands and requests are refused as replayed (`messages.mqtt` and
#: `enrollment.signed_requests` in `protocols`: 120 s).
MAX_SKEW_S = 30.0


class Alert(NamedTuple):
    """A condition; `key` stays the same while it holds."""

    key: str
    level: Level
    text: str
    subject: str = ""


def alerts(fleet: Fleet, now: float) -> list[Alert]:
    """Every condition that holds now."""
    found = list(_quorum_alerts(fleet, now))
    for peer in fleet.peers.values():
        if peer.standing == "enrolled":
            found.extend(_peer_alerts(peer, now))
    found.extend(_clock_alerts(fleet))
    return found


def _quorum_alerts(fleet: Fleet, now: float) -> Iterator[Alert]:
    run = current_run(fleet)
    if run is None or run.changed.state in ENDED:
        return
    here, need, name = num_available(fleet, now), run.changed.quorum, run.changed.run
    if here < need:
        text = f"run {name} cannot go on: {here} of the {need} peers that it needs are there"
        yield Alert(f"quorum {name}", "error", text, name)
    elif here == need and len(fleet.peers) > need:
        text = f"the quorum of run {name} is at risk: no peer more than the {need} it needs"
        yield Alert(f"margin {name}", "warning", text, name)


def _peer_alerts(peer: Peer, now: float) -> Iterator[Alert]:
    name, who = called(peer), peer.peer
    if shown_state(peer, now) is PeerState.STALE:
        text = f"{name} has said nothing for {age(now - peer.seen_at)}"
        yield Alert(f"silent {who}", "warning", text, who)
    if peer.diverged:
        yield Alert(f"diverged {who}", "error", f"{name} has diverged: its loss is no number", who)
    if 0 < peer.disk_free_bytes < LOW_DISK_BYTES:
        text = f"{name} has only {format_bytes(peer.disk_free_bytes)} of disk left"
        yield Alert(f"disk {who}", "warning", text, who)
    if peer.version and peer.version != VERSION:
        near = version_check.are_compatible(VERSION, peer.version)
        text = f"{name} runs commonweight {peer.version}; this is {VERSION}"
        text += "" if near else ": too far apart, it gets no work"
        yield Alert(f"version {who} {peer.version}", "warning" if near else "error", text, who)


def _clock_alerts(fleet: Fleet) -> Iterator[Alert]:
    """Clocks that are wrong; if it is most of them, then it is rather the one that looks."""
    wrong = [peer for peer in fleet.peers.values() if abs(peer.skew_s) > MAX_SKEW_S]
    if len(wrong) > 1 and len(wrong) * 2 > len(fleet.peers):
        yield Alert("clock here", "warning", "this machine's clock differs from that of most peers")
        return
    for peer in wrong:
        way = "ahead" if peer.skew_s > 0 else "behind"
        text = f"the clock of {called(peer)} is {age(abs(peer.skew_s))} {way}: set it by NTP"
        yield Alert(f"clock {peer.peer}", "warning", text, peer.peer)


class AlertTracker:
    """Remembers which conditions were told."""

    def __init__(self) -> None:
        self._active: set[str] = set()

    def new(self, fleet: Fleet, now: float) -> list[Alert]:
        """The conditions that did not hold at the last look; of one kind at most three by name."""
        found = alerts(fleet, now)
        fresh = [alert for alert in found if alert.key not in self._active]
        self._active = {alert.key for alert in found}
        kinds = Counter(alert.key.partition(" ")[0] for alert in fresh)
        told: list[Alert] = []
        seen: Counter[str] = Counter()
        for alert in fresh:
            kind = alert.key.partition(" ")[0]
            seen[kind] += 1
            if seen[kind] <= MAX_NAMED:
                told.append(alert)
            elif seen[kind] == kinds[kind]:
                text = f"{kind}: the same of {kinds[kind] - MAX_NAMED} more peers"
                told.append(Alert(kind, alert.level, text))
        return told


MAX_NAMED = 5
