"""Keeps a session with the coordinator: opens it again when it is lost, and sends heartbeats."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from random import Random
from typing import Any, TypeVar

from flwr.app import Message

from agent.daemon import state_machine
from agent.daemon.context import AgentContext
from agent.daemon.current_enrollment import CurrentEnrollment
from agent.daemon.ended_runs import EndedRuns
from agent.daemon.state_machine import SessionChanged
from agent.daemon.status_reporter import StatusReporter
from agent.daemon.work_thread import WorkThread
from agent.transport.charged_heads import ChargedHeads
from agent.transport.coordinator_client import HEARTBEAT_EVERY_S, CoordinatorClient
from agent.transport.followed_log import FollowedLog
from agent.transport.weight_transfer import SessionLost
from protocols.errors import CommonweightError, Refused, Unreachable, VersionSkew
from protocols.local import crash_reports, join_client
from protocols.local.timed_wait import wait_at_most
from protocols.messages.mqtt import MqttAddress
from protocols.network import version_check
from protocols.network.backoff import delays

log = logging.getLogger("commonweight.agent")

T = TypeVar("T")

_HEARTBEAT_RETRY_S = 5.0
_RESTART_POLL_S = 0.1
#: Interrupted work may still encode or write an update.
_MAX_WAIT_FOR_THREADS_S = 60.0
_MIN_RECONNECT_S, _MAX_RECONNECT_S = 0.3, 15.0
#: A session that ends sooner is a short one. After some in a row, the waits grow as while the
#: coordinator is away, and the reason is reported.
_SHORT_SESSION_S = 30.0
_MAX_SHORT_SESSIONS, _REPORTED_SHORT_SESSIONS = 2, 5


class SessionLoop:
    """Keeps one session open and pulls work. Has two threads: for work and for heartbeats.

    `on_broker_changed(address)` is called on the event loop when the broker's address or login
    changes.
    """

    def __init__(
        self,
        ctx: AgentContext,
        report: StatusReporter,
        on_broker_changed: Callable[[MqttAddress], None],
    ) -> None:
        self._ctx, self._runner, self._report = ctx, ctx.runner, report
        self._enrolled = CurrentEnrollment(ctx, on_broker_changed)
        self._link: CoordinatorClient | None = None
        #: Follows the coordinator's log of versions.
        self.followed: FollowedLog | None = None
        self.charged: ChargedHeads | None = None
        self.on_offers: Callable[[int], None] = lambda number: None
        self.ended_runs = EndedRuns(ctx.runner, ())
        #: The owner has changed what the parts read at their start, and the agent will restart.
        self.restart_is_due: Callable[[], bool] = lambda: False
        self._closed = False
        self._doorbell = asyncio.Event()
        self._last_work_at = 0.0
        self._last_refusal = ""
        self._short_sessions = 0
        self._work_pool = ThreadPoolExecutor(1, "work")
        self._heartbeat_pool = ThreadPoolExecutor(1, "heartbeat")
        #: Calls in these threads that have not ended.
        self._calls: set[Future[Any]] = set()

    def link(self) -> CoordinatorClient:
        """The current link. Raises Unreachable before the first attempt to open a session."""
        if self._link is None:
            raise Unreachable("no connection to the coordinator was tried yet")
        return self._link

    def certificate(self) -> bytes:
        """The current node certificate, which changes when it is renewed."""
        return self._enrolled.certificate

    def when_key_changes(self, call: Callable[[], None]) -> None:
        """Call this on the event loop when the coordinator has a new signing key or CA."""
        self._enrolled.on_key_changed = call

    @property
    def endpoints(self) -> tuple[str, str]:
        """Our and the coordinator's IP address in the last connection; empty before the first."""
        return self._link.peer_addresses if self._link else ("", "")

    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received since the agent's start."""
        return (self._link.bytes_up, self._link.bytes_down) if self._link else (0, 0)

    def wake(self) -> None:
        """Poll for work now."""
        self._doorbell.set()

    def tell_decision(self) -> None:
        """Tell the coordinator with a poll now that refused work may be asked for again."""
        if self._link is not None:
            self._link.owner_has_decided = True
        self.wake()

    def run_in_background(self, call: Callable[..., None], *arguments: Any) -> None:
        """Call a function in the heartbeat thread, so that the work does not wait for it."""
        self._heartbeat_pool.submit(call, *arguments)

    async def close(self) -> None:
        """Close the session and let the threads end."""
        self._closed = True
        if self._link is not None:
            await asyncio.to_thread(self._link.close)
        self._work_pool.shutdown(wait=False, cancel_futures=True)
        self._heartbeat_pool.shutdown(wait=False, cancel_futures=True)

    async def wait_for_threads(self) -> None:
        """After `close`: wait until the last work has ended, as the next agent uses its files."""
        await asyncio.to_thread(wait, set(self._calls), _MAX_WAIT_FOR_THREADS_S)

    # --- session ---

    async def run(self, work: WorkThread) -> None:
        """Open a session and work; open it again whenever it is lost. Runs until cancelled."""
        waits = delays(Random(), _MIN_RECONNECT_S, _MAX_RECONNECT_S)
        while True:
            opened_at = 0.0
            try:
                await self._in_thread(self._open)
                opened_at = time.monotonic()
                self._runner.dispatch(SessionChanged(True))
                self._report.session_opened()
                self._report.write(self._runner.state)
                log.info("connected to %s", self._ctx.credentials.address)
                if self._short_sessions <= _MAX_SHORT_SESSIONS:
                    waits = delays(Random(), _MIN_RECONNECT_S, _MAX_RECONNECT_S)
                await self._pull_and_answer(work)
            except CommonweightError as err:
                self._log_lost(err)
                self._report.set_session_error(err.message)
                self._count_short(opened_at, err.message)
            except Exception as err:  # no bug in a session may end an agent that runs for months
                log.exception("unexpected error in the session")
                crash_reports.save(self._ctx.home, err)
                self._report.report_error(f"unexpected error: {type(err).__name__}")
                self._count_short(opened_at, "of an unexpected error")
            self._runner.dispatch(SessionChanged(False))
            self._report.mark_stale()
            # A doorbell shows that the coordinator is back, and ends the wait.
            self._doorbell.clear()
            await wait_at_most(self._doorbell, next(waits))

    def _count_short(self, opened_at: float, because: str) -> None:
        """Count sessions in a row that end soon, and report the reason once.

        `opened_at`: monotonic s; 0 if the session was not opened, which does not count.
        """
        if not opened_at:
            return
        is_short = time.monotonic() - opened_at < _SHORT_SESSION_S
        self._short_sessions = self._short_sessions + 1 if is_short else 0
        if self._short_sessions == _REPORTED_SHORT_SESSIONS:
            self._report.report_error(
                f"the last {self._short_sessions} sessions ended soon: {because}; the agent tries "
                f"again after up to {_MAX_RECONNECT_S:.0f} s. If this lasts, look at the "
                "coordinator's log"
            )

    def _log_lost(self, err: CommonweightError) -> None:
        if isinstance(err, VersionSkew | Refused) and not isinstance(err, SessionLost):
            if err.message != self._last_refusal:  # each attempt fails alike: log it once
                log.error("%s; %s", err.message, err.hint)
            self._last_refusal = err.message
        elif self._runner.state.session:
            log.warning("lost the coordinator: %s", err.message)
        else:
            log.debug("no session: %s", err.message)

    async def _pull_and_answer(self, work: WorkThread) -> None:
        """Pull and answer messages while the session lasts. Raises Unreachable, SessionLost."""
        while True:
            self._doorbell.clear()
            state = self._runner.state
            takes_work = state_machine.can_take_work(state)
            if takes_work or (state.work is None and state_machine.can_answer_steps(state)):
                pull = partial(work.pull, steps_only=not takes_work)
                message = await self._in_thread(pull)
                while message is not None:
                    await self._wait_for_restart()
                    message = await self._in_thread(self._answer, work, message)
            idle_s = time.monotonic() - self._last_work_at
            await wait_at_most(self._doorbell, work.next_poll_s(idle_s))

    def _answer(self, work: WorkThread, message: Message) -> Message | None:
        """In the work thread: answer a message and those that follow. Small rounds wake the event
        loop less often so.

        Returns one that must wait, because the agent will restart or is ending.
        """
        while (following := work.answer(message)) is not None:
            self._last_work_at = time.monotonic()
            if self._closed or self._runner.stopping.is_set() or self.restart_is_due():
                return following
            message = following
        self._last_work_at = time.monotonic()
        return None

    async def _wait_for_restart(self) -> None:
        """Keep a message unanswered: the agent with the changed settings gets it again."""
        while self.restart_is_due():  # noqa: ASYNC110 (the settings are a file)
            await asyncio.sleep(_RESTART_POLL_S)

    def _open(self) -> None:
        if self._link is None:
            link = CoordinatorClient(self._ctx.credentials, self._ctx.bandwidth)
            if self.followed is not None:
                link.log_statement = self.followed.statement
                link.on_log_news = self.followed.news
            if self.charged is not None:
                self.charged.reset()
                link.charged_statement, link.on_charged = self.charged.statement, self.charged.take
            link.working_for, link.on_run_over = self.ended_runs.working_for, self.ended_runs.end
            link.on_notice, link.on_offers = self._report.coordinator_says, self.on_offers
            self._link = link
        if self._closed:  # `close` may have run before this link existed
            raise Unreachable("the agent is stopping")
        try:
            status = self._link.enrollment_status()
        except Unreachable as err:
            if join_client.is_other_ca(err):
                self._enrolled.follow_ca(err)
            raise
        version_check.check_compatible(status.version, "the coordinator")
        if status.enrollment == "awaiting":
            raise Refused(
                "this machine waits for the operator's approval",
                f"on the coordinator: commonweight peers approve {status.name}",
            )
        self._link.open()
        self._enrolled.save_broker(self._link)
        self._enrolled.renew_certificate(self._link)

    # --- heartbeats ---

    async def run_heartbeat(self) -> None:
        """Send heartbeats, also while the work thread is busy. Runs until cancelled."""
        while True:
            link = self._link
            is_open = link is not None and self._runner.state.session
            due_s = link.heartbeat_due_s if link is not None and is_open else HEARTBEAT_EVERY_S
            if link is None or due_s > 0:
                await asyncio.sleep(due_s)
            elif not await self._send_heartbeat(link):
                await asyncio.sleep(_HEARTBEAT_RETRY_S)

    async def _send_heartbeat(self, link: CoordinatorClient) -> bool:
        """Send one heartbeat; open a lost session again. False if the heartbeat failed."""
        try:
            await self._in_thread(link.heartbeat, pool=self._heartbeat_pool)
            return True
        except SessionLost:
            with contextlib.suppress(CommonweightError):  # the next poll reports it
                await self._in_thread(self._reopen, link, pool=self._heartbeat_pool)
        except CommonweightError as err:
            log.debug("a heartbeat failed: %s", err.message)
        return False

    def _reopen(self, link: CoordinatorClient) -> None:
        """Open a lost session again: the coordinator has restarted, maybe with another login."""
        self._enrolled.save_broker(link)
        link.open()

    async def reconnect(self) -> None:
        """Replace all connections now: after a sleep they are dead, and nothing reports it."""
        if self._link is not None:
            # In a thread of its own: both pools may wait for a dead connection.
            await asyncio.to_thread(self._link.reconnect)
            if self._runner.state.session:
                await self._send_heartbeat(self._link)
        self.wake()

    async def _in_thread(
        self, work: Callable[..., T], *arguments: Any, pool: ThreadPoolExecutor | None = None
    ) -> T:
        call = (pool or self._work_pool).submit(work, *arguments)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return await asyncio.wrap_future(call)
