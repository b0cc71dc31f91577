"""The monitor: the fleet in a terminal, and the actions of its keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on, work
from textual.app import SystemCommand
from textual.binding import BindingType
from textual.screen import ModalScreen, Screen
from textual.widgets import ContentSwitcher, Input

from coordinator.api.schema import TicketRequest
from coordinator.fleet.readings import current_run, display_name
from coordinator.monitor.confirmations import OperatorAction
from coordinator.monitor.job_table import is_working
from coordinator.monitor.peer_table import peer_name
from coordinator.monitor.tui import export
from coordinator.monitor.tui.base_app import MonitorBase
from coordinator.monitor.tui.cell_table import CellTable
from coordinator.monitor.tui.dialogs import ConfirmDialog, HelpDialog, TicketDialog
from coordinator.monitor.tui.events_page import EventsPage
from coordinator.monitor.tui.fleet_page import FleetPage
from coordinator.monitor.tui.footer import Footer
from coordinator.monitor.tui.jobs_page import JobsPage
from coordinator.monitor.tui.keys import KEYS, bindings
from coordinator.monitor.tui.page import FilterPage
from coordinator.monitor.tui.peer_screen import PeerScreen
from coordinator.monitor.tui.rounds_page import RoundsPage
from coordinator.monitor.tui.run_form import RunForm
from coordinator.monitor.tui.tabs import Tabs
from coordinator.monitor.tui.theme import THEMES
from protocols.errors import CommonweightError
from protocols.messages.states import ENDED

if TYPE_CHECKING:
    from coordinator.remote.api_client import Remote

#: Actions that also work while a peer's screen is open.
_GLOBAL_ACTIONS = frozenset(
    {
        "command",
        "finish",
        "freeze",
        "reconnect",
        "help",
        "picture",
        "copy",
        "command_palette",
        "quit",
    }
    | {"plain", "play", "step", "seek", "pace"}
)
_FINISH = (
    "The agent ends its round, sends the update, then stops. To start it again, its owner runs:\n"
    "commonweight-agent up"
)
_KEYS_BY_ACTION = {key.action.partition("(")[0]: key for key in KEYS}


class MonitorApp(MonitorBase):
    """`commonweight monitor`."""

    BINDINGS: ClassVar[list[BindingType]] = bindings()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in _KEYS_BY_ACTION and isinstance(self.screen, ModalScreen):
            return False
        return self._is_allowed(action, self.screen)

    def _is_allowed(self, action: str, screen: Screen[object]) -> bool:
        """True if `action` makes sense over `screen` and is allowed."""
        key = _KEYS_BY_ACTION.get(action)
        if key is None:
            return True
        fits = not isinstance(screen, PeerScreen) or action in _GLOBAL_ACTIONS
        return fits and self.key_map.has(key)

    # --- views ---

    def action_page(self, page: str) -> None:
        self._part(ContentSwitcher).current = page
        self._part(Tabs).page = self._part(Footer).page = page
        self.current_page.table.focus()
        self.call_after_refresh(self._draw, None)

    @property
    def _filter_page(self) -> FilterPage:
        """The open page if it has a filter, else the fleet."""
        page = self.current_page
        return page if isinstance(page, FilterPage) else self._part(FleetPage)

    def action_mark(self) -> None:
        if self.page == "fleet":
            self._part(FleetPage).toggle_mark()

    def action_filter(self) -> None:
        page = self._filter_page
        if page is not self.current_page:
            self.action_page("fleet")
        page.bar.open()

    def action_faults(self) -> None:
        self._filter_page.faults_only = not self._filter_page.faults_only
        self._draw(None)

    def action_sort(self, step: int) -> None:
        self._part(FleetPage).next_sort(step)

    def action_reverse(self) -> None:
        page = self._part(FleetPage)
        page.reverse = not page.reverse
        self._draw(None)

    def action_zoom(self) -> None:
        for page in self.pages:
            page.zoomed = not page.zoomed
        self._draw(None)
        self.call_after_refresh(self._draw, None)  # the parts of the page have other sizes now

    def action_plain(self) -> None:
        if (screen := self.peer_screen) is not None:
            screen.action_back()
        elif isinstance(page := self.current_page, FilterPage):
            page.reset_view()

    def action_compare(self) -> None:
        """Compare the run with the one before it; after the oldest, with none."""
        if not self._part(RoundsPage).compare_next():
            self.show_message("info", "there is no other run to compare with")
        self.action_page("rounds")

    def action_follow(self) -> None:
        self.current_page.follow = not self.current_page.follow
        self._draw(None)

    def action_freeze(self) -> None:
        self.frozen = not self.frozen
        self._draw(None) if not self.frozen else self._draw_frame(self._clock())

    def action_reconnect(self) -> None:
        self.following.reconnect()
        self.announce("info", "connecting again")

    def action_help(self) -> None:
        page = "peer" if isinstance(self.screen, PeerScreen) else self.page
        about = "filter" if isinstance(self.focused, Input) else page
        self.push_screen(HelpDialog(page, self.key_map, about))

    # --- copies ---

    def action_copy(self) -> None:
        """Copy the id under the cursor; on Events the line."""
        screen = self.peer_screen
        if text := screen.peer if screen else self.current_page.copy_text:
            self.copy_to_clipboard(text)
            self.show_message("info", f"copied {text}", 2.0)

    def action_export(self) -> None:
        """Write what the page shows as CSV and JSON into the current folder."""
        if self.fleet is None:
            return
        what, rows = self.current_page.export_rows()
        with self._reporting_errors("nothing was exported"):
            paths = export.write(Path.cwd(), what, rows, self.fleet)
            self.announce("info", f"wrote {' and '.join(path.name for path in paths)}")

    def action_picture(self) -> None:
        """Write the screen as SVG into the current folder."""
        try:
            path = self.save_screenshot(path=str(Path.cwd()))
        except OSError as err:
            self.announce("error", f"cannot write the picture: {err.strerror}")
        else:
            self.announce("info", f"wrote {Path(path).name}")

    # --- commands ---

    @property
    def _current_peer(self) -> str | None:
        """The peer of the open screen, else the one under the cursor."""
        screen = self.peer_screen
        return screen.peer if screen else self._part(FleetPage).current_peer

    @property
    def _target_peers(self) -> list[str]:
        """The marked peers, else the one under the cursor."""
        if self.peer_screen is None and self.page != "fleet":
            return []
        marked = sorted(self._part(FleetPage).marked) if self.peer_screen is None else []
        return marked or ([self._current_peer] if self._current_peer else [])

    def _format_names(self, peers: list[str]) -> str:
        if self.fleet is None or len(peers) > 3:
            return f"{len(peers)} peers"
        return ", ".join(peer_name(self.fleet, peer) for peer in peers)

    def action_command(self, action: OperatorAction) -> None:
        if peers := self._target_peers:
            self._send(action, peers)

    @work
    async def _send(self, action: OperatorAction, peers: list[str]) -> None:
        """Request `action`; its outcome is shown once the peers report it."""
        if (fleet := self.fleet) is None:
            return
        for notice in await self.actions.request(action, peers, fleet):
            self.announce(*notice)
        self._draw_frame(self._clock())

    def action_remove(self) -> None:
        self._confirm_and_send("remove", "Its key is refused for good; its past updates stay.")

    def action_finish(self) -> None:
        self._confirm_and_send("finish", _FINISH)

    def action_drain(self) -> None:
        self._confirm_and_send("drain", _FINISH)

    @work
    async def _confirm_and_send(self, action: OperatorAction, consequence: str) -> None:
        if peers := self._target_peers:
            question = f"{action.capitalize()} {self._format_names(peers)}?"
            if await self.push_screen_wait(ConfirmDialog(question, consequence)):
                self._send(action, peers)

    @work(exclusive=True, group="ticket")
    async def action_ticket(self) -> None:
        with self._reporting_errors("cannot make a ticket"):
            made = await self._source.ask(lambda remote: remote.make_ticket(TicketRequest()))
            self.announce("info", "made a ticket")
            self.push_screen(TicketDialog(made["ticket"]))

    @work
    async def action_start_run(self) -> None:
        if (order := await self.push_screen_wait(RunForm())) is None:
            return
        with self._reporting_errors("cannot start the run"):
            run = await self._source.ask(lambda remote: remote.start_run(order))
            self.actions.expect("start", run, run)

    @work
    async def action_stop(self) -> None:
        """Stop the current run; on Jobs the job under the cursor."""
        on_jobs = self.page == "jobs"
        job = self._part(JobsPage).current_job
        run = current_run(self.fleet) if self.fleet else None
        stop: Callable[[Remote], None]
        if on_jobs and job is not None and is_working(job):
            name, stop = job.changed.job, lambda remote: remote.stop_job(name)
            later = "Its answers stay. The same command continues it later."
        elif not on_jobs and run is not None and run.changed.state not in ENDED:
            name, stop = run.changed.run, lambda remote: remote.stop_run(name)
            later = f"Its versions stay. To continue it later:\ncommonweight run resume {name}"
        else:
            self.show_message("info", f"no active {'job' if on_jobs else 'run'} to stop", 3.0)
            return
        question = f"Stop {'job' if on_jobs else 'run'} {name}?"
        if await self.push_screen_wait(ConfirmDialog(question, later)):
            with self._reporting_errors(f"cannot stop {name}"):
                await self._source.ask(stop)
                self.actions.expect("stop", name, name)

    @contextmanager
    def _reporting_errors(self, what: str) -> Iterator[None]:
        """Show what failed, why, and what to do next."""
        try:
            yield
        except CommonweightError as err:
            hint = f" {err.hint}" if err.hint else ""
            self.announce("error", f"{what}: {err.message}.{hint}")

    # --- peers and the palette ---

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        for key in KEYS:
            action = key.action.partition("(")[0]
            if key.id in ("open", "palette") or not self._is_allowed(action, screen):
                continue
            title = key.description[0].upper() + key.description[1:]
            shown = f"key {key.display(self.config.keys)}"
            yield SystemCommand(title, shown, partial(self.run_action, key.action))
        for name in THEMES:
            yield SystemCommand(f"Theme {name}", "", partial(setattr, self, "theme", name))
        for peer in self.fleet.peers.values() if self.fleet else ():
            open_peer = partial(self._show_peer, peer.peer)
            yield SystemCommand(f"Peer {display_name(peer)}", peer.peer, open_peer, discover=False)
        yield SystemCommand("Theme: choose among all", "", self.action_change_theme)

    @on(CellTable.RowSelected, "#peer-table")
    def _open_peer(self) -> None:
        if (peer := self._part(FleetPage).current_peer) is not None:
            self._show_peer(peer)

    @on(CellTable.RowSelected, "#event-table")
    def _open_subject(self) -> None:
        """Open the peer that a line of Events is about."""
        event = self._part(EventsPage).current_event
        if event and self.fleet and event.subject in self.fleet.peers:
            self._show_peer(event.subject)

    def _show_peer(self, peer: str) -> None:
        if self.peer_screen is not None:  # the second half of a double click
            return
        footer, details, source = Footer(self.key_map, "peer"), self.details, self._source
        screen = PeerScreen(peer, self.following, source, details, footer, self._clock, self._zone)
        self.push_screen(screen, lambda _: self._draw(None))
