"""Texts, columns and the plain table, at any width and for any value."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from coordinator.fleet.readings import NO_PRESENCE
from coordinator.fleet.state import Fleet, Peer, Run
from coordinator.monitor.peer_table import (
    COLUMNS,
    GAP,
    fit_columns,
    is_faulty,
    select_peers,
    state_cell,
)
from coordinator.monitor.plain_table import plain_table
from coordinator.monitor.round_table import round_progress
from coordinator.remote.formatting import (
    age,
    decimal,
    format_bytes,
    progress,
    rate,
    smooth,
    stopwatch,
    trend,
)
from protocols.messages.envelope import RunChanged
from protocols.messages.states import PauseReason, PeerState, RunState

NOW = 1_790_000_000.0


def peer(name: str, state: PeerState = PeerState.IDLE, reason: str = "", **labels: str) -> Peer:
    return Peer(
        peer=name.upper(),
        name=name,
        labels=labels,
        public_key=b"k" * 32,
        state=state,
        reason=reason,
        seen_at=NOW,
    )


@pytest.mark.parametrize(
    ("num_bytes", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.0 kB"),
        (1_234_567, "1.2 MB"),
        (9_960_000, "10 MB"),
        (999_600, "1.0 MB"),
        (34e9, "34 GB"),
        (math.nan, "0 B"),
    ],
)
def test_amounts(num_bytes: float, words: str) -> None:
    assert format_bytes(num_bytes) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(-3, "0 s"), (42.9, "42 s"), (60, "1 min"), (3599, "59 min"), (7200, "2 h"), (864000, "10 d")],
)
def test_ages(seconds: float, words: str) -> None:
    assert age(seconds) == words


def test_a_stopwatch() -> None:
    assert [stopwatch(s) for s in (42, 3723)] == ["00:42", "1:02:03"]


def test_trends() -> None:
    assert trend([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert trend([5, 5], 8) == "▄▄"
    assert trend([1, None, 2, math.inf], 8) == "▁✕█✕"
    assert trend([], 8) == ""


def test_rates_fit_their_column() -> None:
    assert [rate(per_s) for per_s in (0, 812.4, 149_163, 2.5e6)] == [
        "0/s",
        "812/s",
        "149 k/s",
        "2 M/s",
    ]
    assert rate(math.inf) == "0/s"


@given(st.floats())
def test_no_rate_is_too_long(per_s: float) -> None:
    assert len(rate(max(per_s, 0))) <= 8


@given(st.lists(st.none() | st.floats(), max_size=200), st.integers(0, 40))
def test_no_value_breaks_a_trend(values: list[float | None], width: int) -> None:
    assert len(trend(values, width)) <= width
    for value in values:
        assert len(decimal(value)) <= 9


def test_progress() -> None:
    assert progress(3, 6, 6) == "━━━───"
    assert progress(9, 6, 6) == "━━━━━━"
    assert progress(1, 0, 4) == "────"


@given(st.integers(0, 2**40), st.integers(0, 2**40), st.integers(0, 200))
def test_the_progress_of_a_round_fits_its_width(asked: int, answered: int, width: int) -> None:
    """Also if a coordinator reports more answers than it requested."""
    changed = RunChanged(
        run="r",
        task="t",
        state=RunState.TRAINING,
        round=1,
        rounds=2,
        quorum=1,
        asked=asked,
        answered=answered,
    )
    assert len(round_progress(Run(changed=changed, changed_at=0.0), width)) <= width


@given(st.integers(0, 260))
def test_columns_fit_and_are_dropped_in_order(width: int) -> None:
    columns = fit_columns(COLUMNS, width, width)
    assert sum(wide + GAP for _, wide in columns) <= width
    assert [column.key for column, _ in columns] == [c.key for c in COLUMNS][: len(columns)]


@pytest.mark.parametrize(("terminal", "last"), [(60, "seen"), (80, "trend"), (200, "version")])
def test_columns_at_the_breakpoints(terminal: int, last: str) -> None:
    assert fit_columns(COLUMNS, terminal - 1, terminal)[-1][0].key == last


def test_a_state_has_a_glyph_a_word_and_a_truncated_reason() -> None:
    paused = peer("a", PeerState.PAUSED, "other programs are busy")
    assert state_cell(paused, NOW, 40).text == "‖ paused: other programs are busy"
    assert state_cell(paused, NOW, 20).text == "‖ paused: other pro…"
    assert state_cell(paused, NOW, 12).text == "‖ paused"


@pytest.mark.parametrize("state", [PeerState.TRAINING, PeerState.IDLE, PeerState.PAUSED])
def test_missing_presence_is_said_in_the_narrowest_column(state: PeerState) -> None:
    one = peer("a", state, NO_PRESENCE)
    one.no_presence = True
    for column, width in fit_columns(COLUMNS, 59, 60):
        if column.key == "state":
            assert column.cell(one, NOW, width).text.endswith(f"{state.value}: no MQTT")
    assert state_cell(one, NOW, 40).text.endswith(f"{state.value}: MQTT presence missing")


def test_the_connections_of_a_peer() -> None:
    column = next(column for column in COLUMNS if column.key == "links")

    def cell(state: PeerState, flower: bool | None, now: float = NOW) -> tuple[str, str]:
        one = peer("a", state)
        one.flower = flower
        return column.cell(one, now, column.max_width)

    assert cell(PeerState.IDLE, True) == ("m● f●", "good")
    assert cell(PeerState.IDLE, False) == ("m● f○", "warn")
    assert cell(PeerState.OFFLINE, True) == ("m○ f●", "warn")
    assert cell(PeerState.TRAINING, False, NOW + 31) == ("m○ f○", "bad"), "silent"
    assert cell(PeerState.IDLE, None) == ("m● f–", "good"), "an older coordinator"
    asking = peer("b")
    asking.standing = "awaiting"
    assert column.cell(asking, NOW, column.max_width).text == "–"


def test_faults_filter_and_order() -> None:
    fleet = Fleet(fleet="0" * 16)
    failed = peer("failed", PeerState.PAUSED, PauseReason.TRAINER)
    wild = peer("wild", PeerState.TRAINING)
    wild.diverged = True
    fine = peer("fine", PeerState.TRAINING, site="attic")
    lost = peer("lost", PeerState.OFFLINE, "connection lost")
    for one in (fine, lost, wild, failed):
        fleet.peers[one.peer] = one
    fine.losses = [0.5]
    names = [one.name for one in select_peers(fleet, NOW)]
    assert names == ["fine", "wild", "failed", "lost"]
    assert [one.name for one in select_peers(fleet, NOW, query="site=attic train")] == ["fine"]
    assert {one.name for one in select_peers(fleet, NOW, faults_only=True)} == {
        "wild",
        "failed",
        "lost",
    }
    assert [one.name for one in select_peers(fleet, NOW, sort_by="loss")][:2] == ["wild", "fine"]
    assert select_peers(fleet, NOW, reverse=True)[0].name == "lost"
    assert is_faulty(fine, NOW + 31), "silence is a fault"


@pytest.mark.parametrize("width", range(30, 110, 10))
def test_the_plain_table_drops_columns_that_do_not_fit(width: int) -> None:
    fleet = Fleet(fleet="0" * 16)
    for name in ("north", "a-name-of-some-length"):
        fleet.peers[name] = peer(name, PeerState.TRAINING)
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(plain_table(fleet, NOW, width=width))
    head, *rows = captured.get().splitlines()[-5:]
    titles = head.split()
    assert (
        titles
        == ["State", "Peer", "Round", "Seen", "Loss", "Trend", "Sent", "Version"][: len(titles)]
    )
    assert len(titles) == 8 or width < 100
    assert len(titles) >= 2, "a state without its peer tells nothing"
    if len(titles) > 2:
        assert not any("…" in row for row in rows), "what is shown is whole"


def test_the_plain_table_needs_no_color() -> None:
    fleet = Fleet(fleet="0" * 16)
    for one in (peer("[b]north", PeerState.TRAINING), peer("south", PeerState.PAUSED, "battery")):
        fleet.peers[one.peer] = one
    console = Console(width=100, record=True, color_system=None, file=None)
    with console.capture() as captured:
        console.print(plain_table(fleet, NOW))
    text = captured.get()
    assert "● training" in text
    assert "‖ paused: battery" in text
    assert "[b]north" in text, "a name is never markup"
    assert "1/2 peers" in text


def test_smoothed_losses_follow_the_mean_and_begin_anew_after_a_gap() -> None:
    assert smooth([]) == []
    assert smooth([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert smooth([1.0, 0.0], 0.5) == pytest.approx([1.0, 1 / 3])
    assert smooth([1.0, None, 3.0, float("nan")]) == [1.0, None, pytest.approx(3.0), None]
