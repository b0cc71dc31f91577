"""Every key of the monitor: bindings, footer, help and palette are made from this table."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from textual.binding import Binding, BindingType
from textual.keys import format_key


class Key(NamedTuple):
    """A key: its id in `monitor.toml`, Textual's name, its action, a label and a description.

    The footers of `pages` show the label, in this order. A read-only monitor leaves out the keys
    that change something (`changes`).
    """

    id: str
    key: str
    action: str
    label: str
    description: str
    pages: str = ""
    changes: bool = False

    def display(self, remapped: Mapping[str, str]) -> str:
        """The name on the keyboard: the first key if there are several."""
        first = remapped.get(self.id, self.key).split(",")[0].strip()
        if first in ("escape", "enter", "space"):
            return {"escape": "esc"}.get(first, first)
        return format_key(first) if len(first) > 1 else first

    def short_display(self, remapped: Mapping[str, str]) -> str:
        """Like `display`, with `^d` for ctrl+d."""
        return self.display(remapped).replace("ctrl+", "^")


_ALL = "fleet rounds events peer jobs"
_PEERS = "fleet peer"

KEYS: tuple[Key, ...] = (
    Key("plain", "escape", "plain", "back", "go back; clear the filter and the marks", "peer"),
    Key("mark", "space", "mark", "mark", "mark the peer, to command several", "fleet"),
    Key("pause", "P", "command('pause')", "pause", "pause the marked peers", _PEERS, True),
    Key("resume", "R", "command('resume')", "resume", "resume the marked peers", _PEERS, True),
    Key("finish", "F", "finish", "finish", "end the round, then stop (asks)", _PEERS, True),
    Key("filter", "slash", "filter", "filter", "show only lines with these words", "fleet events"),
    Key("faults", "exclamation_mark", "faults", "faults", "show only problems", "fleet events"),
    Key("open", "enter", "open", "open", "show all about the peer", "fleet events"),
    Key("approve", "a", "command('approve')", "approve", "admit a waiting peer", "fleet", True),
    Key("remove", "ctrl+d", "remove", "remove", "remove the marked peers (asks)", "fleet", True),
    Key("drain", "D", "drain", "drain", "finish and watch it leave (asks)", "fleet", True),
    Key("start", "n", "start_run", "new run", "start a run from a form", "rounds fleet", True),
    Key("stop", "X", "stop", "stop", "stop the run, on Jobs the job (asks)", "rounds jobs", True),
    Key("ticket", "t", "ticket", "ticket", "make a ticket for a machine", "rounds fleet", True),
    Key("sort", "s", "sort(1)", "sort", "sort by the next column", "fleet"),
    Key("reverse", "S", "reverse", "reverse", "reverse the order", "fleet"),
    Key("zoom", "z", "zoom", "zoom", "show or hide the other panes", "fleet rounds events jobs"),
    Key("follow", "f", "follow", "follow", "stay with the newest line or peer", "events rounds"),
    Key("compare", "c", "compare", "compare", "compare with an earlier run", "rounds"),
    Key("freeze", "u", "freeze", "freeze", "freeze the screen, or continue", "rounds peer jobs"),
    Key("copy", "y", "copy", "copy", "copy the id under the cursor", _ALL),
    Key("export", "x", "export", "export", "write the page as CSV and JSON", "rounds events jobs"),
    Key("picture", "f8", "picture", "picture", "write the screen as SVG"),
    Key("reconnect", "r", "reconnect", "reconnect", "connect again now", "events"),
    Key("fleet", "1", "page('fleet')", "", "Fleet: all peers"),
    Key("rounds", "2", "page('rounds')", "", "Rounds: loss, accuracy, participation"),
    Key("events", "3", "page('events')", "", "Events: all messages"),
    Key("jobs", "4", "page('jobs')", "", "Jobs: inference and analytics"),
    Key("play", "p", "play", "play", "in a recording: pause or play", _ALL),
    Key("step", "full_stop", "step", "step", "in a recording: one message", _ALL),
    Key("back", "left_square_bracket", "seek(-10)", "-10 s", "in a recording: back", _ALL),
    Key("ahead", "right_square_bracket", "seek(10)", "+10 s", "in a recording: forward", _ALL),
    Key("slower", "minus", "pace(0.5)", "slower", "in a recording: half as fast", _ALL),
    Key("faster", "plus", "pace(2.0)", "faster", "in a recording: twice as fast", _ALL),
    Key("palette", "ctrl+p", "command_palette", "palette", "all commands by name", _ALL),
    Key("help", "question_mark,f1", "help", "help", "show this help", _ALL),
    Key("quit", "q", "quit", "quit", "quit; the fleet keeps running", _ALL),
)

#: Always at the right end of the footer; the palette only from `MIN_WIDTH_PALETTE` on.
PINNED = ("palette", "help", "quit")
MIN_WIDTH_PALETTE = 80
#: Keys that the focused table handles itself.
_WIDGET_KEYS = ("open",)
#: Keys that exist only in a recording.
REPLAY_ONLY = ("play", "step", "back", "ahead", "slower", "faster")


class KeyMap(NamedTuple):
    """The keys of one monitor: `remapped` by the user, by id; without those that change something
    if it is `read_only`; with those of a recording for `replay`."""

    remapped: Mapping[str, str] = MappingProxyType({})
    read_only: bool = False
    replay: bool = False

    def has(self, key: Key) -> bool:
        if key.id in REPLAY_ONLY and not self.replay:
            return False
        return not (key.changes and self.read_only)


def bindings() -> list[BindingType]:
    """The keys as Textual's bindings."""
    return [
        Binding(key.key, key.action, key.description, show=False, id=key.id)
        for key in KEYS
        if key.id not in _WIDGET_KEYS
    ]
