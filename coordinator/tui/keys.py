"""Every key of the monitor, once: bindings, footer and help are made of this table."""

from __future__ import annotations

from typing import NamedTuple

from textual.binding import Binding, BindingType


class Key(NamedTuple):
    """A key: Textual's name of it, what stands on the keyboard, what it does, words for it.

    The footer of `pages` shows `word`; a read-only monitor leaves out what `changes` things.
    """

    key: str
    shown: str
    action: str
    word: str
    meaning: str
    pages: str = ""
    changes: bool = False


KEYS: tuple[Key, ...] = (
    Key("space", "space", "mark", "mark", "mark the peer, for P, R and F", "fleet"),
    Key("P", "P", "command('pause')", "pause", "pause the marked peers", "fleet", True),
    Key("R", "R", "command('resume')", "resume", "let the marked peers go on", "fleet", True),
    Key("F", "F", "command('finish')", "finish", "end this round, then stop", "fleet", True),
    Key("slash", "/", "filter", "filter", "show peers by name, id, state or label", "fleet"),
    Key("exclamation_mark", "!", "faults", "faults", "show only what needs a look", "fleet events"),
    Key("enter", "enter", "open", "open", "everything about one peer", "fleet"),
    Key("s", "s", "sort(1)", "sort", "sort by the next column", "fleet"),
    Key("S", "S", "reverse", "reverse", "reverse the order", "fleet"),
    Key("z", "z", "zoom", "zoom", "the table alone, or with the plots", "fleet rounds"),
    Key(
        "u",
        "u",
        "freeze",
        "freeze",
        "hold the picture still; again to go on",
        "rounds events fleet",
    ),
    Key("r", "r", "reconnect", "reconnect", "try the links again now", "rounds events fleet"),
    Key(
        "t", "t", "ticket", "ticket", "make a ticket that lets a machine join", "rounds fleet", True
    ),
    Key("1", "1", "page('fleet')", "", "Fleet: every peer"),
    Key("2", "2", "page('rounds')", "", "Rounds: loss, accuracy, who took part"),
    Key("3", "3", "page('events')", "", "Events: everything that was said"),
    Key("escape", "esc", "plain", "", "clear the filter and the marks"),
    Key("question_mark,f1", "?", "help", "help", "this page", "fleet rounds events"),
    Key(
        "ctrl+p", "^p", "command_palette", "palette", "all commands by name", "rounds events fleet"
    ),
    Key("q", "q", "quit", "quit", "leave; the fleet goes on", "fleet rounds events"),
)

#: Always at the footer's right end, whatever the width.
LAST = ("?", "q")


def bindings() -> list[BindingType]:
    """The keys as Textual's bindings; `enter` belongs to the table that has the focus."""
    return [
        Binding(key.key, key.action, key.meaning, show=False)
        for key in KEYS
        if key.shown not in ("enter", "^p")
    ]
