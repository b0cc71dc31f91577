"""Runs whose peers lack their owners' consent: they wait, say for whom, and go on when it comes."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from agent.home.settings_schema import AgentSettings
from protocols.errors import AwaitingConsent, NotAllowed
from protocols.messages.states import RunState
from tests.support.in_process_fleet import Agent, Fleet, fleet_of, some_data
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("no_long_waits")

ALLOWED = AgentSettings(tasks=("softmax",))
#: The task is on the machine, and its owner has not decided.
UNDECIDED = AgentSettings(task_files={"softmax": "/nowhere/softmax.py:Softmax"})
FORBIDDEN = AgentSettings(forbidden_tasks=("softmax",))


def decide(agent: Agent, owner: AgentSettings) -> None:
    """Let an owner decide while the agent runs, as `commonweight-agent task` does."""
    agent.owner = owner
    assert agent.link is not None
    agent.link.owner_has_decided = True


def hold_back(agent: Agent, kind: str, number: int) -> tuple[threading.Event, threading.Event]:
    """Hold one piece of work back: an event when it is reached, and one to let it go on."""
    reached, released = threading.Event(), threading.Event()

    def before(now: str, round_: int) -> None:
        if (now, round_) == (kind, number):
            reached.set()
            released.wait(60)

    agent.trainer.before = before
    return reached, released


async def awaited(site: Fleet, run_id: str, *agents: Agent) -> None:
    """Wait until the run waits for the consent of these agents, and the monitor shows it."""
    count = f"{len(agents)} peer" + ("s" if len(agents) > 1 else "")
    names = ", ".join(one.machine.name for one in sorted(agents, key=lambda one: one.peer))
    text = f"the consent of {count} to the task softmax ({names})"
    await until(lambda: site.waits_for(run_id) == text)
    for agent in agents:
        shown = site.hub.fleet.peers[agent.peer]
        await until(lambda shown=shown: shown.awaits_consent == "softmax")


@pytest.mark.parametrize(
    "spec",
    [
        {"handshake": True},
        {"handshake": False},
        {"handshake": True, "mode": "buffered", "buffer": 2},
    ],
    ids=["handshake", "first weights", "buffered"],
)
async def test_a_run_goes_on_when_the_owners_decide(
    tmp_path: Path, coordinator_home: Path, spec: dict[str, Any]
) -> None:
    async with fleet_of(tmp_path, some_data(20, 0), some_data(20, 1)) as site:
        first, second = site.agents
        first.owner = second.owner = UNDECIDED
        run_id = site.start(rounds=2, **spec)
        await awaited(site, run_id, first, second)
        decide(first, ALLOWED)
        decide(second, ALLOWED)
        run = await site.finished(run_id)
        assert run.state is RunState.FINISHED
        kinds = [kind for _, _, kind in site.refusals(run_id)]
        assert kinds.count(AwaitingConsent.code) == 2, "nobody is asked again in vain"
        for agent in site.agents:
            shown = site.hub.fleet.peers[agent.peer]
            await until(lambda shown=shown: shown.awaits_consent == "")


async def test_a_run_goes_on_with_those_who_consent_and_takes_the_others_later(
    tmp_path: Path, coordinator_home: Path
) -> None:
    async with fleet_of(tmp_path, some_data(20, 0), some_data(20, 1)) as site:
        first, second = site.agents
        second.owner = UNDECIDED
        reached, released = hold_back(first, "train", 2)
        run_id = site.start(rounds=4, quorum=1, handshake=True)
        await until(reached.is_set)
        decide(second, ALLOWED)
        await until(lambda: not site.hub.runs.awaits(second.peer))
        released.set()
        run = await site.finished(run_id)
        assert len(run.history[0].contributors) == 1
        assert second.peer in run.history[-1].contributors


async def test_nobody_waits_for_an_owner_who_says_no(
    tmp_path: Path, coordinator_home: Path
) -> None:
    async with fleet_of(tmp_path, some_data(20, 0)) as site:
        (agent,) = site.agents
        agent.owner = UNDECIDED
        run_id = site.start(rounds=1, quorum=1, handshake=True)
        await awaited(site, run_id, agent)
        decide(agent, FORBIDDEN)
        run = await site.finished(run_id)
        assert run.state is RunState.FAILED
        assert "the owner of this machine forbids the task 'softmax'" in run.ended_because
        assert [kind for _, _, kind in site.refusals(run_id)] == [
            AwaitingConsent.code,
            NotAllowed.code,
        ]


async def test_the_wait_survives_a_restart_of_the_coordinator(
    tmp_path: Path, coordinator_home: Path
) -> None:
    site = Fleet(tmp_path)
    try:
        async with site.up():
            agent = site.join("agent0", some_data(20, 0))
            agent.owner = UNDECIDED
            await site.online(1)
            run_id = site.start(rounds=1, quorum=1, handshake=True)
            await awaited(site, run_id, agent)
        async with site.up():
            await site.online(1)
            await awaited(site, run_id, agent)
            decide(agent, ALLOWED)
            assert (await site.finished(run_id)).state is RunState.FINISHED
            await site.close()
    finally:
        await site.close()


async def test_consent_that_is_withdrawn_in_a_round_is_waited_for_again(
    tmp_path: Path, coordinator_home: Path
) -> None:
    async with fleet_of(tmp_path, some_data(20, 0), some_data(20, 1)) as site:
        first, second = site.agents
        reached, released = hold_back(first, "train", 2)
        run_id = site.start(rounds=3, quorum=2, handshake=True)
        await until(reached.is_set)
        second.owner = UNDECIDED
        released.set()
        await awaited(site, run_id, second)
        decide(second, ALLOWED)
        run = await site.finished(run_id)
        assert run.state is RunState.FINISHED
        assert len(run.history[-1].contributors) == 2
