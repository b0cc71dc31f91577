"""An agent stops its work for a run that has ended."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from agent.daemon import state_machine
from agent.tasks.work import Train
from protocols.messages.work import PollRequest, PollResponse
from tests.agent.daemon.test_agent import WORK, an_agent
from tests.support.https_site import Site
from tests.support.waiting import until

pytestmark = pytest.mark.flower


@pytest.mark.parametrize("kind", ["ahead", "work"])
async def test_the_work_for_a_run_that_has_ended_is_cancelled(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Training ahead, too, which the coordinator knows nothing of."""
    agent = an_agent(site, tmp_path / "box")
    cancelled = list[Any]()
    monkeypatch.setattr(agent._work.trainer, "cancel", lambda kind=None: cancelled.append(kind))
    poll, told = site.poll, list[str]()

    async def answer(peer: str, asked: PollRequest) -> PollResponse:
        told.append(asked.run)
        return replace(await poll(peer, asked), run_is_over=asked.run == "r")

    monkeypatch.setattr(site, "poll", answer)
    try:
        await asyncio.to_thread(agent._sessions._open)
        heartbeat = agent._sessions.link().heartbeat
        await asyncio.to_thread(heartbeat)
        for run in ("s", "r"):
            work = replace(WORK, run=run)
            events: dict[str, state_machine.Event] = {
                "ahead": state_machine.AheadChanged(work), "work": state_machine.WorkStarted(work)
            }  # fmt: skip
            agent._runner.dispatch(events[kind])
            assert cancelled == []
            await asyncio.to_thread(heartbeat)
        await until(lambda: cancelled)
        assert (told, cancelled) == (["", "s", "r"], [Train if kind == "ahead" else None])
    finally:
        agent._work.close()
        await agent._sessions.close()
