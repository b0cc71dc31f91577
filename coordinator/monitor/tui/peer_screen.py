"""The screen of one peer: overview, metrics, its log on request, and its shared settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import tzinfo
from typing import ClassVar

from rich.style import Style
from rich.table import Table
from rich.text import Text
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import Screen
from textual.widgets import Static

from coordinator.fleet.readings import display_name
from coordinator.fleet.state import Fleet, Peer
from coordinator.monitor.fleet_layout import is_roomy
from coordinator.monitor.peer_table import LEVELS
from coordinator.monitor.tui.filter_bar import FilterBar
from coordinator.monitor.tui.footer import Footer
from coordinator.monitor.tui.header import Header
from coordinator.monitor.tui.operator_details import OperatorDetails
from coordinator.monitor.tui.peer_details import metrics, overview, policy
from coordinator.monitor.tui.tabs import tab_labels
from coordinator.monitor.tui.theme import colors, styles
from coordinator.monitor.tui.times import format_time
from coordinator.remote.follower import FleetFollower
from coordinator.remote.source import Source
from protocols.errors import CommonweightError, Refused
from protocols.messages.envelope import LogLine

TABS = ("overview", "metrics", "log", "policy")
LOG_REFRESH_S = 5.0


class PeerScreen(Screen[None]):
    """Everything about one peer, updated once a second."""

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
        details: OperatorDetails,
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
        self._details = details
        self._footer, self._clock, self._zone = footer, clock, zone
        self._log_lines: Sequence[LogLine] | None = None
        self._log_error = ""

    def compose(self) -> ComposeResult:
        yield Header(self._following)
        tabs = Static(id="peer-tabs")
        tabs.auto_links = False  # keep our colors instead of those of links
        yield tabs
        yield FilterBar("words in the log")
        with VerticalScroll(id="peer-body", can_focus=True):
            yield Static(id="peer-content")
        yield self._footer

    def on_mount(self) -> None:
        self.query_one("#peer-body").focus()
        self.set_interval(1.0, self.draw)
        self.set_interval(LOG_REFRESH_S, self._refresh_log)
        self._lay_out()

    def on_resize(self) -> None:
        self._lay_out()

    # --- drawing ---

    def draw(self) -> None:
        """Draw the open tab."""
        if not self.is_mounted:  # a screen is current before it has widgets
            return
        header = self.query_one(Header)
        header.now = self._clock()
        header.refresh()
        fleet = self._following.fleet
        peer = fleet.peers.get(self.peer) if fleet else None
        self.query_one("#peer-tabs", Static).update(self._tab_line(peer))
        content = self.query_one("#peer-content", Static)
        if peer is None or fleet is None:
            content.update(Text("This peer is not in the fleet.", colors().dim))
        else:
            content.update(self._content(peer, fleet))

    def _lay_out(self) -> None:
        """Give the tab its border, and draw it once the new layout is known.

        On a large terminal, two of the tabs have panels with borders of their own.
        """
        body, is_list = self.query_one("#peer-body"), self.open_tab in ("log", "policy")
        roomy = is_roomy(*self.app.size)
        body.set_class(roomy and is_list, "-framed")
        body.set_class(roomy and not is_list, "-filled")
        body.border_title = "Log" if self.open_tab == "log" else "Shared settings"
        self.call_after_refresh(self.draw)

    def _tab_line(self, peer: Peer | None) -> Text:
        line = Text(no_wrap=True, overflow="ellipsis", end="")
        name = display_name(peer) if peer else self.peer
        line.append(name, Style(color=colors().strong, bold=True)).append("   ")
        for label in tab_labels(TABS, self.open_tab, "screen.tab"):
            line.append_text(label).append("  ")
        return line

    def _content(self, peer: Peer, fleet: Fleet) -> Table | Text:
        width = max(self.query_one("#peer-content").size.width, 30)
        body, roomy = self.query_one("#peer-body"), is_roomy(*self.app.size)
        size = (width, body.size.height - (0 if roomy else body.styles.padding.height))
        found = self._details.evaluations
        match self.open_tab:
            case "overview":
                return overview(peer, fleet, found, self._clock(), size, roomy=roomy)
            case "metrics":
                return metrics(peer, fleet, found, size, roomy=roomy)
            case "policy":
                return policy(peer)
            case _:
                return self._log_table()

    def _log_table(self) -> Table | Text:
        own = colors()
        if self._log_lines is None:
            return Text(
                self._log_error or "Fetching the log…",
                own.vermilion if self._log_error else own.dim,
            )
        matches = self.query_one(FilterBar).matcher()
        table = Table.grid(padding=(0, 1))
        table.add_column(width=8, style=own.dim)
        table.add_column(width=1)
        table.add_column()
        shown = [
            line
            for line in self._log_lines
            if matches(line.text) and (not self.faults_only or line.level in ("warning", "error"))
        ]
        for line in shown:
            glyph, tone = LEVELS.get(line.level, LEVELS["info"])
            text = Text(line.text, styles()[tone] if tone != "quiet" else own.text)
            table.add_row(format_time(line.at, self._zone), Text(glyph, styles()[tone]), text)
        if not shown:
            return Text("No line matches." if self._log_lines else "Its log is empty.", own.dim)
        return table

    # --- input ---

    def action_back(self) -> None:
        """Close an open filter, else the screen."""
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
        self._lay_out()

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
        """Fetch the last lines from the agent; the old ones stay if it does not answer."""
        body = self.query_one("#peer-body", VerticalScroll)
        at_foot = self._log_lines is None or body.scroll_offset.y >= body.max_scroll_y - 1
        try:
            self._log_lines = await self._source.ask(lambda remote: remote.logs(self.peer))
        except CommonweightError as err:
            self.follow = err.code != Refused.code  # an observer is refused each time
            self._log_error = f"{err.message}. {err.hint}".rstrip(" .")
        self.draw()
        if at_foot and self.open_tab == "log":
            self.call_after_refresh(body.scroll_end, animate=False)
