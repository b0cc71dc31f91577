"""Captures of the monitor in a real terminal during failures (made by `session.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest

CAPTURES = Path(__file__).with_name("captures")
ACTS = {
    "1-nobody-there": ("no data yet", "✕", "commonweight up", "mqtt ○"),
    "2-no-peers": ("No peers yet", "commonweight-agent join", "t makes a ticket"),
    "3-peers": ("○ idle", "north", "south", "mqtt ●", "2/2 peers"),
    "4-broker-killed": ("mqtt ○", "north", "south"),
    "5-broker-back": ("mqtt ●", "○ idle"),
    "6-coordinator-killed": ("stale 00:0", "retry in", "north", "south", "mqtt ○", "flower ○"),
    "7-small": ("stale 00:", "north", "q quit"),
    "8-back": ("mqtt ●", "north", "south", "data"),
}


def screen(act: str) -> str:
    return (CAPTURES / f"{act}.txt").read_text()


@pytest.mark.parametrize("act", ACTS)
def test_each_act_shows_its_state_and_age(act: str) -> None:
    shown = screen(act)
    assert all(words in shown for words in ACTS[act]), shown
    assert "MONITOR ENDED" not in shown
    assert "Traceback" not in shown


def test_old_data_is_never_shown_as_new() -> None:
    for act in ("6-coordinator-killed", "7-small"):
        assert "mqtt ●" not in screen(act)
        assert "flower ●" not in screen(act)
    assert "stale" not in screen("8-back")


def test_a_small_terminal_gets_whole_lines() -> None:
    lines = screen("7-small").rstrip("\n").split("\n")
    assert len(lines) == 12
    assert all(len(line) <= 40 for line in lines)
