"""The messages of the footer."""

from __future__ import annotations

from coordinator.monitor.tui.footer import footer_line, message_line
from coordinator.monitor.tui.keys import KeyMap
from coordinator.monitor.tui.messages import SHOWN_S, Message, RecentMessages


def test_the_worst_message_is_shown_and_the_others_are_counted() -> None:
    recent = RecentMessages()
    assert recent.current(0.0) is None
    recent.add("error", "no disk", 0.0)
    recent.add("info", "wrote a file", 1.0)
    recent.add("info", "copied", 1.0, 2.0)
    assert recent.current(1.5) == Message("error", "no disk", 2)
    assert recent.current(3.5) == Message("error", "no disk", 1)
    assert recent.current(SHOWN_S + 0.5) == Message("info", "wrote a file", 0)
    assert recent.current(SHOWN_S + 1.5) is None


def test_a_repeated_message_counts_once() -> None:
    recent = RecentMessages()
    recent.add("warning", "no answer", 0.0)
    recent.add("warning", "no answer", 5.0)
    assert recent.current(SHOWN_S + 4.0) == Message("warning", "no answer", 0)


def test_a_message_has_a_glyph_and_fits() -> None:
    text = message_line(Message("error", "a long text " * 20, 3), 60).plain
    assert len(text) == 60
    assert text.startswith("✕ a long text")
    assert text.endswith("…  and 3 more: 3 shows all")


def test_the_keys_of_a_recording_stand_first_in_its_footer() -> None:
    for page in ("fleet", "rounds", "events", "jobs", "peer"):
        text = footer_line(page, 80, KeyMap(read_only=True, replay=True)).plain
        assert text.startswith("p play  . step  [ -10 s  ] +10 s  - slower  + faster"), page
        assert text.endswith("q quit")
        assert "play" not in footer_line(page, 200).plain
