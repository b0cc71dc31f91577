"""The monitor: the fleet in a terminal, drawn from what a Source brings.

Messages are folded as they come and drawn four times a second; ages move once a second. A link
that is down is shown and tried again; it never ends the monitor.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from datetime import tzinfo
from functools import partial
from typing import ClassVar, TypeVar

from rich.text import Text
from textual import on, work
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import BindingType
from textual.events import Resize
from textual.screen import Screen
from textual.widget import Widget
from textual.widgets import ContentSwitcher, DataTable, Static

from coordinator.fleet import Event, Fleet, Level, called
from coordinator.tui.dialogs import HelpDialog, PeerDialog, TicketDialog
from coordinator.tui.events_page import EventsPage
from coordinator.tui.fleet_page import FleetPage
from coordinator.tui.following import Following, jittered
from coordinator.tui.footer import Footer
from coordinator.tui.header import Header
from coordinator.tui.keys import KEYS, bindings
from coordinator.tui.rounds_page import RoundsPage
from coordinator.tui.tabs import Tabs
from coordinator.tui.theme import THEME
from coordinator.watch import Action, Source
from coordinator.words import age, stopwatch
from protocols.errors import CommonweightError

Part = TypeVar("Part", bound=Widget)
LEAST_WIDTH, LEAST_HEIGHT = 40, 12
DRAW_S = 0.25
COMMANDS_AT_ONCE = 8
TOASTS_AT_ONCE = 3
OWN_EVENTS_KEPT = 200


class MonitorApp(App[None]):
    """`commonweight monitor`. `clock` gives Unix s; `zone` is for the times of events."""

    CSS_PATH = "app.tcss"
    TITLE = "commonweight"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = bindings()

    def __init__(
        self,
        source: Source,
        *,
        read_only: bool = False,
        clock: Callable[[], float] = time.time,
        zone: tzinfo | None = None,
        back_off: Callable[[int], float] = jittered,
    ) -> None:
        super().__init__()
        self.following = Following(source, clock, back_off)
        self.read_only = read_only
        self.frozen = False
        self._source = source
        self._clock = clock
        self._zone = zone
        self._own_events: list[Event] = []
        self._events_seen: int | None = None

    # --- structure ---

    def compose(self) -> ComposeResult:
        yield Header(self.following)
        yield Tabs()
        yield Static(id="trouble")
        with ContentSwitcher(initial="fleet", id="pages"):
            yield FleetPage(read_only=self.read_only)
            yield RoundsPage()
            yield EventsPage(self._zone)
        yield Footer(read_only=self.read_only)
        yield Static(id="too-small")

    def on_mount(self) -> None:
        self.register_theme(THEME)
        self.theme = THEME.name
        self.query_one("#trouble").display = False
        self.query_one(FleetPage).table.focus()
        self.run_worker(self.following.run(), name="following", exit_on_error=True)
        self.set_interval(DRAW_S, self._draw_news)
        self.set_interval(1.0, self._draw_ages)
        self._draw(None)

    @property
    def page(self) -> str:
        """The id of the page that is open."""
        return str(self._main(ContentSwitcher).current)

    @property
    def fleet(self) -> Fleet | None:
        return self.following.fleet

    @property
    def events(self) -> list[Event]:
        """The fleet's events and this monitor's own, in order of time."""
        both = [*(self.fleet.events if self.fleet else []), *self._own_events]
        return sorted(both, key=lambda event: event.at)

    # --- drawing ---

    def _draw_news(self) -> None:
        news = self.following
        if (news.whole or news.dirty) and not self.frozen:
            self._draw(None if news.whole else list(news.dirty))

    def _draw(self, dirty: Iterable[str] | None) -> None:
        """Draw the open page: the rows of `dirty` peers, or everything if None."""
        if not self.is_running:  # it closes: the pages may be gone already
            return
        self.following.clean()
        now = self._clock()
        if self.page == "fleet":
            self._main(FleetPage).draw(self.fleet, now, dirty)
        elif self.page == "rounds":
            self._main(RoundsPage).draw(self.fleet)
        else:
            self._main(EventsPage).draw(self.events)
        self._toast_new_events()
        self._draw_frame(now)

    def _draw_ages(self) -> None:
        if not self.is_running:
            return
        now = self._clock()
        if self.page == "fleet" and not self.frozen:
            self._main(FleetPage).ages(now)
        self._draw_frame(now)

    def _draw_frame(self, now: float) -> None:
        header, tabs = self._main(Header), self._main(Tabs)
        header.now = now
        header.refresh()
        view = [self._main(FleetPage).view] if self.page == "fleet" else []
        view += (
            ["warnings and errors"]
            if self.page == "events" and self._main(EventsPage).faults
            else []
        )
        view += ["frozen: u goes on"] if self.frozen else []
        tabs.view = " · ".join(word for word in view if word)
        news = self.following
        lost = not news.connected and (news.trouble is not None)
        trouble = self.screen_stack[0].query_one("#trouble", Static)
        trouble.display = lost
        self.screen_stack[0].set_class(lost, "-stale")
        if lost:
            trouble.update(self._trouble(now))

    def _trouble(self, now: float) -> Text:
        news = self.following
        trouble = news.trouble
        why = f"{trouble.message}. {trouble.hint}".rstrip(" .") if trouble else ""
        parts = [f"stale {stopwatch(now - news.fresh_at)}"] if news.fresh_at else ["no data yet"]
        if news.retry_at is not None:
            parts.append(f"retry in {age(news.retry_at - now)}")
        else:
            parts.append("trying now")
        return Text(f"✕ {' · '.join(parts)} · {why}", no_wrap=True, overflow="ellipsis")

    def _main(self, kind: type[Part]) -> Part:
        """A part of the main screen, also while a dialog lies over it."""
        return self.screen_stack[0].query_one(kind)

    # --- events and toasts ---

    def _toast_new_events(self) -> None:
        """Toast the warnings and errors that came since the last look; a snapshot's are old."""
        fleet = self.fleet
        if fleet is None:
            return
        seen, self._events_seen = self._events_seen, fleet.num_events
        if seen is None or fleet.num_events <= seen:
            return
        new = [event for event in fleet.events[seen - fleet.num_events :] if event.level != "info"]
        for event in new[-TOASTS_AT_ONCE:]:
            self._toast(event)
        if len(new) > TOASTS_AT_ONCE:
            self.notify(f"and {len(new) - TOASTS_AT_ONCE} more: 3 shows all", markup=False)

    def _toast(self, event: Event) -> None:
        severity = "information" if event.level == "info" else event.level
        self.notify(event.text, severity=severity, markup=False)

    def _say(self, level: Level, text: str, subject: str = "") -> None:
        """A toast of this monitor's own; it is kept among the events."""
        event = Event(at=self._clock(), level=level, text=text, subject=subject)
        self._own_events = [*self._own_events, event][-OWN_EVENTS_KEPT:]
        self._toast(event)
        self.following.whole = True

    def _fail(self, what: str, err: CommonweightError) -> None:
        hint = f" {err.hint}" if err.hint else ""
        self._say("error", f"{what}: {err.message}.{hint}")

    # --- keys ---

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if self.read_only and action in ("command", "ticket"):
            return False
        dialog = len(self.screen_stack) > 1
        return not (dialog and any(key.action.split("(")[0] == action for key in KEYS))

    def action_page(self, page: str) -> None:
        self._main(ContentSwitcher).current = page
        self._main(Tabs).page = self._main(Footer).page = page
        tables = {"fleet": "#peers", "rounds": "#closed", "events": "#said"}
        self.screen.query_one(tables[page]).focus()
        self.call_after_refresh(self._draw, None)

    def action_mark(self) -> None:
        if self.page == "fleet":
            self._main(FleetPage).toggle_mark()

    def action_filter(self) -> None:
        self.action_page("fleet")
        self._main(FleetPage).ask_filter()

    def action_faults(self) -> None:
        page = self._main(EventsPage) if self.page == "events" else self._main(FleetPage)
        page.faults = not page.faults
        self._draw(None)

    def action_sort(self, step: int) -> None:
        self._main(FleetPage).next_sort(step)

    def action_reverse(self) -> None:
        page = self._main(FleetPage)
        page.reverse = not page.reverse
        self._draw(None)

    def action_zoom(self) -> None:
        for page in (self._main(FleetPage), self._main(RoundsPage)):
            page.zoomed = not page.zoomed
        self._main(FleetPage).lay_out()
        self._draw(None)

    def action_plain(self) -> None:
        if self.page == "fleet":
            self._main(FleetPage).clear()

    def action_freeze(self) -> None:
        self.frozen = not self.frozen
        self._draw(None) if not self.frozen else self._draw_frame(self._clock())

    def action_reconnect(self) -> None:
        self.following.reconnect()
        self._say("info", "trying the links again")

    def action_help(self) -> None:
        self.push_screen(HelpDialog(read_only=self.read_only))

    def action_command(self, action: Action) -> None:
        page = self._main(FleetPage)
        here = page.under_cursor
        peers = sorted(page.marked) or ([here] if here else [])
        if self.page == "fleet" and peers:
            self._command(action, peers)

    @work
    async def _command(self, action: Action, peers: list[str]) -> None:
        """Ask all peers; what really came of it is seen when they say so themselves."""
        places = asyncio.Semaphore(COMMANDS_AT_ONCE)

        async def ask(peer: str) -> tuple[str, str | CommonweightError]:
            async with places:
                try:
                    return peer, await self._source.command(peer, action)
                except CommonweightError as err:
                    return peer, err

        answers = await asyncio.gather(*map(ask, peers))
        done = [(peer, words) for peer, words in answers if isinstance(words, str)]
        if len(done) == 1:
            self._say("info", f"{self._called(done[0][0])}: {done[0][1]}", done[0][0])
        elif done:
            self._say("info", f"{action}: {len(done)} peers asked")
        for peer, answer in answers:
            if isinstance(answer, CommonweightError):
                self._fail(f"{action} {self._called(peer)}", answer)

    def _called(self, peer: str) -> str:
        known = self.fleet.peers.get(peer) if self.fleet else None
        return called(known) if known else peer

    @work(exclusive=True, group="ticket")
    async def action_ticket(self) -> None:
        try:
            ticket = await self._source.ticket()
        except CommonweightError as err:
            self._fail("no ticket was made", err)
        else:
            self._say("info", "a ticket was made")
            self.push_screen(TicketDialog(ticket))

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        for key in KEYS:
            if key.shown not in ("enter", "^p") and not (self.read_only and key.changes):
                run = partial(self.run_action, key.action)
                yield SystemCommand(f"{key.shown}  {key.meaning}", "", run)

    # --- what the parts report ---

    @on(FleetPage.Viewed)
    def _view_changed(self) -> None:
        self._draw(None)

    @on(DataTable.RowSelected, "#peers")
    def _open_peer(self) -> None:
        if (peer := self._main(FleetPage).under_cursor) is not None:
            self.push_screen(PeerDialog(peer, lambda: self.fleet, self._clock))

    def on_resize(self, event: Resize) -> None:
        width, height = event.size
        small = width < LEAST_WIDTH or height < LEAST_HEIGHT
        self.screen_stack[0].set_class(small, "-small")
        self.screen_stack[0].query_one("#too-small", Static).update(
            f"commonweight needs at least {LEAST_WIDTH}×{LEAST_HEIGHT}; "
            f"this terminal is {width}×{height}"
        )
