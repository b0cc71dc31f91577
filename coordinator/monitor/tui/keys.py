"""Every key of the monitor, once: bindings, footer, help and palette are made of this table."""

from __future__ import annotations

from typing import NamedTuple

from textual.binding import Binding, BindingType
from textual.keys import format_key


class Key(NamedTuple):
    """A key: its id, Textual's name of it, what it does, a word and a sentence for it.

    The footer of `pages` shows `word`, from the left as they stand there; a read-only monitor
    leaves out what `changes` things. `key` may be changed in the file (`config.py`).
    """

    id: str
    key: str
    action: str
    label: str
    description: str
    pages: str = ""
    changes: bool = False

    def display(self, remapped: dict[str, str]) -> str:
        """What stands on the keyboard: the first key if there are several."""
        first = remapped.get(self.id, self.key).split(",")[0].strip()
        if first in ("escape", "enter", "space"):
            return {"escape": "esc"}.get(first, first)
        return format_key(first) if len(first) > 1 else first

    def short_display(self, remapped: dict[str, str]) -> str:
        """As `shown`, short: `^d` for ctrl+d."""
        return self.display(remapped).replace("ctrl+", "^")


KEYS: tuple[Key, ...] = (
    Key("mark", "space", "mark", "mark", "mark the peer, for what is done to many", "fleet"),
    Key("pause", "P", "command('pause')", "pause", "pause the marked peers", "fleet peer", True),
    Key("resume", "R", "command('resume')", "resume", "let them go on", "fleet peer", True),
    Key(
        "finish",
        "F",
        "command('finish')",
        "finish",
        "end this round, then stop the agent",
        "fleet peer",
        True,
    ),
    Key("filter", "slash", "filter", "filter", "show only what holds these words", "fleet events"),
    Key("faults", "exclamation_mark", "faults", "faults", "only what needs a look", "fleet events"),
    Key("open", "enter", "open", "open", "everything about the peer", "fleet events"),
    Key("approve", "a", "command('approve')", "approve", "let a waiting peer in", "fleet", True),
    Key("remove", "ctrl+d", "remove", "remove", "shut the marked peers out (asks)", "fleet", True),
    Key("drain", "D", "drain", "drain", "end its work and watch it leave (asks)", "fleet", True),
    Key("start", "n", "start_run", "new run", "start a run from a form", "rounds fleet", True),
    Key(
        "stop",
        "X",
        "stop",
        "stop",
        "end the run, on Jobs the job; what it made stays (asks)",
        "rounds jobs",
        True,
    ),
    Key("ticket", "t", "ticket", "ticket", "make a ticket for a machine", "rounds fleet", True),
    Key("sort", "s", "sort(1)", "sort", "sort by the next column", "fleet"),
    Key("reverse", "S", "reverse", "reverse", "reverse the order", "fleet"),
    Key("zoom", "z", "zoom", "zoom", "the pane alone, or with the others", "fleet rounds jobs"),
    Key(
        "follow",
        "f",
        "follow",
        "follow",
        "stay with the newest line; in Fleet: with the peer or the place",
        "events rounds",
    ),
    Key(
        "freeze",
        "u",
        "freeze",
        "freeze",
        "hold the picture still; again to go on",
        "rounds peer jobs",
    ),
    Key(
        "copy", "y", "copy", "copy", "copy the id under the cursor", "fleet rounds events peer jobs"
    ),
    Key(
        "export",
        "x",
        "export",
        "export",
        "write what is shown as CSV and JSON",
        "rounds events jobs",
    ),
    Key("picture", "f8", "picture", "picture", "write the screen as an SVG picture"),
    Key("reconnect", "r", "reconnect", "reconnect", "try the links again now", "events"),
    Key("fleet", "1", "page('fleet')", "", "Fleet: every peer"),
    Key("rounds", "2", "page('rounds')", "", "Rounds: loss, accuracy, who took part"),
    Key("events", "3", "page('events')", "", "Events: everything that was said"),
    Key("jobs", "4", "page('jobs')", "", "Jobs: what is asked beside training"),
    Key("play", "p", "play", "play", "in a recording: stop it, or let it go on", "replay"),
    Key("step", "full_stop", "step", "step", "in a recording: one message", "replay"),
    Key("back", "left_square_bracket", "seek(-10)", "-10 s", "in a recording: back", "replay"),
    Key("ahead", "right_square_bracket", "seek(10)", "+10 s", "in a recording: ahead", "replay"),
    Key("slower", "minus", "pace(0.5)", "slower", "in a recording: half as fast", "replay"),
    Key("faster", "plus", "pace(2.0)", "faster", "in a recording: twice as fast", "replay"),
    Key("plain", "escape", "plain", "", "back; clear the filter and the marks"),
    Key(
        "palette",
        "ctrl+p",
        "command_palette",
        "palette",
        "all commands by name",
        "fleet rounds events peer jobs",
    ),
    Key("help", "question_mark,f1", "help", "help", "this page", "fleet rounds events peer jobs"),
    Key("quit", "q", "quit", "quit", "leave; the fleet goes on", "fleet rounds events peer jobs"),
)

#: Always at the footer's right end, whatever the width; the palette where there is room.
PINNED = ("palette", "help", "quit")
MIN_WIDTH_PALETTE = 80
#: What a table does with its own keys, and Textual with its own.
_WIDGET_KEYS = ("open",)
#: What there is only in a recording.
REPLAY_ONLY = ("play", "step", "back", "ahead", "slower", "faster")


def bindings() -> list[BindingType]:
    """The keys as Textual's bindings; `enter` belongs to the table that has the focus."""
    return [
        Binding(key.key, key.action, key.description, show=False, id=key.id)
        for key in KEYS
        if key.id not in _WIDGET_KEYS
    ]
