"""An agent whose updates or sessions are refused says why, once, and asks less and less often."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from msgspec.structs import replace

from agent.daemon import session_loop, work_thread
from agent.daemon.agent import Agent
from agent.home import enrollment_file, settings
from agent.transport.weight_transfer import SessionLost
from coordinator.fleet.sessions import NoSession
from coordinator.transport.flower_records import read_claim
from protocols.errors import AwaitingTrust, Refused, Unreachable, UploadRefused, UploadUnneeded
from protocols.messages import refusals
from protocols.messages.envelope import Notice
from protocols.messages.mqtt import MqttAddress
from protocols.messages.work import SIGNED_WORK, PollRequest, PollResponse, Work
from tests.agent.daemon.test_agent import an_agent
from tests.support.https_site import HOST, Site
from tests.support.secure_cohort import me
from tests.support.waiting import until

pytestmark = pytest.mark.flower


class Asked:
    """An agent with a session, and the questions and replies of its coordinator."""

    def __init__(self, site: Site, agent: Agent) -> None:
        self.site, self.agent = site, agent
        self.notices: list[str] = []
        self.slept: list[float] = []
        agent._report._mqtt.notice = self._hear  # type: ignore[method-assign]
        agent._work._sleep = self._note_sleep  # type: ignore[method-assign,assignment]

    def _hear(self, notice: Notice) -> None:
        self.notices.append(notice.text)

    def _note_sleep(self, max_s: float, ready: object = None) -> None:
        self.slept.append(max_s)

    async def init(self, number: int) -> Message:
        """Ask for first weights; the reply that the coordinator gets."""
        work = Work(run="r", since=1.0, round=number, kind="init", task="ping", seed=number)
        payload, signature = SIGNED_WORK.seal(work, self.site.sign_key.sign)
        content = RecordDict({"config": ConfigRecord({"work": payload, "signature": signature})})
        (node,) = self.site.nodes.values()
        message = Message(content, node, "query.init", group_id="r")
        (mid,) = self.site.grid.push_messages([message])
        taken = await asyncio.to_thread(self.agent._sessions.link().pull)
        assert taken is not None
        assert await asyncio.to_thread(self.agent._work.answer, taken) is None
        await asyncio.sleep(0)  # what it reports comes on the event loop
        (reply,) = self.site.grid.pull_messages({mid})
        return reply


@pytest.fixture
async def asked(site: Site, tmp_path: Path) -> Asked:
    agent = an_agent(site, tmp_path / "box")
    await asyncio.to_thread(agent._sessions._open)
    return Asked(site, agent)


async def test_a_refused_update_is_reported_once_and_the_agent_waits_longer_each_time(
    site: Site, asked: Asked, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        site.transfer.limits.max_bytes = 3
        for number in range(1, 9):
            reply = await asked.init(number)
            assert reply.has_error(), "the coordinator gets the reason, and the session goes on"
            text = reply.error.reason
            assert text.startswith("upload_refused: the coordinator refuses the upload: it has ")
            assert "this run takes at most 3" in text
            assert "then start a new run" in text
        told = "the work failed: the coordinator refuses the upload: it has"
        assert caplog.text.count(told) == 1
        assert "then start a new run" in asked.agent._report._status.last_error
        assert len(asked.slept) == 8
        bounds = (work_thread._MIN_REFUSAL_WAIT_S, work_thread._MAX_REFUSAL_WAIT_S)
        assert all(bounds[0] <= wait_s <= bounds[1] for wait_s in asked.slept)
        assert len(set(asked.slept)) == 8, "random, so that refused agents do not come together"
        # An update that is taken ends that, and the next refusal is news again.
        site.transfer.limits.max_bytes = 1 << 20
        read_claim(await asked.init(9))
        assert len(asked.slept) == 8
        site.transfer.limits.max_bytes = 3
        await asked.init(10)
        assert caplog.text.count(told) == 2
    finally:
        asked.agent._work.close()


async def test_an_update_that_nothing_waits_for_is_no_failure(site: Site, asked: Asked) -> None:
    try:
        site.transfer.limits.is_expected = lambda: False
        reply = await asked.init(1)
        assert reply.error.reason.startswith("unneeded: the upload is not needed any more")
        assert asked.agent._report._status.last_error == ""
        assert asked.slept == []
    finally:
        asked.agent._work.close()


async def test_only_updates_of_the_current_run_are_taken(
    site: Site, asked: Asked, tmp_path: Path
) -> None:
    """The agent names the run of the work that it has last received."""
    try:
        await asked.init(1)
        link, update = asked.agent._sessions.link(), tmp_path / "update"
        update.write_bytes(b"x")
        digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
        site.lane.uploads.begin_run("another")
        with pytest.raises(UploadUnneeded, match="its run has ended"):
            await asyncio.to_thread(link.upload, digest, update)
        site.lane.uploads.begin_run("r")
        await asyncio.to_thread(link.upload, digest, update)
        site.transfer.limits.max_bytes = 0
        with pytest.raises(Unreachable, match="503"):
            await asyncio.to_thread(link.upload, "0" * 64, update)
        site.transfer.limits.max_bytes = 1
        with pytest.raises(Refused, match="not those of the announced digest") as damaged:
            await asyncio.to_thread(link.upload, "0" * 64, update)
        assert not refusals.refusal_of(damaged.value).permanent
    finally:
        asked.agent._work.close()


async def test_why_a_run_does_not_use_this_machine_reaches_its_owner_once(
    site: Site, asked: Asked, caplog: pytest.LogCaptureFixture
) -> None:
    said = "run r: column x: expected number, found text"

    async def refused(peer: str, request: PollRequest) -> PollResponse:
        return PollResponse(notices=(said,))

    site.poll = refused  # type: ignore[method-assign]
    try:
        for _ in range(2):
            assert await asyncio.to_thread(asked.agent._sessions.link().pull) is None
        told = asked.agent._report._status.last_error
        assert told == f"the coordinator says: {said}"
        assert caplog.text.count(said) == 1
    finally:
        asked.agent._work.close()


async def test_a_refusal_is_one_that_the_same_work_would_meet_again(asked: Asked) -> None:
    assert refusals.refusal_of(UploadRefused("x")).permanent
    assert not refusals.refusal_of(UploadUnneeded("x")).permanent
    asked.agent._work.close()


async def test_sessions_that_end_at_once_are_opened_less_and_less_often_and_reported_once(
    site: Site, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions, waits = asked.agent._sessions, list[float]()
    opened = 0

    async def wait(_: asyncio.Event, max_s: float) -> None:
        waits.append(max_s)
        await asyncio.sleep(0)

    async def closed_by_the_coordinator(answer: object) -> None:
        nonlocal opened
        opened += 1
        raise SessionLost("the coordinator answered 412")

    monkeypatch.setattr(session_loop, "wait_at_most", wait)
    monkeypatch.setattr(sessions, "_pull_and_answer", closed_by_the_coordinator)
    running = asyncio.create_task(sessions.run(asked.agent._work))
    try:
        await until(lambda: len(waits) >= 40)
    finally:
        running.cancel()
        asked.agent._work.close()
    assert waits[0] < 1.0
    assert max(waits) > 5.0
    assert max(waits) <= session_loop._MAX_RECONNECT_S
    (notice,) = asked.notices
    assert "sessions ended soon: the coordinator answered 412" in notice
    assert "look at the coordinator's log" in notice


async def test_a_session_that_lasts_ends_the_long_waits(
    site: Site, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = asked.agent._sessions
    for _ in range(4):
        sessions._count_short(time.monotonic(), "of a test")
    sessions._count_short(0.0, "it was not opened")
    assert sessions._short_sessions == 4
    monkeypatch.setattr(session_loop, "_SHORT_SESSION_S", 0.0)
    sessions._count_short(time.monotonic(), "of a test")
    assert sessions._short_sessions == 0
    asked.agent._work.close()


async def test_a_heartbeat_that_opens_a_session_again_brings_the_new_login(
    site: Site, asked: Asked
) -> None:
    """A coordinator that has removed a peer has another login for the broker after a restart."""
    agent, moved, poll = asked.agent, list[MqttAddress](), site.poll
    agent._sessions._enrolled.on_broker_changed = moved.append
    login = replace(site.mqtt_for(HOST, ""), password="another")

    async def restarted(peer: str, request: PollRequest) -> PollResponse:
        site.poll = poll  # type: ignore[method-assign]
        raise NoSession(peer)

    site.poll, site.mqtt_for = restarted, lambda host, user: login  # type: ignore[method-assign]
    try:
        await agent._sessions._send_heartbeat(agent._sessions.link())
        await until(lambda: moved)
        assert [address.password for address in moved] == ["another"]
        assert enrollment_file.read_enrollment(agent._home).mqtt.password == "another"
        assert await agent._sessions._send_heartbeat(agent._sessions.link())
    finally:
        agent._work.close()


async def test_an_owner_who_trusts_the_missing_peers_has_decided(
    asked: Asked, caplog: pytest.LogCaptureFixture
) -> None:
    work, home = asked.agent._work, asked.agent._home
    try:
        assert not work.owner_has_decided()
        message = Message(RecordDict(), 1, "train", group_id="r")
        for _ in range(2):
            reply = work._failure(message, AwaitingTrust("a sum needs 2 more", "trust add ID"))
        assert (
            reply.error.reason
            == "not_allowed: awaits consent: trust: a sum needs 2 more (trust add ID)"
        )
        assert caplog.text.count("a sum needs 2 more") == 1
        assert not work.owner_has_decided()
        settings.change(home, trust={me(1).peer: "", me(2).peer: ""})
        assert work.owner_has_decided()
        assert not work.owner_has_decided(), "said once"
    finally:
        work.close()
