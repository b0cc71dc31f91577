"""The monitor without its keys: the pages, drawn from the messages of a `Source`.

Messages are applied as they arrive and drawn four times a second; ages are drawn once a second. A
lost connection is shown and retried; it never ends the monitor.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from datetime import tzinfo
from pathlib import Path
from typing import ClassVar, TypeVar

from rich.text import Text
from textual import on, work
from textual.app import App, ComposeResult
from textual.events import Resize
from textual.filter import LineFilter
from textual.theme import Theme
from textual.widget import Widget
from textual.widgets import ContentSwitcher, Static

from coordinator.fleet.readings import current_run
from coordinator.fleet.state import Event, Fleet, Level
from coordinator.monitor.alerts import AlertTracker
from coordinator.monitor.fleet_layout import is_roomy
from coordinator.monitor.job_table import num_working
from coordinator.monitor.tui.actions import ActionTracker
from coordinator.monitor.tui.config import Config
from coordinator.monitor.tui.events_page import EventsPage
from coordinator.monitor.tui.fleet_page import FleetPage
from coordinator.monitor.tui.footer import Footer
from coordinator.monitor.tui.gc_tuning import TRIM_INTERVAL_S, trim_caches
from coordinator.monitor.tui.header import Header
from coordinator.monitor.tui.jobs_page import JobsPage
from coordinator.monitor.tui.keys import KeyMap
from coordinator.monitor.tui.messages import SHOWN_S, RecentMessages
from coordinator.monitor.tui.operator_details import OperatorDetails, Request
from coordinator.monitor.tui.page import Frame, Page
from coordinator.monitor.tui.peer_screen import PeerScreen
from coordinator.monitor.tui.rounds_page import RoundsPage
from coordinator.monitor.tui.sanitize_filter import SanitizeFilter
from coordinator.monitor.tui.tabs import Tabs
from coordinator.monitor.tui.theme import DEFAULT, THEMES, set_colors
from coordinator.remote.follower import FleetFollower, jittered
from coordinator.remote.formatting import age, stopwatch
from coordinator.remote.source import Source
from protocols.messages.states import ENDED

Part = TypeVar("Part", bound=Widget)
MIN_WIDTH, MIN_HEIGHT = 40, 12
DRAW_INTERVAL_S = 0.25
MAX_OWN_EVENTS = 200


def _ends_a_run(event: Event, fleet: Fleet) -> bool:
    """True if the event is about the end of a run."""
    run = fleet.runs.get(event.subject)
    return run is not None and run.changed.state in ENDED


class MonitorBase(App[None]):
    """The pages of a fleet. `clock` returns Unix s; `zone` is the time zone of event times."""

    CSS_PATH = Path(__file__).with_name("app.tcss")
    TITLE = "commonweight"
    #: True for a recording.
    replaying: ClassVar[bool] = False

    def __init__(
        self,
        source: Source,
        *,
        read_only: bool = False,
        config: Config | None = None,
        ascii_only: bool = False,
        clock: Callable[[], float] = time.time,
        zone: tzinfo | None = None,
        back_off: Callable[[int], float] = jittered,
    ) -> None:
        self.config = config or Config()
        self._sanitizer = SanitizeFilter(ascii_too=ascii_only or self.config.ascii)
        super().__init__()
        self.following = FleetFollower(source, clock, back_off)
        self.actions = ActionTracker(source, clock)
        self.details = OperatorDetails(source)
        self.key_map = KeyMap(self.config.keys, read_only, self.replaying)
        self.frozen = False
        self._source = source
        self._clock = clock
        self._zone = zone
        self._own_events: list[Event] = []
        self._events_seen: int | None = None
        self._alert_tracker = AlertTracker()
        self._alerts_shown = False
        self.messages = RecentMessages()
        for theme, _ in THEMES.values():
            self.register_theme(theme)
        self.set_keymap(self.config.keys)

    def get_line_filters(self) -> Sequence[LineFilter]:
        """Our filter comes last, so that no control character of any widget reaches the
        terminal."""
        return [*super().get_line_filters(), self._sanitizer]

    # --- structure ---

    def compose(self) -> ComposeResult:
        yield Header(self.following)
        yield Tabs()
        yield Static(id="connection-error")
        with ContentSwitcher(initial="fleet", id="pages"):
            yield FleetPage(self._zone, read_only=self.key_map.read_only)
            yield RoundsPage()
            yield EventsPage(self._zone)
            yield JobsPage()
        yield Footer(self.key_map, "fleet")
        yield Static(id="too-small")

    def on_mount(self) -> None:
        self.theme_changed_signal.subscribe(self, self._use_theme)
        wanted = self.config.theme or DEFAULT
        self.theme = wanted if wanted in self.available_themes else DEFAULT
        set_colors(self.current_theme)
        self.query_one(FleetPage).table.focus()
        self.run_worker(self.following.run(), name="following", exit_on_error=True)
        self.set_interval(DRAW_INTERVAL_S, self._draw_changes)
        self.set_interval(1.0, self._draw_ages)
        self.set_interval(TRIM_INTERVAL_S, trim_caches)
        self._draw(None)

    def _use_theme(self, theme: Theme) -> None:
        """Draw everything again: text contains its colors."""
        set_colors(theme)
        for page in self.pages:
            page.invalidate()
        self.call_after_refresh(self._draw, None)

    @property
    def page(self) -> str:
        """The id of the page that is open."""
        return str(self._part(ContentSwitcher).current)

    @property
    def pages(self) -> list[Page]:
        return list(self.screen_stack[0].query(Page))

    @property
    def current_page(self) -> Page:
        """The page that is open, also while another screen covers it."""
        return self.screen_stack[0].query_one(f"#{self.page}", Page)

    @property
    def fleet(self) -> Fleet | None:
        return self.following.fleet

    @property
    def events(self) -> list[Event]:
        """The fleet's events and this monitor's own, in order of time."""
        both = [*(self.fleet.events if self.fleet else []), *self._own_events]
        return sorted(both, key=lambda event: event.at)

    @property
    def peer_screen(self) -> PeerScreen | None:
        """The peer's screen, if it is open."""
        return next((one for one in self.screen_stack if isinstance(one, PeerScreen)), None)

    # --- drawing ---

    def _draw_changes(self) -> None:
        following = self.following
        if (following.all_changed or following.changed_peers) and not self.frozen:
            self._draw(None if following.all_changed else list(following.changed_peers))

    def _draw(self, dirty: Iterable[str] | None) -> None:
        """Draw the open page: the rows of `dirty` peers, or everything if None."""
        if not self.is_running or not self.screen_stack:  # closing: the pages may be gone already
            return
        self.following.mark_drawn()
        now = self._clock()
        self._show_notices()
        if (screen := self.peer_screen) is not None:
            if dirty is None or screen.peer in dirty:
                screen.draw()
        else:
            self.current_page.error = self.following.error
            self.current_page.draw(Frame(self.fleet, now, dirty, lambda: self.events, self.details))
        self._show_new_events()
        self._read_details(now)
        self._draw_frame(now)

    def _draw_ages(self) -> None:
        if not self.is_running or not self.screen_stack:
            return
        now = self._clock()
        self._show_notices()
        self._show_alerts(now)
        if not self.frozen and self.peer_screen is None:
            self.current_page.refresh_ages(now)
        self._read_details(now)
        self._draw_frame(now)

    def _read_details(self, now: float) -> None:
        """Ask for what only operators get, if a page shows it."""
        requests, page = [], self.page if is_roomy(*self.size) else ""
        if self.fleet is not None and (self.peer_screen is not None or page == "rounds"):
            requests = self.details.of_run(self.fleet, now)
        elif page == "jobs" and (job := self._part(JobsPage).current_job) is not None:
            requests = self.details.of_job(job, now)
        for request in requests:
            self._await_details(request)

    @work
    async def _await_details(self, request: Request) -> None:
        await request
        self._draw(None)

    def _draw_frame(self, now: float) -> None:
        """Draw the header, the tabs and the connection error."""
        header, tabs = self._part(Header), self._part(Tabs)
        header.now = now
        header.refresh()
        view = [self.actions.summary, self.playback, self.current_page.view_text]
        view += ["frozen: u continues"] if self.frozen else []
        tabs.view_text = " · ".join(filter(None, view))
        tabs.run = current_run(self.fleet) if self.fleet else None
        tabs.num_jobs = num_working(self.fleet) if self.fleet else 0
        tabs.refresh()
        self._draw_message()
        lost = not self.following.connected and self.following.error is not None
        banner = self.screen_stack[0].query_one("#connection-error", Static)
        banner.display = lost
        for screen in self.screen_stack:
            screen.set_class(lost, "-stale")
        if lost:
            banner.update(self._connection_error(now))

    @property
    def playback(self) -> str:
        """The position in the recording; "" in a live monitor."""
        return ""

    def _connection_error(self, now: float) -> Text:
        following = self.following
        error, retry_at, fresh_at = following.error, following.retry_at, following.fresh_at
        parts = [
            f"stale {stopwatch(now - fresh_at)}" if fresh_at else "no data yet",
            "trying now" if retry_at is None else f"retry in {age(retry_at - now)}",
            f"{error.message}. {error.hint}".rstrip(" .") if error else "",
        ]
        return Text(f"✕ {' · '.join(parts)}", no_wrap=True, overflow="ellipsis")

    def _part(self, kind: type[Part]) -> Part:
        """A widget of the main screen, also while another screen covers it."""
        return self.screen_stack[0].query_one(kind)

    # --- events and messages ---

    def _show_new_events(self) -> None:
        """Show new warnings, errors and ends of runs; those of the first snapshot are old."""
        fleet = self.fleet
        if fleet is None:
            return
        seen, self._events_seen = self._events_seen, fleet.num_events
        if seen is None or fleet.num_events <= seen:
            return
        received = fleet.events[seen - fleet.num_events :]
        for event in received:
            if event.level != "info" or _ends_a_run(event, fleet):
                self.show_message(event.level, event.text)

    def _show_notices(self) -> None:
        for notice in self.actions.take_notices(self.fleet):
            self.announce(*notice)

    def _show_alerts(self, now: float) -> None:
        """Add new alerts to the events. Those of the first snapshot get no message."""
        if self.fleet is None or not self.following.connected:
            return  # old data cannot raise new alerts
        first, self._alerts_shown = not self._alerts_shown, True
        for alert in self._alert_tracker.new(self.fleet, now):
            self.announce(alert.level, alert.text, alert.subject, message=not first)

    def show_message(self, level: Level, text: str, shown_s: float = SHOWN_S) -> None:
        """Show `text` in the footer for a while."""
        self.messages.add(level, text, time.monotonic(), shown_s)
        self._draw_message()

    def _draw_message(self) -> None:
        message = self.messages.current(time.monotonic())
        for screen in self.screen_stack:
            for footer in screen.query(Footer):
                footer.message = message

    def announce(self, level: Level, text: str, subject: str = "", *, message: bool = True) -> None:
        """Add an event of this monitor, and show it in the footer."""
        event = Event(at=self._clock(), level=level, text=text, subject=subject)
        self._own_events = [*self._own_events, event][-MAX_OWN_EVENTS:]
        if message:
            self.show_message(level, text)
        self.following.all_changed = True

    @on(Page.ViewChanged)
    def _view_changed(self) -> None:
        self._draw(None)

    def on_resize(self, event: Resize) -> None:
        width, height = event.size
        self.screen_stack[0].set_class(is_roomy(width, height), "-roomy")
        small = width < MIN_WIDTH or height < MIN_HEIGHT
        self.screen_stack[0].set_class(small, "-small")
        self.screen_stack[0].query_one("#too-small", Static).update(
            f"commonweight needs at least {MIN_WIDTH}×{MIN_HEIGHT}; "
            f"this terminal is {width}×{height}"
        )
