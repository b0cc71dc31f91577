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
from coordinator.monitor.confirmations import Deed
from coordinator.monitor.job_table import is_working
from coordinator.monitor.tui import export
from coordinator.monitor.tui.base_app import MonitorView
from coordinator.monitor.tui.cell_table import CellTable
from coordinator.monitor.tui.dialogs import AskDialog, HelpDialog, TicketDialog
from coordinator.monitor.tui.events_page import EventsPage
from coordinator.monitor.tui.fleet_page import FleetPage
from coordinator.monitor.tui.footer import Footer
from coordinator.monitor.tui.jobs_page import JobsPage
from coordinator.monitor.tui.keys import KEYS, REPLAY, bindings
from coordinator.monitor.tui.peer_screen import PeerScreen
from coordinator.monitor.tui.rounds_page import RoundsPage
from coordinator.monitor.tui.run_form import RunForm
from coordinator.monitor.tui.tabs import Tabs
from coordinator.monitor.tui.theme import OURS
from protocols.errors import CommonweightError
from protocols.messages.states import ENDED

#: What a key does also while a peer's screen lies over the pages.
_ANYWHERE = frozenset(
    {"command", "freeze", "reconnect", "help", "picture", "copy", "command_palette", "quit"}
    | {"play", "step", "seek", "pace"}
)
_KNOWN = {key.action.partition("(")[0]: key for key in KEYS}


