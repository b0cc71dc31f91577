"""An agent that is paused answers the steps of a secure sum, and does no other work."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from msgspec.structs import replace

from agent.clientapp.secure_work import REQUEST
from agent.daemon import client_factory
from agent.daemon.agent import Agent
from agent.daemon.state_machine import AgentState, PauseRequested, SumChanged
from agent.home import settings
from agent.home.secure_store import TurnStore
from agent.trainer.ipc import Progress
from protocols.messages.envelope import Telemetry
from protocols.messages.states import PauseReason
from protocols.messages.work import SIGNED_WORK, OpenSum, PollRequest, PollResponse, Work
from protocols.privacy.secagg.messages import AgreeRequest, encode, masked_codec
from tests.agent.daemon.test_agent import an_agent
from tests.hostile.test_secure_traffic import running
from tests.support.https_site import Site
from tests.support.secure_desks import RUN
from tests.support.waiting import until

pytestmark = pytest.mark.flower

BASE = "ab" * 32


def some_work(site: Site, kind: str, request: bytes = b"") -> Message:
    work = Work(
        run="r",
        round=1,
        kind=kind,  # type: ignore[arg-type]
        task="ping",
        base=BASE,
        codec=masked_codec("fp32"),
        request=hashlib.sha256(request).hexdigest() if request else "",
    )
    payload, signature = SIGNED_WORK.seal(work, site.sign_key.sign)
    content = RecordDict({"config": ConfigRecord({"work": payload, "signature": signature})})
    if request:
        content[REQUEST] = ConfigRecord({"request": request})
    (node,) = site.nodes.values()
    return Message(content, node, f"query.{kind}" if request else kind, group_id="r")


async def answers_while_paused(site: Site, agent: Agent, reason: PauseReason) -> str:
    """What the agent, paused for this reason, answers to training and to a step; "" for nothing."""
    step = encode(AgreeRequest(cohort=b"c" * 32, survivors=()))
    train, agree = site.grid.push_messages(
        [some_work(site, "train"), some_work(site, "agree", step)]
    )
    agent._runner.dispatch(PauseRequested(reason))
    pulling = asyncio.create_task(agent._sessions._pull_and_answer(agent._work))
    try:
        found = list[Message]()
        for _ in range(20):
            found += site.grid.pull_messages({train, agree})
            await asyncio.sleep(0.05)
        assert all(reply.metadata.reply_to_message_id == agree for reply in found)
        return " ".join(reply.error.reason for reply in found)
    finally:
        pulling.cancel()
        agent._work.close()
        await agent._sessions.close()


@pytest.mark.parametrize("reason", [PauseReason.USER, PauseReason.OPERATOR])
async def test_steps_are_answered_in_a_pause(
    site: Site, tmp_path: Path, reason: PauseReason
) -> None:
    agent = an_agent(site, tmp_path / "box")
    await asyncio.to_thread(agent._sessions._open)
    agent._runner.dispatch(SumChanged(True))
    reply = await answers_while_paused(site, agent, reason)
    assert reply.startswith("secure_refused: this peer has made no card for this step")


@pytest.mark.attack("secure", by="coordinator")
async def test_no_step_is_answered_to_a_coordinator_that_showed_two_versions(
    site: Site, tmp_path: Path
) -> None:
    """Attack: ask for the steps of a secure sum after a proof of two different versions."""
    agent = an_agent(site, tmp_path / "box")
    await asyncio.to_thread(agent._sessions._open)
    agent._runner.dispatch(SumChanged(True))
    assert await answers_while_paused(site, agent, PauseReason.FORK) == ""


async def test_without_a_card_a_paused_agent_asks_for_nothing(site: Site, tmp_path: Path) -> None:
    agent = an_agent(site, tmp_path / "box")
    await asyncio.to_thread(agent._sessions._open)
    assert await answers_while_paused(site, agent, PauseReason.USER) == ""


async def test_a_sum_that_goes_on_no_more_is_not_awaited_for_ever(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_factory, "MAX_STEP_WAIT_S", 0.05)
    agent = an_agent(site, tmp_path / "box")
    try:
        agent._work._client._observer.on_sum(True)
        await until(lambda: agent._runner.state.in_sum)
        await until(lambda: not agent._runner.state.in_sum)
    finally:
        agent._work.close()


async def test_what_is_left_of_a_sum_that_is_over_is_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path, monkeypatch) as watched:
        # On a slow machine a comparison would be due, and this site has no models to ask for.
        settings.change(watched.home, compare="off")
        await watched.ask(watched.room.work("train"))
        folder, poll = watched.home / "outbox" / "secure", watched.site.poll
        turn = TurnStore(watched.home).newest(RUN)
        assert turn is not None
        told = list[OpenSum | None]()

        async def pull(is_over: bool) -> bool:
            async def answer(peer: str, asked: PollRequest) -> PollResponse:
                told.append(asked.open_sum)
                return replace(await poll(peer, asked), sum_is_over=is_over)

            monkeypatch.setattr(watched.site, "poll", answer)
            await asyncio.to_thread(watched.agent._work.pull, steps_only=False)
            files = [path for path in watched.home.glob("secure.db*") if path.is_file()]
            return any(turn.master in file.read_bytes() for file in files)

        assert await pull(is_over=False)
        assert (folder / "trained.safetensors").exists()
        assert not await pull(is_over=True)
        assert list(folder.iterdir()) == []
        assert not await pull(is_over=True)
        open_sum = OpenSum(run=RUN, round=1, turn=0, kind="train")
        assert told == [open_sum, open_sum, None]


async def test_no_loss_leaves_by_telemetry_in_a_secure_run(site: Site, tmp_path: Path) -> None:
    """A plain run has two digits of it."""
    agent = an_agent(site, tmp_path / "box")
    told = list[Telemetry]()
    agent._report._mqtt.telemetry = told.append  # type: ignore[method-assign,assignment]
    try:
        for codec in (masked_codec("int8"), "int8"):
            for loss in (0.123, None):
                work = Work(run="r", round=1, kind="train", task="ping", codec=codec)
                now = AgentState(work=work)
                progress = Progress(
                    id=1, phase="train", step=1, steps=2, loss=loss, examples_per_s=1.0
                )
                agent._report.progress(now, progress, 0)
        assert [(one.loss, one.diverged) for one in told] == [
            (None, False), (None, False), (0.12, False), (None, True)
        ]  # fmt: skip
    finally:
        agent._work.close()
