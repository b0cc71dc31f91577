"""The monitor: the fleet in a terminal, and what its keys do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from pathlib import Path
from typing import ClassVar

from textual import on, work
from textual.app import SystemCommand
from textual.binding import BindingType
from textual.screen import ModalScreen, Screen
from textual.widgets import ContentSwitcher, DataTable, Input

from coordinator.fleet.reducer import called, current_run
from coordinator.monitor.confirmations import OperatorAction
from coordinator.monitor.job_table import is_working
from coordinator.monitor.tui import export
from coordinator.monitor.tui.base_app import MonitorBase
from coordinator.monitor.tui.cell_table import CellTable
from coordinator.monitor.tui.dialogs import ConfirmDialog, HelpDialog, TicketDialog
from coordinator.monitor.tui.events_page import EventsPage
from coordinator.monitor.tui.fleet_page import FleetPage
from coordinator.monitor.tui.footer import Footer
from coordinator.monitor.tui.jobs_page import JobsPage
from coordinator.monitor.tui.keys import KEYS, REPLAY_ONLY, bindings
from coordinator.monitor.tui.peer_screen import PeerScreen
from coordinator.monitor.tui.rounds_page import RoundsPage
from coordinator.monitor.tui.run_form import RunForm
from coordinator.monitor.tui.tabs import Tabs
from coordinator.monitor.tui.theme import THEMES
from protocols.errors import CommonweightError
from protocols.messages.states import ENDED

#: What a key does also while a peer's screen lies over the pages.
_GLOBAL_ACTIONS = frozenset(
    {"command", "freeze", "reconnect", "help", "picture", "copy", "command_palette", "quit"}
    | {"play", "step", "seek", "pace"}
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
        """True if this is a thing to do over `screen`, and allowed."""
        key = _KEYS_BY_ACTION.get(action)
        if key is None:
            return True
        if (key.id in REPLAY_ONLY and not self.replaying) or (self.read_only and key.changes):
            return False
        return not isinstance(screen, PeerScreen) or action in _GLOBAL_ACTIONS

    # --- what is shown ---

    def action_page(self, page: str) -> None:
        self._part(ContentSwitcher).current = page
        self._part(Tabs).page = self._part(Footer).page = page
        tables = {"fleet": "#peers", "rounds": "#closed", "events": "#said", "jobs": "#asked"}
        self.screen.query_one(tables[page]).focus()
        self.call_after_refresh(self._draw, None)

    def action_mark(self) -> None:
        if self.page == "fleet":
            self._part(FleetPage).toggle_mark()

    def action_filter(self) -> None:
        if self.page in ("rounds", "jobs"):
            self.action_page("fleet")
        page = self._part(EventsPage) if self.page == "events" else self._part(FleetPage)
        page.bar.open()

    def action_faults(self) -> None:
        page = self._part(EventsPage) if self.page == "events" else self._part(FleetPage)
        page.faults_only = not page.faults_only
        self._draw(None)

    def action_sort(self, step: int) -> None:
        self._part(FleetPage).next_sort(step)

    def action_reverse(self) -> None:
        page = self._part(FleetPage)
        page.reverse = not page.reverse
        self._draw(None)

    def action_zoom(self) -> None:
        for page in (self._part(FleetPage), self._part(RoundsPage), self._part(JobsPage)):
            page.zoomed = not page.zoomed
        self._part(FleetPage).lay_out()
        self._draw(None)

    def action_plain(self) -> None:
        if self.page == "fleet":
            self._part(FleetPage).reset_view()
        elif self.page == "events":
            self._part(EventsPage).reset_view()

    def action_follow(self) -> None:
        page: FleetPage | RoundsPage | EventsPage = self._part(FleetPage)
        if self.page != "fleet":
            page = self._part(RoundsPage) if self.page == "rounds" else self._part(EventsPage)
        page.follow = not page.follow
        self._draw(None)

    def action_freeze(self) -> None:
        self.frozen = not self.frozen
        self._draw(None) if not self.frozen else self._draw_frame(self._clock())

    def action_reconnect(self) -> None:
        self.following.reconnect()
        self.announce("info", "trying the links again")

    def action_help(self) -> None:
        page = "peer" if isinstance(self.screen, PeerScreen) else self.page
        about = "filter" if isinstance(self.focused, Input) else page
        dialog = HelpDialog(
            page,
            self.config.keys,
            read_only=self.read_only,
            replay=self.replaying,
            about=about,
        )
        self.push_screen(dialog)

    # --- what is taken along ---

    def action_copy(self) -> None:
        """The id of what is under the cursor; on Events the line."""
        if self.page == "jobs":
            job = self._part(JobsPage).current_job
            text = job.changed.job if job else ""
        elif self.page == "rounds":
            run = current_run(self.fleet) if self.fleet else None
            text = run.changed.run if run else ""
        elif self.page == "events" and self.peer_screen is None:
            event = self._part(EventsPage).current_event
            text = event.text if event else ""
        else:
            text = self._current_peer or ""
        if text:
            self.copy_to_clipboard(text)
            self.notify(f"copied {text}", timeout=2, markup=False)

    def action_export(self) -> None:
        """What the page shows, as CSV and JSON, into this folder."""
        fleet = self.fleet
        if fleet is None:
            return
        if self.page == "fleet":
            peers = [fleet.peers[p] for p in self._part(FleetPage).shown if p in fleet.peers]
            what, rows = "peers", export.peer_rows(peers, self._clock())
        elif self.page == "rounds":
            what, rows = "rounds", export.round_rows(current_run(fleet))
        elif self.page == "jobs":
            what, rows = "jobs", export.job_rows(self._part(JobsPage).shown)
        else:
            what, rows = "events", export.event_rows(self._part(EventsPage).shown)
        try:
            paths = export.write(Path.cwd(), what, rows, fleet)
        except CommonweightError as err:
            self.report_error("nothing was exported", err)
        else:
            self.announce("info", f"wrote {' and '.join(path.name for path in paths)}")

    def action_picture(self) -> None:
        """The screen as SVG, into this folder."""
        try:
            path = self.save_screenshot(path=str(Path.cwd()))
        except OSError as err:
            self.announce("error", f"no picture was written: {err.strerror}")
        else:
            self.announce("info", f"wrote {Path(path).name}")

    # --- doing ---

    @property
    def _current_peer(self) -> str | None:
        """The peer that is meant: that of the open screen, else the one under the cursor."""
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
        known = self.fleet.peers if self.fleet else {}
        names = [called(known[peer]) if peer in known else peer for peer in peers]
        return ", ".join(names) if len(names) <= 3 else f"{len(names)} peers"

    def action_command(self, deed: OperatorAction) -> None:
        if peers := self._target_peers:
            self._send(deed, peers)

    @work
    async def _send(self, deed: OperatorAction, peers: list[str]) -> None:
        """Ask; what came of it is said when the peers say so themselves."""
        if (fleet := self.fleet) is None:
            return
        for news in await self.actions.request(deed, peers, fleet):
            self.announce(news.level, news.text, news.subject)
        self._draw_frame(self._clock())

    def action_remove(self) -> None:
        self._confirm_and_send("remove", "Its key is refused for good; what it gave stays.")

    def action_drain(self) -> None:
        self._confirm_and_send("drain", "It ends its round, sends it, and then stops.")

    @work
    async def _confirm_and_send(self, deed: OperatorAction, consequence: str) -> None:
        if peers := self._target_peers:
            question = f"{deed.capitalize()} {self._format_names(peers)}?"
            if await self.push_screen_wait(ConfirmDialog(question, consequence)):
                self._send(deed, peers)

    @work(exclusive=True, group="ticket")
    async def action_ticket(self) -> None:
        try:
            ticket = await self._source.ticket()
        except CommonweightError as err:
            self.report_error("no ticket was made", err)
        else:
            self.announce("info", "a ticket was made")
            self.push_screen(TicketDialog(ticket))

    @work
    async def action_start_run(self) -> None:
        order = await self.push_screen_wait(RunForm())
        if order is None:
            return
        try:
            run = await self._source.start_run(order)
        except CommonweightError as err:
            self.report_error("no run was started", err)
        else:
            self.actions.expect("start", run, run)

    @work
    async def action_stop(self) -> None:
        """End the run that matters; on Jobs the job under the cursor."""
        if self.page == "jobs":
            await self._stop_job()
        else:
            await self._stop_run()

    async def _stop_job(self) -> None:
        job = self._part(JobsPage).current_job
        if job is None or not is_working(job):
            self.notify("this job is not under way", timeout=3)
            return
        name = job.changed.job
        dialog = ConfirmDialog(f"Stop job {name}?", "Answers stay; the same command goes on later.")
        if await self.push_screen_wait(dialog):
            await self._stop(self._source.stop_job, name)

    async def _stop_run(self) -> None:
        run = current_run(self.fleet) if self.fleet else None
        if run is None or run.changed.state in ENDED:
            self.notify("no run is under way", timeout=3)
            return
        name = run.changed.run
        later = f"What is committed stays. To continue it later:\ncommonweight run resume {name}"
        dialog = ConfirmDialog(f"Stop run {name}?", later)
        if await self.push_screen_wait(dialog):
            await self._stop(self._source.stop_run, name)

    async def _stop(self, ask: Callable[[str], Awaitable[None]], name: str) -> None:
        try:
            await ask(name)
        except CommonweightError as err:
            self.report_error(f"{name} was not stopped", err)
        else:
            self.actions.expect("stop", name, name)

    def report_error(self, what: str, err: CommonweightError) -> None:
        """Say what could not be done, why, and what next."""
        hint = f" {err.hint}" if err.hint else ""
        self.announce("error", f"{what}: {err.message}.{hint}")

    # --- peers and the palette ---

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        for key in KEYS:
            action = key.action.partition("(")[0]
            if key.id in ("open", "palette") or not self._is_allowed(action, screen):
                continue
            shown = key.display(self.config.keys)
            yield SystemCommand(
                f"{shown}  {key.description}", "", partial(self.run_action, key.action)
            )
        for name in THEMES:
            yield SystemCommand(f"theme {name}", "", partial(setattr, self, "theme", name))
        yield SystemCommand("theme: choose among all", "", self.action_change_theme)

    @on(CellTable.RowSelected, "#peers")
    def _open_peer(self) -> None:
        if (peer := self._part(FleetPage).current_peer) is not None:
            self._show_peer(peer)

    @on(DataTable.RowSelected, "#said")
    def _open_subject(self) -> None:
        """From a line of Events to the peer that it is about."""
        event = self._part(EventsPage).current_event
        if event and self.fleet and event.subject in self.fleet.peers:
            self._show_peer(event.subject)

    def _show_peer(self, peer: str) -> None:
        footer = self.make_footer("peer")
        screen = PeerScreen(peer, self.following, self._source, footer, self._clock, self._zone)
        self.push_screen(screen, lambda _: self._draw(None))
