"""The picture of the network: rates, and what stands in each line."""

from __future__ import annotations

from msgspec.structs import replace

from coordinator.monitor.network import WINDOW_S, Rate, TrafficMeter, network_lines
from coordinator.monitor.peer_table import Cell
from tests.support.scene import IDS, NOW, busy_fleet, crowd_fleet


def texts(lines: list[list[Cell]]) -> list[str]:
    return ["".join(cell.text for cell in line) for line in lines]


def test_rates_are_means_over_the_last_seconds() -> None:
    fleet, meter, north = busy_fleet(), TrafficMeter(), IDS["north"]
    peer = fleet.peers[north]
    assert peer.telemetry is not None
    for second in range(30):
        up = 1_000 * min(second, 20)  # nothing more after 20 s
        peer.telemetry = replace(peer.telemetry, bytes_up=up, bytes_down=0)
        meter.update(fleet, NOW + second)
        if second == 10:
            assert meter.rate(north) == Rate(1_000.0, 0.0)
    assert meter.rate(north) == Rate(1_000.0 / WINDOW_S, 0.0)
    peer.telemetry = replace(peer.telemetry, bytes_up=5)
    meter.update(fleet, NOW + 30)
    assert meter.rate(north) == Rate(), "counters begin again with the agent"
    del fleet.peers[north]
    meter.update(fleet, NOW + 31)
    assert meter.rate(north) == Rate()


def test_moving_bytes_have_arrows_and_stand_first() -> None:
    fleet, meter = busy_fleet(), TrafficMeter()
    south = fleet.peers[IDS["south-attic"]]
    meter.update(fleet, NOW)
    assert south.telemetry is not None
    south.telemetry = replace(south.telemetry, bytes_up=south.telemetry.bytes_up + 4_000_000)
    south.fetched_from = {IDS["north"]: 3e6, "GONE": 1.0}
    meter.update(fleet, NOW + 2)
    lines = texts(network_lines(fleet, meter, NOW + 2, 100, 8))
    assert "━◀━" in lines[0]
    assert "south-attic" in lines[0]
    assert "↑ 2.0 MB/s" in lines[0]
    assert lines[0].endswith("◀ from north 3.0 MB/s")
    assert lines[0].startswith("■ coordinator")
    west = next(line for line in lines if "west" in line)
    assert "╌╌╌" in west, "nothing connects a peer that is away"
    assert "garden" not in "".join(lines), "a peer that awaits approval has no connection yet"


def test_links_are_longer_in_a_wide_pane() -> None:
    fleet, meter = busy_fleet(), TrafficMeter()
    lengths = []
    for width in (90, 110, 130, 190):
        (line, *_) = texts(network_lines(fleet, meter, NOW, width, 8))
        lengths.append(line.count("─"))
        assert len(line) <= width
    assert lengths[0] == 7
    assert lengths[0] < lengths[1] < lengths[2]
    assert lengths[3] < 50


def test_it_fits_its_pane() -> None:
    fleet, meter = crowd_fleet(40), TrafficMeter()
    meter.update(fleet, NOW)
    lines = texts(network_lines(fleet, meter, NOW, 60, 7))
    assert len(lines) == 7
    assert lines[-1].strip() == "and 39 more"
    assert all(len(line) <= 60 for line in lines)
    assert network_lines(fleet, meter, NOW, 60, 0) == []
