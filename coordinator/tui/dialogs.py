"""The pages that lie over the others: help, a fresh ticket, one peer."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from coordinator.fleet import Fleet, Peer, called
from coordinator.rows import LEVELS, state_cell
from coordinator.tui.keys import KEYS
from coordinator.tui.plots import shaded
from coordinator.tui.theme import BLUE, DIM, INK, STYLES, VERMILION
from coordinator.words import DIVERGED, NOTHING, age, amount, bars, decimal, progress

EVENTS_SHOWN = 5


class Dialog(ModalScreen[None]):
    """A box over the page; `esc` or `q` closes it."""

    BINDINGS = [Binding("escape,q,enter", "dismiss", "Close", show=False)]  # noqa: RUF012
    title_text = ""

    def compose(self) -> ComposeResult:
        with VerticalScroll(id="box") as box:
            box.border_title = self.title_text
            box.border_subtitle = "esc closes"
            yield Static(id="words")

    def on_mount(self) -> None:
        self.draw()

    def draw(self) -> None:
        self.query_one("#words", Static).update(self.words())

    def on_resize(self) -> None:
        """The words may depend on the room there is, known after this."""
        self.call_after_refresh(self.draw)

    def words(self) -> Text | Table:
        """What stands in the box."""
        raise NotImplementedError


class HelpDialog(Dialog):
    title_text = "Keys"

    def __init__(self, *, read_only: bool = False) -> None:
        super().__init__()
        self._read_only = read_only

    def words(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right", style=f"bold {BLUE}", no_wrap=True)
        table.add_column(style=INK)
        table.add_row("↑ ↓ j k", "move; g and G go to the first and the last")
        for key in KEYS:
            if not (key.changes and self._read_only):
                table.add_row(key.shown, key.meaning)
        return table


class TicketDialog(Dialog):
    """The ticket is kept nowhere: when the box is closed it is gone from this screen."""

    title_text = "A ticket, shown once"
    BINDINGS = [Binding("y", "copy", "Copy", show=False)]  # noqa: RUF012

    def __init__(self, ticket: str) -> None:
        super().__init__()
        self._ticket = ticket

    def words(self) -> Text:
        text = Text.assemble(("On the machine that joins, run:\n\n", DIM))
        text.append("commonweight-agent join -\n\n", BLUE)
        text.append("and paste this line (", DIM).append("y", f"bold {BLUE}")
        text.append(" copies it):\n\n", DIM)
        return text.append(self._ticket, f"bold {INK}")

    def action_copy(self) -> None:
        """Into the clipboard, where the terminal allows it."""
        self.app.copy_to_clipboard(self._ticket)
        self.notify("copied", timeout=2)


class PeerDialog(Dialog):
    """Everything about one peer, as it changes."""

    def __init__(self, peer: str, fleet: Callable[[], Fleet | None], now: Callable[[], float]):
        super().__init__()
        self._peer = peer
        self._fleet = fleet
        self._now = now

    def on_mount(self) -> None:
        self.set_interval(1.0, self.draw)

    def words(self) -> Table | Text:
        fleet = self._fleet()
        peer = fleet.peers.get(self._peer) if fleet else None
        if peer is None:
            return Text("This peer is no longer in the fleet.", DIM)
        self.query_one("#box").border_title = Text(called(peer))
        table = peer_table(peer, self._now(), max(self.query_one("#words").size.width, 40))
        own = [event for event in fleet.events if event.subject == peer.peer] if fleet else []
        for event in own[-EVENTS_SHOWN:]:
            glyph, tone = LEVELS[event.level]
            said = Text.assemble((f"{glyph} ", STYLES[tone]), event.text)
            table.add_row(f"{age(self._now() - event.at)} ago", said)
        return table


def peer_table(peer: Peer, now: float, width: int) -> Table:
    """What is known of `peer`, name and value a line, and the trend of its loss."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style=DIM, no_wrap=True)
    table.add_column(style=INK)
    state = state_cell(peer, now, 400)
    table.add_row("state", Text(state.text, STYLES[state.tone]))
    table.add_row("id", Text(peer.peer))
    labels = "  ".join(f"{key}={value}" for key, value in sorted(peer.labels.items()))
    table.add_row("labels", Text(labels or NOTHING))
    table.add_row("seen", f"{age(now - peer.seen_at)} ago" if peer.seen_at else "never")
    table.add_row("version", Text(peer.version or NOTHING))
    table.add_row("run", Text(f"{peer.run} · round {peer.round}" if peer.run else NOTHING))
    if sent := peer.telemetry:
        if sent.steps:
            done = f"{progress(sent.step, sent.steps, 16)} {sent.step}/{sent.steps} {sent.phase}"
            table.add_row("step", done)
        table.add_row("speed", f"{sent.samples_per_s:.0f} samples/s")
        table.add_row("sent", f"{amount(sent.bytes_up)} up · {amount(sent.bytes_down)} down")
        battery = "" if sent.battery_percent is None else f" · battery {sent.battery_percent:.0f} %"
        cpu = f"{sent.cpu_percent:.0f} % of a core · {amount(sent.memory_bytes)}"
        table.add_row("load", cpu + battery)
    table.add_row("messages", f"{peer.missed} missed · {peer.ignored} ignored")
    loss = decimal(peer.telemetry.loss) if peer.telemetry else NOTHING
    table.add_row("loss", Text(DIVERGED, VERMILION) if peer.diverged else loss)
    if peer.losses:
        drawn = shaded(bars(peer.losses, min(width - 14, 60), 3), BLUE)
        table.add_row("", Text("\n").join(drawn))
    return table
