"""The agent's session with the coordinator, kept for months: opened again, alive, after a sleep."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any, TypeVar

from flwr.app import Message
from msgspec.structs import replace

from agent.daemon import state_machine
from agent.daemon.state_machine import SessionChanged
from agent.daemon.state_runner import StateRunner
from agent.daemon.status_reporter import StatusReporter
from agent.home.credentials import Credentials
from agent.home.settings import Enrollment, write_enrollment
from agent.transport.bandwidth import Bandwidth
from agent.transport.coordinator_client import HEARTBEAT_EVERY_S, CoordinatorClient
from agent.transport.weight_transfer import SessionLost
from protocols.enrollment import identity
from protocols.errors import CommonweightError, Unreachable, VersionSkew
from protocols.local import crash_reports
from protocols.messages.mqtt import MqttAddress
from protocols.network import version_check
from protocols.network.backoff import delays

log = logging.getLogger("commonweight.agent")

T = TypeVar("T")

RENEW_BEFORE_S = 60 * 86400.0
_HEARTBEAT_RETRY_S = 5.0


class SessionLoop:
    """Keeps one session open and asks it for work; two threads of its own, for work and heartbeat.

    `on_moved(address)` is told, on the event loop, when the broker's address or login changes.
    """

    def __init__(
        self,
        home: Path,
        enrollment: Enrollment,
        credentials: Credentials,
        runner: StateRunner,
        report: StatusReporter,
        bandwidth: Bandwidth,
        on_broker_changed: Callable[[MqttAddress], None],
    ) -> None:
        self._home, self._enrollment, self._credentials = home, enrollment, credentials
        self._runner, self._report, self._on_broker_changed = runner, report, on_broker_changed
        self._bandwidth = bandwidth
        self._link: CoordinatorClient | None = None
        self._closed = False
        self._doorbell = asyncio.Event()
        self._last_work_at = 0.0
        self._last_skew = ""
        self._work_pool = ThreadPoolExecutor(1, "work")
        self._heartbeat_pool = ThreadPoolExecutor(1, "heartbeat")

    def link(self) -> CoordinatorClient:
        """The link of the moment. Raises Unreachable before the first try to open a session."""
        if self._link is None:
            raise Unreachable("the coordinator was not asked yet")
        return self._link

    def certificate(self) -> bytes:
        """The node certificate of the moment: it is renewed now and then."""
        return self._enrollment.certificate

    @property
    def endpoints(self) -> tuple[str, str]:
        """The last connection's IP addresses, ours and the other's; empty before the first."""
        return self._link.ends if self._link else ("", "")

    def traffic(self) -> tuple[int, int]:
        """Bytes up and down since the agent's start."""
        return (self._link.bytes_up, self._link.bytes_down) if self._link else (0, 0)

    def wake(self) -> None:
        """There may be work: ask now."""
        self._doorbell.set()

    def run_in_background(self, call: Callable[..., None], *arguments: Any) -> None:
        """Do this soon in the heartbeat's thread, one at a time: the work does not wait for it."""
        self._heartbeat_pool.submit(call, *arguments)

    async def close(self) -> None:
        """Say goodbye, and let the threads end."""
        self._closed = True
        if self._link is not None:
            await asyncio.to_thread(self._link.close)
        self._work_pool.shutdown(wait=False, cancel_futures=True)
        self._heartbeat_pool.shutdown(wait=False, cancel_futures=True)

    # --- a session ---

    async def run(self, answer: Callable[[Message], Message | None]) -> None:
        """Open a session, work, and open it again whenever it is lost; for ever.

        `answer(message)` does the work in the work thread, and gives the next message.
        """
        waits = delays(Random(), 0.3, 15.0)
        while True:
            try:
                await self._in_thread(self._open)
                self._runner.dispatch(SessionChanged(True))
                self._report.write(self._runner.state)
                log.info("connected to %s", self._credentials.address)
                waits = delays(Random(), 0.3, 15.0)
                await self._pull_and_answer(answer)
            except CommonweightError as err:
                if isinstance(err, VersionSkew):
                    if err.message != self._last_skew:
                        log.error("%s; %s", err.message, err.hint)
                    self._last_skew = err.message
                elif self._runner.state.session:
                    log.warning("lost the coordinator: %s", err.message)
                else:
                    log.debug("no session: %s", err.message)
                self._report.set_last_error(err.message)
            except Exception as err:  # an agent runs for months: no surprise may end it
                log.exception("unexpected trouble with the link")
                crash_reports.save(self._home, err)
                self._report.report_error(f"unexpected trouble: {type(err).__name__}")
            self._runner.dispatch(SessionChanged(False))
            self._report.mark_stale()
            # A doorbell means that the coordinator is back: no need to wait to the end.
            self._doorbell.clear()
            await self._wait_for_doorbell(next(waits))

    async def _pull_and_answer(self, answer: Callable[[Message], Message | None]) -> None:
        """Pull and answer messages while the session lasts. Raises Unreachable, SessionLost."""
        while True:
            self._doorbell.clear()
            if state_machine.can_take_work(self._runner.state):
                message = await self._in_thread(self.link().pull)
                while message is not None:
                    message = await self._in_thread(answer, message)
                    self._last_work_at = time.monotonic()
            await self._wait_for_doorbell(
                state_machine.poll_interval_s(
                    self._runner.state, time.monotonic() - self._last_work_at
                )
            )

    async def _wait_for_doorbell(self, within_s: float) -> None:
        """Wait for a doorbell, but not longer than that."""
        # Not wait_for: before Python 3.12 it loses a cancel that comes together with the doorbell.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._doorbell.wait()

    def _open(self) -> None:
        if self._link is None:
            self._link = CoordinatorClient(self._credentials, self._bandwidth)
        if self._closed:  # `close` may have come before this link was there to be closed
            raise Unreachable("the agent ends")
        version_check.check_compatible(self._link.standing().version, "the coordinator")
        self._link.open()
        self._save_broker_address(self._link.mqtt())
        self._renew_certificate(self._link)

    def _renew_certificate(self, link: CoordinatorClient) -> None:
        """Renew the node certificate in the last two months of its year."""
        ca_pem = self._enrollment.ca_pem.encode()
        ends_at = identity.verify_certificate(ca_pem, self._enrollment.certificate).not_after
        if ends_at - time.time() < RENEW_BEFORE_S:
            certificate = link.renew()
            identity.verify_certificate(ca_pem, certificate)
            self._enrollment = replace(self._enrollment, certificate=certificate)
            write_enrollment(self._home, self._enrollment)

    def _save_broker_address(self, address: MqttAddress) -> None:
        """The broker's password changes when a peer is removed: keep what holds now."""
        if address != self._enrollment.mqtt:
            self._enrollment = replace(self._enrollment, mqtt=address)
            write_enrollment(self._home, self._enrollment)
            self._runner.call_threadsafe(self._on_broker_changed, address)

    # --- alive ---

    async def run_heartbeat(self) -> None:
        """Heartbeats, also while the work thread is busy; a lost session is opened again."""
        while True:
            link = self._link
            held = link is not None and self._runner.state.session
            due_s = link.beat_due_s if link is not None and held else HEARTBEAT_EVERY_S
            if link is None or due_s > 0:
                await asyncio.sleep(due_s)
                continue
            if not await self._send_heartbeat(link):
                await asyncio.sleep(_HEARTBEAT_RETRY_S)

    async def _send_heartbeat(self, link: CoordinatorClient) -> bool:
        """One heartbeat; False if it failed."""
        try:
            await self._in_thread(link.beat, pool=self._heartbeat_pool)
            return True
        except SessionLost:
            with contextlib.suppress(CommonweightError):
                await self._in_thread(link.open, pool=self._heartbeat_pool)
        except CommonweightError as err:
            log.debug("a heartbeat failed: %s", err.message)
        return False

    async def reconnect(self) -> None:
        """Connect anew at once: what was open before a sleep is dead, and nobody says so."""
        if self._link is not None:
            # In neither of our threads: both may wait on what is dead.
            await asyncio.to_thread(self._link.reconnect)
            if self._runner.state.session:
                await self._send_heartbeat(self._link)
        self.wake()

    async def _in_thread(
        self, work: Callable[..., T], *arguments: Any, pool: ThreadPoolExecutor | None = None
    ) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(pool or self._work_pool, work, *arguments)