class MonitorApp(MonitorView):
    """`commonweight monitor`."""

    BINDINGS: ClassVar[list[BindingType]] = bindings()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action in _KNOWN and isinstance(self.screen, ModalScreen):
            return False
        return self._may(action, self.screen)

    def _may(self, action: str, screen: Screen[object]) -> bool:
        """True if this is a thing to do over `screen`, and allowed."""
        key = _KNOWN.get(action)
        if key is None:
            return True
        if (key.id in REPLAY and not self.replaying) or (self.read_only and key.changes):
            return False
        return not isinstance(screen, PeerScreen) or action in _ANYWHERE

    # --- what is shown ---

    def action_page(self, page: str) -> None:
        self._main(ContentSwitcher).current = page
        self._main(Tabs).page = self._main(Footer).page = page
        tables = {"fleet": "#peers", "rounds": "#closed", "events": "#said", "jobs": "#asked"}
        self.screen.query_one(tables[page]).focus()
        self.call_after_refresh(self._draw, None)

    def action_mark(self) -> None:
        if self.page == "fleet":
            self._main(FleetPage).toggle_mark()

    def action_filter(self) -> None:
        if self.page in ("rounds", "jobs"):
            self.action_page("fleet")
        page = self._main(EventsPage) if self.page == "events" else self._main(FleetPage)
        page.bar.ask()

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
        for page in (self._main(FleetPage), self._main(RoundsPage), self._main(JobsPage)):
            page.zoomed = not page.zoomed
        self._main(FleetPage).lay_out()
        self._draw(None)

    def action_plain(self) -> None:
        if self.page == "fleet":
            self._main(FleetPage).clear()
        elif self.page == "events":
            self._main(EventsPage).clear()

    def action_follow(self) -> None:
        page: FleetPage | RoundsPage | EventsPage = self._main(FleetPage)
        if self.page != "fleet":
            page = self._main(RoundsPage) if self.page == "rounds" else self._main(EventsPage)
        page.follow = not page.follow
        self._draw(None)

    def action_freeze(self) -> None:
        self.frozen = not self.frozen
        self._draw(None) if not self.frozen else self._draw_frame(self._clock())

    def action_reconnect(self) -> None:
        self.following.reconnect()
        self.say("info", "trying the links again")

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
            job = self._main(JobsPage).under_cursor
            text = job.changed.job if job else ""
        elif self.page == "rounds":
            run = current_run(self.fleet) if self.fleet else None
            text = run.changed.run if run else ""
        elif self.page == "events" and self.peer_screen is None:
            event = self._main(EventsPage).under_cursor
            text = event.text if event else ""
        else:
            text = self._here or ""
        if text:
            self.copy_to_clipboard(text)
            self.notify(f"copied {text}", timeout=2, markup=False)

    def action_export(self) -> None:
        """What the page shows, as CSV and JSON, into this folder."""
        fleet = self.fleet
        if fleet is None:
            return
        if self.page == "fleet":
            peers = [fleet.peers[p] for p in self._main(FleetPage).shown if p in fleet.peers]
            what, rows = "peers", export.peer_rows(peers, self._clock())
        elif self.page == "rounds":
            what, rows = "rounds", export.round_rows(current_run(fleet))
        elif self.page == "jobs":
            what, rows = "jobs", export.job_rows(self._main(JobsPage).shown)
        else:
            what, rows = "events", export.event_rows(self._main(EventsPage).shown)
        try:
            paths = export.write(Path.cwd(), what, rows, fleet)
        except CommonweightError as err:
            self.fail("nothing was exported", err)
        else:
            self.say("info", f"wrote {' and '.join(path.name for path in paths)}")

    def action_picture(self) -> None:
        """The screen as SVG, into this folder."""
        try:
            path = self.save_screenshot(path=str(Path.cwd()))
        except OSError as err:
            self.say("error", f"no picture was written: {err.strerror}")
        else:
            self.say("info", f"wrote {Path(path).name}")

    # --- doing ---

    @property
    def _here(self) -> str | None:
        """The peer that is meant: that of the open screen, else the one under the cursor."""
        screen = self.peer_screen
        return screen.peer if screen else self._main(FleetPage).under_cursor

    @property
    def _meant(self) -> list[str]:
        """The marked peers, else the one under the cursor."""
        if self.peer_screen is None and self.page != "fleet":
            return []
        marked = sorted(self._main(FleetPage).marked) if self.peer_screen is None else []
        return marked or ([self._here] if self._here else [])

    def _names(self, peers: list[str]) -> str:
        known = self.fleet.peers if self.fleet else {}
        names = [called(known[peer]) if peer in known else peer for peer in peers]
        return ", ".join(names) if len(names) <= 3 else f"{len(names)} peers"

    def action_command(self, deed: Deed) -> None:
        if peers := self._meant:
            self._do(deed, peers)

    @work
    async def _do(self, deed: Deed, peers: list[str]) -> None:
        """Ask; what came of it is said when the peers say so themselves."""
        if (fleet := self.fleet) is None:
            return
        for news in await self.deeds.ask(deed, peers, fleet):
            self.say(news.level, news.text, news.subject)
        self._draw_frame(self._clock())

    def action_remove(self) -> None:
        self._ask_first("remove", "Its key is refused for good; what it gave stays.")

    def action_drain(self) -> None:
        self._ask_first("drain", "It ends its round, sends it, and then stops.")

    @work
    async def _ask_first(self, deed: Deed, consequence: str) -> None:
        if peers := self._meant:
            question = f"{deed.capitalize()} {self._names(peers)}?"
            if await self.push_screen_wait(AskDialog(question, consequence)):
                self._do(deed, peers)

    @work(exclusive=True, group="ticket")
    async def action_ticket(self) -> None:
        try:
            ticket = await self._source.ticket()
        except CommonweightError as err:
            self.fail("no ticket was made", err)
        else:
            self.say("info", "a ticket was made")
            self.push_screen(TicketDialog(ticket))

    @work
    async def action_start_run(self) -> None:
        order = await self.push_screen_wait(RunForm())
        if order is None:
            return
        try:
            run = await self._source.start_run(order)
        except CommonweightError as err:
            self.fail("no run was started", err)
        else:
            self.deeds.expect("start", run, run)

    @work
    async def action_stop(self) -> None:
        """End the run that matters; on Jobs the job under the cursor."""
        if self.page == "jobs":
            await self._stop_job()
        else:
            await self._stop_run()

    async def _stop_job(self) -> None:
        job = self._main(JobsPage).under_cursor
        if job is None or not is_working(job):
            self.notify("this job is not under way", timeout=3)
            return
        name = job.changed.job
        dialog = AskDialog(f"Stop job {name}?", "Answers stay; the same command goes on later.")
        if await self.push_screen_wait(dialog):
            await self._stop(self._source.stop_job, name)

    async def _stop_run(self) -> None:
        run = current_run(self.fleet) if self.fleet else None
        if run is None or run.changed.state in ENDED:
            self.notify("no run is under way", timeout=3)
            return
        name = run.changed.run
        later = f"What is committed stays. To continue it later:\ncommonweight run resume {name}"
        dialog = AskDialog(f"Stop run {name}?", later)
        if await self.push_screen_wait(dialog):
            await self._stop(self._source.stop_run, name)

    async def _stop(self, ask: Callable[[str], Awaitable[None]], name: str) -> None:
        try:
            await ask(name)
        except CommonweightError as err:
            self.fail(f"{name} was not stopped", err)
        else:
            self.deeds.expect("stop", name, name)

    def fail(self, what: str, err: CommonweightError) -> None:
        """Say what could not be done, why, and what next."""
        hint = f" {err.hint}" if err.hint else ""
        self.say("error", f"{what}: {err.message}.{hint}")

    # --- peers and the palette ---

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        for key in KEYS:
            action = key.action.partition("(")[0]
            if key.id in ("open", "palette") or not self._may(action, screen):
                continue
            shown = key.shown(self.config.keys)
            yield SystemCommand(f"{shown}  {key.meaning}", "", partial(self.run_action, key.action))
        for name in OURS:
            yield SystemCommand(f"theme {name}", "", partial(setattr, self, "theme", name))
        yield SystemCommand("theme: choose among all", "", self.action_change_theme)

    @on(CellTable.Chosen, "#peers")
    def _open_peer(self) -> None:
        if (peer := self._main(FleetPage).under_cursor) is not None:
            self._show_peer(peer)

    @on(DataTable.RowSelected, "#said")
    def _open_subject(self) -> None:
        """From a line of Events to the peer that it is about."""
        event = self._main(EventsPage).under_cursor
        if event and self.fleet and event.subject in self.fleet.peers:
            self._show_peer(event.subject)

    def _show_peer(self, peer: str) -> None:
        footer = self.make_footer("peer")
        screen = PeerScreen(peer, self.following, self._source, footer, self._clock, self._zone)
        self.push_screen(screen, lambda _: self._draw(None))
