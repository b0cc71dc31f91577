"""Secure runs of an in-process fleet, with the real ClientApps."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Message
from msgspec.structs import replace

from agent.clientapp.interfaces import signed_payload
from coordinator.runs.state import Run
from coordinator.storage import run_events
from protocols.errors import CommonweightError
from protocols.messages.work import SIGNED_WORK, Work
from protocols.model.weights import Weights
from tests.support.in_process_fleet import Agent, Fleet, fleet_of, some_data

DATA = [some_data(40 + 10 * seed, seed) for seed in range(6)]


def trust_each_other(fleet: Fleet) -> None:
    """All owners trust all peers."""
    for agent in fleet.agents:
        others = {other.peer: "" for other in fleet.agents if other is not agent}
        agent.owner = replace(agent.owner, trust=others)


@asynccontextmanager
async def secure_fleet(folder: Path, count: int = 3) -> AsyncIterator[Fleet]:
    """A coordinator and agents whose owners trust each other."""
    async with fleet_of(folder, *DATA[:count]) as fleet:
        trust_each_other(fleet)
        yield fleet


def start(fleet: Fleet, **spec: Any) -> str:
    """Start a secure run."""
    return fleet.start(**{"rounds": 2, "quorum": 3, "secure": True, "clip_norm": 10.0, **spec})


def before(agent: Agent, kind: str, do: Callable[[Work], None], *, times: int = 1) -> None:
    """Call `do` before this agent's first answers to work of a kind."""
    left = [times]

    def hook(message: Message) -> None:
        payload, _ = signed_payload(message, "config", "work")
        work = SIGNED_WORK.decode(payload)
        if work.kind == kind and left[0]:
            left[0] -= 1
            do(work)

    agent.before_answer = hook


def refuse(_: Work) -> None:
    raise CommonweightError("not this time")


def plain_mean(fleet: Fleet, run: Run, number: int) -> Weights:
    """What the peers of a round trained, averaged in float64 with the weights of the cohort."""
    closed = run.history[number - 1]
    agents = [agent for agent in fleet.agents if agent.peer in closed.contributors]
    made = [agent.trainer.made[number] for agent in agents]
    examples = np.array([len(agent.trainer.data.y) for agent in agents], np.float64)
    share = examples / examples.sum()
    return Weights(
        {
            name: sum(
                s * np.asarray(one[name], np.float64) for s, one in zip(share, made, strict=True)
            ).astype(np.float32)
            for name in made[0]
        }
    )


def largest_difference(one: Weights, other: Weights) -> float:
    return max(float(np.abs(np.asarray(one[n]) - np.asarray(other[n])).max()) for n in one)


def events(fleet: Fleet, run_id: str) -> list[str]:
    """The names of the run's events about sums."""
    kinds = (
        run_events.CohortFixed,
        run_events.SharersFixed,
        run_events.MaskedUpdateAccepted,
        run_events.SurvivorsFixed,
        run_events.CohortLost,
        run_events.VersionCommitted,
    )
    return [type(fact).__name__ for fact in fleet.facts(run_id) if isinstance(fact, kinds)]
