"""One peer: overview, metrics, its log on request, and what its owner lets others know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import tzinfo
from typing import ClassVar

from rich.console import Group
from rich.style import Style
from rich.table import Table
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import Screen
from textual.widgets import Static

from coordinator.fleet.reducer import Event, Fleet, Peer, called, shown_state
from coordinator.monitor.peer_table import (
    LEVELS,
    PARTICIPATION_GLYPHS,
    Cell,
    links,
    state_cell,
    status_dot,
)
from coordinator.monitor.tui.events_page import format_time
from coordinator.monitor.tui.filter_bar import FilterBar
from coordinator.monitor.tui.footer import Footer
from coordinator.monitor.tui.header import Header
from coordinator.monitor.tui.plots import curve_plot
from coordinator.monitor.tui.theme import colors, styles, to_text
from coordinator.remote.follower import FleetFollower
from coordinator.remote.formatting import (
    DIVERGED,
    NOTHING,
    age,
    decimal,
    format_bytes,
    progress,
    rate,
)
from coordinator.remote.source import Source
from protocols.errors import CommonweightError
from protocols.messages.envelope import LogLine
from protocols.messages.states import PeerState

TABS = ("overview", "metrics", "log", "policy")
MAX_EVENTS = 8
MIN_TWO_COLUMNS = 100
LOG_REFRESH_S = 5.0


class PeerScreen(Screen[None]):
    """Everything about one peer, as it changes."""

    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(n), f"tab('{tab}')", tab, show=False) for n, tab in enumerate(TABS, 1)),
        Binding("tab,right,l", "turn(1)", "Next tab", show=False),
        Binding("shift+tab,left,h", "turn(-1)", "Tab before", show=False),
        Binding("escape,q,backspace", "back", "Back", show=False),
        Binding("slash", "filter", "Filter the log", show=False),
        Binding("exclamation_mark", "faults", "Faults only", show=False),
        Binding("j,down", "scroll(1)", "Down", show=False),
        Binding("k,up", "scroll(-1)", "Up", show=False),
    ]

    def __init__(
        self,
        peer: str,
        following: FleetFollower,
        source: Source,
        footer: Footer,
        clock: Callable[[], float],
        zone: tzinfo | None = None,
    ) -> None:
        super().__init__()
        self.peer = peer
        self.open_tab = "overview"
        self.faults_only = False
        self.follow = True
        self._following, self._source = following, source
        self._footer, self._clock, self._zone = footer, clock, zone
        self._log_lines: Sequence[LogLine] | None = None
        self._log_error = ""

    def compose(self) -> ComposeResult:
        yield Header(self._following)
        yield Static(id="peer-tabs")
        yield FilterBar("words in the log")
        with VerticalScroll(id="peer-body", can_focus=True):
            yield Static(id="peer-words")
        yield self._footer

    def on_mount(self) -> None:
        self.query_one("#peer-body").focus()
        self.set_interval(1.0, self.draw)
        self.set_interval(LOG_REFRESH_S, self._refresh_log)
        self.call_after_refresh(self.draw)

    def on_resize(self) -> None:
        """The words depend on the room there is, known after this."""
        self.call_after_refresh(self.draw)

    # --- drawing ---

    def draw(self) -> None:
        """Show the open tab as things are now."""
        if not self.is_mounted:  # it is the current screen before it has any parts
            return
        header = self.query_one(Header)
        header.now = self._clock()
        header.refresh()
        fleet = self._following.fleet
        peer = fleet.peers.get(self.peer) if fleet else None
        self.query_one("#peer-tabs", Static).update(self._tab_line(peer))
        words = self.query_one("#peer-words", Static)
        if peer is None or fleet is None:
            words.update(Text("This peer is not in the fleet.", colors().dim))
        else:
            words.update(self._content(peer, fleet))

    def _tab_line(self, peer: Peer | None) -> Text:
        own = colors()
        line = Text(no_wrap=True, overflow="ellipsis", end="")
        line.append(called(peer) if peer else self.peer, Style(color=own.strong, bold=True))
        line.append("   ")
        for number, tab in enumerate(TABS, 1):
            click = Style(meta={"@click": f"screen.tab('{tab}')"})
            here = tab == self.open_tab
            word = (
                Style(color=own.strong, bold=True, underline=True) if here else Style(color=own.dim)
            )
            line.append(f"{number} ", Style(color=own.blue if here else own.faint) + click)
            line.append(tab.capitalize(), word + click).append("  ")
        return line

    def _content(self, peer: Peer, fleet: Fleet) -> Table | Text:
        width = max(self.query_one("#peer-words").size.width, 30)
        if self.open_tab == "overview":
            height = self.query_one("#peer-body").size.height - 2
            return overview(peer, fleet, self._clock(), width, height)
        if self.open_tab == "metrics":
            return metrics(peer, width, max(self.query_one("#peer-body").size.height - 8, 3))
        if self.open_tab == "policy":
            return policy(peer)
        return self._log_table()

    def _log_table(self) -> Table | Text:
        own = colors()
        if self._log_lines is None:
            return Text(
                self._log_error or "Asking the agent…",
                own.vermilion if self._log_error else own.dim,
            )
        words = self.query_one(FilterBar).text.casefold().split()
        table = Table.grid(padding=(0, 1))
        table.add_column(width=8, style=own.dim)
        table.add_column(width=1)
        table.add_column()
        shown = [
            line
            for line in self._log_lines
            if (not self.faults_only or line.level in ("warning", "error"))
            and all(word in line.text.casefold() for word in words)
        ]
        for line in shown:
            glyph, tone = LEVELS.get(line.level, LEVELS["info"])
            text = Text(line.text, styles()[tone] if tone != "quiet" else own.text)
            table.add_row(format_time(line.at, self._zone), Text(glyph, styles()[tone]), text)
        if not shown:
            return Text("No line fits." if self._log_lines else "Its log is empty.", own.dim)
        return table

    # --- what a person does ---

    def action_back(self) -> None:
        """Close an open filter, else go back to the fleet."""
        bar = self.query_one(FilterBar)
        if bar.display:
            bar.clear()
            self.query_one("#peer-body").focus()
        else:
            self.dismiss(None)

    def action_tab(self, tab: str) -> None:
        self.open_tab = tab
        self.query_one("#peer-body", VerticalScroll).scroll_home(animate=False)
        if tab == "log":
            self.fetch_log()
        self.draw()

    def action_turn(self, step: int) -> None:
        self.action_tab(TABS[(TABS.index(self.open_tab) + step) % len(TABS)])

    def action_scroll(self, step: int) -> None:
        self.query_one("#peer-body", VerticalScroll).scroll_relative(y=step, animate=False)

    def action_filter(self) -> None:
        if self.open_tab == "log":
            self.query_one(FilterBar).open()

    def action_faults(self) -> None:
        self.faults_only = not self.faults_only
        self.draw()

    @on(FilterBar.Changed)
    def _filter_changed(self) -> None:
        self.draw()

    @on(FilterBar.Submitted)
    def _filter_done(self) -> None:
        self.query_one("#peer-body").focus()

    def _refresh_log(self) -> None:
        if self.open_tab == "log" and self.follow and self.is_current:
            self.fetch_log()

    @work(exclusive=True, group="log")
    async def fetch_log(self) -> None:
        """Ask the agent for its last lines; what was shown stays if it does not answer."""
        body = self.query_one("#peer-body", VerticalScroll)
        at_foot = self._log_lines is None or body.scroll_offset.y >= body.max_scroll_y - 1
        try:
            self._log_lines = await self._source.logs(self.peer)
        except CommonweightError as err:
            self._log_error = f"{err.message}. {err.hint}".rstrip(" .")
        self.draw()
        if at_foot and self.open_tab == "log":
            self.call_after_refresh(body.scroll_end, animate=False)


def _grid() -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style=colors().dim, no_wrap=True)
    table.add_column(style=colors().text)
    return table


def overview(peer: Peer, fleet: Fleet, now: float, width: int, height: int) -> Table:
    """What is known of `peer`, and what was said of it last; its losses beside it if wide."""
    left = _facts(peer, now)
    own = [event for event in fleet.events if event.subject == peer.peer]
    room = max(height - left.row_count - 2, 3) if width < MIN_TWO_COLUMNS else MAX_EVENTS
    told = _event_table(own[-min(room, MAX_EVENTS) :], now)
    table = Table.grid(padding=(0, 3))
    if width < MIN_TWO_COLUMNS:
        table.add_row(left)
        table.add_row("")
        table.add_row(told)
        return table
    half = (width - 3) // 2
    plot = loss_plot(peer, half, min(max(height - MAX_EVENTS, 8), 14))
    table.add_column(width=half)
    table.add_column(width=half)
    table.add_row(left, Group(*plot, "", told))
    return table


def _facts(peer: Peer, now: float) -> Table:
    table = _grid()
    table.add_row("state", to_text(state_cell(peer, now, 400)))
    table.add_row("id", Text(peer.peer))
    labels = "  ".join(f"{key}={value}" for key, value in sorted(peer.labels.items()))
    table.add_row("labels", Text(labels or NOTHING))
    table.add_row("seen", f"{age(now - peer.seen_at)} ago" if peer.seen_at else "never")
    if peer.standing == "enrolled":
        mqtt, flower = links(peer, now)
        table.add_row("links", f"mqtt {status_dot(mqtt)} · flower {status_dot(flower)}")
    table.add_row("version", Text(peer.version or NOTHING))
    table.add_row("run", Text(f"{peer.run} · round {peer.round}" if peer.run else NOTHING))
    if sent := peer.telemetry:
        if sent.steps and shown_state(peer, now) in (PeerState.TRAINING, PeerState.SENDING):
            done = f"{progress(sent.step, sent.steps, 16)} {sent.step}/{sent.steps} {sent.phase}"
            table.add_row("step", done)
        table.add_row(
            "sent", f"{format_bytes(sent.bytes_up)} up · {format_bytes(sent.bytes_down)} down"
        )
    if peer.given:
        part = Text(peer.given.translate(PARTICIPATION_GLYPHS).strip(), colors().green)
        count = f"  {peer.given.count('1')} of the last {len(peer.given)} rounds"
        table.add_row("took part", part.append(count, colors().dim))
    disk = format_bytes(peer.disk_free_bytes) if peer.disk_free_bytes else NOTHING
    table.add_row("disk left", disk)
    table.add_row("clock", _describe_skew(peer.skew_s))
    table.add_row("messages", f"{peer.missed} missed · {peer.ignored} ignored")
    return table


def _describe_skew(skew_s: float) -> str:
    if abs(skew_s) < 1:
        return "right to a second"
    return f"{age(abs(skew_s))} {'ahead' if skew_s > 0 else 'behind'}"


def _event_table(events: Sequence[Event], now: float) -> Table:
    """The last that was said of it."""
    table = Table.grid(padding=(0, 1))
    table.add_column(style=colors().dim, justify="right", no_wrap=True)
    table.add_column(width=1)
    table.add_column(style=colors().text)
    for event in events:
        glyph, tone = LEVELS[event.level]
        table.add_row(f"{age(now - event.at)} ago", Text(glyph, styles()[tone]), Text(event.text))
    return table


def loss_plot(peer: Peer, width: int, height: int) -> list[Text]:
    """Its training losses in this run."""
    rounds = (1, len(peer.losses))
    plot = curve_plot("Training loss", peer.losses, width, height, colors().blue, rounds=rounds)
    if peer.losses:
        plot[-1] = Text("its last reports, the newest at the right", colors().dim)
    return plot


def metrics(peer: Peer, width: int, height: int) -> Table:
    """What it measures while it works, and its losses in this run as a plot."""
    sent = peer.telemetry
    table = _grid()
    if sent is not None:
        loss = to_text(Cell(DIVERGED, "bad")) if peer.diverged else decimal(sent.loss)
        table.add_row("loss", loss)
        table.add_row("speed", f"{rate(sent.samples_per_s)[:-2]} samples/s")
        table.add_row("processor", f"{sent.cpu_percent:.0f} %")
        table.add_row("memory", format_bytes(sent.memory_bytes))
        battery = NOTHING if sent.battery_percent is None else f"{sent.battery_percent:.0f} %"
        table.add_row("battery", battery)
    else:
        table.add_row("", Text("It has measured nothing yet.", colors().dim))
    whole = Table.grid()
    whole.add_row(table)
    if peer.losses:
        whole.add_row("")
        whole.add_row(Group(*loss_plot(peer, width, min(height, 16))))
    return whole


def policy(peer: Peer) -> Table:
    """The settings that its owner lets others know of; nobody can change them from here."""
    table = _grid()
    table.add_row("tasks", Text(", ".join(peer.tasks) or "none: it gets no work"))
    for name, value in sorted(peer.policy.items()):
        table.add_row(Text(name), Text(value or NOTHING))
    table.add_row("", "")
    words = "On that machine: commonweight-agent policy set NAME VALUE"
    table.add_row("", Text(words, colors().dim))
    return table
