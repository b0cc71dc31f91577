"""Alerts: each condition is reported once, and again only after it ended."""

from __future__ import annotations

from coordinator.monitor.alerts import AlertTracker, alerts
from protocols.messages.states import PeerState
from tests.support.scene import IDS, NOW, busy_fleet


def texts(now: float = NOW) -> list[str]:
    return [alert.text for alert in alerts(busy_fleet(), now)]


def test_the_alerts_of_the_example_fleet() -> None:
    assert "east has diverged: its loss is not a number" in texts()
    assert any("at risk" in text for text in texts())
    later = texts(NOW + 600)
    assert any("cannot continue" in text for text in later)
    assert any("north has sent nothing for 10 min" in text for text in later)


def test_alerts_for_disk_clock_and_version() -> None:
    fleet = busy_fleet()
    for peer in fleet.peers.values():
        peer.skew_s = 0.0
    north, east = fleet.peers[IDS["north"]], fleet.peers[IDS["east"]]
    north.disk_free_bytes, north.version, east.skew_s = 500_000_000, "9.9", -3600.0
    found = [alert.text for alert in alerts(fleet, NOW)]
    assert "north has only 500 MB of disk left" in found
    assert any("north runs commonweight 9.9" in text for text in found)
    assert "the clock of east is 1 h behind: set it by NTP" in found
    for peer in fleet.peers.values():
        peer.skew_s = 400.0
    found = [alert.text for alert in alerts(fleet, NOW)]
    assert [text for text in found if "clock" in text] == [
        "this machine's clock differs from that of most peers"
    ]


def test_an_alert_is_reported_once_and_again_after_it_ended() -> None:
    fleet, tracker = busy_fleet(), AlertTracker()
    first = {alert.key for alert in tracker.new(fleet, NOW)}
    assert f"diverged {IDS['east']}" in first
    assert tracker.new(fleet, NOW) == []
    fleet.peers[IDS["east"]].diverged = False
    assert tracker.new(fleet, NOW) == []
    fleet.peers[IDS["east"]].diverged = True
    assert [alert.key for alert in tracker.new(fleet, NOW)] == [f"diverged {IDS['east']}"]


def test_many_alerts_of_one_kind_are_summarized() -> None:
    fleet = busy_fleet()
    north = fleet.peers[IDS["north"]]
    for number in range(40):
        copy = type(north)(peer=f"P{number}", name=f"p{number}", public_key=b"k" * 32)
        copy.state, copy.diverged, copy.seen_at = PeerState.TRAINING, True, NOW
        fleet.peers[copy.peer] = copy
    told = [alert for alert in AlertTracker().new(fleet, NOW) if "diverged" in alert.key]
    assert len(told) == 6
    assert told[-1].text == "diverged: the same for 36 more peers"
