"""All that a real agent sends in a secure round, searched for its update and its loss.

The agent has its trainer process, its HTTPS client and its MQTT messages. The two other peers are
ClientApps in this process.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from flwr.app import Message
from msgspec.structs import replace

from agent.clientapp.app import DESCRIPTION
from agent.daemon.agent import Agent
from agent.home import audit_log, settings
from protocols.messages.envelope import LogRequest
from protocols.messages.work import Work
from protocols.privacy.secagg import messages, tails
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.messages import ShareRequest, SumKind, encode
from tests.agent.daemon.test_agent import an_agent
from tests.support import secret_task
from tests.support.https_site import Site
from tests.support.secure_desks import STEP_OF, Room, Where, message

pytestmark = pytest.mark.attack("secure", by="coordinator")
TASK = "secret"


class Watched:
    """A running agent, and everything that has left it."""

    def __init__(
        self, site: Site, folder: Path, monkeypatch: pytest.MonkeyPatch, others: int = 2
    ) -> None:
        self.site, self.sent = site, list[bytes]()
        self.agent: Agent = an_agent(site, folder / "box")
        home = folder / "box"
        settings.change(home, task_files={TASK: f"{secret_task.__file__}:Secret"})
        self.room = Room(folder, others, site=Where(site.fleet_id, site.sign_key))
        settings.change(home, trust=dict.fromkeys(self.room.desks, ""), log_level="debug")
        self.agent._work.close()
        joined = self.agent._sessions._enrolled._enrollment
        self.agent = Agent(home, joined, settings.read(home))
        self.agent._runner.start()
        self.peer, self.home = joined.peer, home
        self.room.task = TASK
        for desk in self.room.desks.values():
            desk.trainer.tallies, desk.owner = {}, replace(desk.owner, tasks=(TASK,))
        self.room.trust_all(only=[*self.room.desks, self.peer])
        assert site.lane.save(self.room.start) == self.room.base
        self._watch(monkeypatch)

    def _watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        send, mqtt = ssl.SSLSocket.send, self.agent._presence

        def watched(socket: ssl.SSLSocket, data: Any, flags: int = 0) -> int:
            self.sent.append(bytes(data))
            return send(socket, data, flags)

        monkeypatch.setattr(ssl.SSLSocket, "send", watched)  # only clients use it here
        for name in ("set_presence", "telemetry", "notice"):
            monkeypatch.setattr(mqtt, name, self._hear)

    def _hear(self, body: Any) -> None:
        self.sent.append(msgspec.json.encode(body))

    async def ask(self, work: Work, request: bytes = b"") -> bytes:
        """The description in the agent's reply; empty if it has none."""
        reply = await self.reply(work, request)
        assert not reply.has_error(), reply.error.reason
        found = reply.content.config_records.get(DESCRIPTION, {}).get("description", b"")
        assert isinstance(found, bytes)
        return found

    async def reply(self, work: Work, request: bytes = b"") -> Message:
        """The agent's reply."""
        if request:
            work = replace(work, request=hashlib.sha256(request).hexdigest())
        asked = message(work, request, self.site.sign_key, self.site.nodes[self.peer])
        (message_id,) = self.site.grid.push_messages([asked])
        taken = await asyncio.to_thread(self.agent._sessions.link().pull)
        assert taken is not None
        await asyncio.to_thread(self.agent._work.answer, taken)
        (reply,) = self.site.grid.pull_messages({message_id})
        return reply

    async def round(self, kind: SumKind, turn: int) -> Aggregator:
        """A secure sum of this agent and the two others."""
        work = self.room.work(kind, turn=turn)
        card = messages.decode_ready(await self.ask(work)).card
        cards = (card, *self.room.cards(kind, turn).cards)
        loss = {"train_loss" if kind == "train" else "loss": 0.0}
        plan = self.room.plan(kind, names=tails.names(loss, {}))
        state = Aggregator(CohortFixed(request=ShareRequest(plan=encode(plan), cards=cards)))
        for decide in (state.fix_sharers, state.fix_survivors, None, None):
            request = state.request_for(self.peer)
            assert request is not None
            step = STEP_OF[type(request)]
            answer = await self.ask(self.room.work(step, turn=turn), encode(request))
            self.room.play(state, turn=turn)
            state.take(self.peer, messages.decode_answer(step, answer))
            if decide:
                state.apply(decide())
            elif state.can_recover():
                break
            else:
                self.room.play(state, turn=turn)
        assert state.can_recover()
        return state

    async def send_logs(self) -> None:
        asked = LogRequest(request_id="x", max_lines=200)
        await asyncio.to_thread(self.agent._send_logs, asked)


@contextlib.asynccontextmanager
async def running(
    folder: Path, monkeypatch: pytest.MonkeyPatch, others: int = 2
) -> AsyncIterator[Watched]:
    """An agent with a session, and so many other peers."""
    home = folder / "coordinator"
    home.mkdir()
    with Site(home, flower=True).up() as site:
        watched = Watched(site, folder, monkeypatch, others)
        try:
            await asyncio.to_thread(watched.agent._sessions._open)
            yield watched
        finally:
            await asyncio.to_thread(watched.agent._work.close)
            await watched.agent._sessions.close()


@pytest.fixture
async def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Watched]:
    async with running(tmp_path, monkeypatch) as found:
        yield found


def secrets_in(sent: bytes, start: Any) -> set[str]:
    """What of the agent's update and loss is in these bytes."""
    found = set()
    for name, moved in secret_task.change().items():
        for what, array in (("change", moved), ("weights", start[name] + moved)):
            flat = np.asarray(array, "<f4").ravel()
            if any(flat[i : i + 2].tobytes() in sent for i in range(len(flat) - 1)):
                found.add(what)
    loss, weighted = secret_task.LOSS, [secret_task.LOSS * weight for weight in range(1, 5)]
    for number in (loss, *weighted):
        forms = (np.float64(number).tobytes(), np.float32(number).tobytes(), b"%.2g" % number)
        fixed = round(number * 2**20).to_bytes(8, "little")
        if any(form in sent for form in (*forms[:2], fixed, b"%.5f" % number)):
            found.add("loss")
    if b'"loss":%.2g' % loss in sent:
        found.add("coarse loss")
    return found


async def test_a_secure_round_leaves_neither_update_nor_loss(watched: Watched) -> None:
    """Attack: read all that an agent sends in a secure round: requests, uploads, MQTT, its log."""
    state = await watched.round("train", 0)
    await watched.round("evaluate", 1)
    await watched.send_logs()
    sent = b"".join(watched.sent)
    assert b'"kind":"unmask"' in sent, "the search sees what is sent"
    assert b'"phase":"train"' in sent
    assert secrets_in(sent, watched.room.start) == set()
    assert len(state.survivors) == 3
    told = (watched.home / audit_log.FILE).read_text()
    assert "0.765" not in told


async def test_the_search_finds_both_in_a_plain_round(watched: Watched) -> None:
    """Control: the same agent in a run that is not secure."""
    await watched.ask(watched.room.work("train", codec="fp32"))
    await watched.ask(watched.room.work("evaluate", codec="fp32"))
    found = secrets_in(b"".join(watched.sent), watched.room.start)
    assert found == {"weights", "loss", "coarse loss"}
