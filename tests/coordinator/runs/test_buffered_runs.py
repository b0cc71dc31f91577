"""Buffered runs from start to end: a real coordinator, and agents that are fast, slow and gone."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.storage import run_events
from coordinator.storage.run_events import RunSpec
from protocols.errors import CommonweightError, UsageError
from protocols.messages.states import RunState
from protocols.model import weights
from protocols.model.weights import Weights
from tests.coordinator.runs.test_loop import Door
from tests.support.in_process_fleet import Agent, Fleet, first_weights, fleet_of, some_data
from tests.support.waiting import until

THREE = tuple(some_data(20 + 30 * seed, seed) for seed in range(3))


pytestmark = pytest.mark.usefixtures("coordinator_home")


def start(fleet: Fleet, **spec: Any) -> str:
    return fleet.start(mode="buffered", **({"buffer": 2, "rounds": 4} | spec))


def accepted(fleet: Fleet, run_id: str, peer: str = "") -> list[run_events.UpdateAccepted]:
    """The updates that count, in the order in which they came."""
    found = fleet.facts(run_id, run_events.UpdateAccepted)
    return [f for f in found if f.update.digest and peer in ("", f.peer)]


def versions(fleet: Fleet, run_id: str) -> int:
    return len(fleet.facts(run_id, run_events.VersionCommitted))


def shut(agent: Agent) -> Callable[[], None]:
    """Hold up this agent's next training; gives what lets it go on."""
    held = {"shut": True}
    before = agent.trainer.before

    def hold(kind: str, number: int) -> None:
        before(kind, number)
        while kind == "train" and held["shut"] and not agent.stopping:
            agent._stopping.wait(0.01)

    agent.trainer.before = hold
    return lambda: held.update(shut=False)


async def test_with_one_peer_and_no_delay_it_is_fedavg(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, THREE[0]) as fleet:
        rounds = await fleet.finished(fleet.start(rounds=4, quorum=1, seed=7))
        run = await fleet.finished(start(fleet, buffer=1, seed=7))
        assert run.state is RunState.FINISHED
        assert [c.digest for c in run.history] == [c.digest for c in rounds.history]
        assert all(closed.metrics for closed in run.history[-1:])
        assert fleet.refusals(run.id) == []


async def test_no_peer_waits_for_a_slow_one(tmp_path: Path) -> None:
    """Two fast peers make all versions while the third is at its first training."""
    async with fleet_of(tmp_path, *THREE) as fleet:
        let_go = shut(fleet.agents[2])
        run_id = start(fleet, rounds=5, buffer=3)
        await until(lambda: versions(fleet, run_id) == 4)
        let_go()
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED, run.ended_because
        fast = {agent.peer for agent in fleet.agents[:2]}
        assert all(set(closed.contributors) <= fast for closed in run.history[:4])
        # Three updates of two peers: somebody counts twice, with another training each time.
        assert all(len(closed.contributors) >= 3 for closed in run.history)
        trained = accepted(fleet, run_id)
        assert len({(f.peer, f.round, f.update.turn) for f in trained}) == len(trained)


async def test_an_update_too_far_behind_is_refused_by_name_and_its_peer_asked_anew(
    tmp_path: Path,
) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        slow = fleet.agents[2]
        let_go = shut(slow)
        run_id = start(fleet, rounds=400, buffer=1, max_staleness=2)
        await until(lambda: versions(fleet, run_id) >= 4)
        let_go()
        await until(lambda: accepted(fleet, run_id, slow.peer))
        fleet.hub.runs.stop(run_id)
        await fleet.finished(run_id)
        refused = [f for f in fleet.facts(run_id, run_events.UpdateRefused) if f.peer == slow.peer]
        assert refused[0].reason == "too stale"
        assert "at most 2" in refused[0].detail or "the maximum is 2" in refused[0].detail
        assert all(0 <= f.update.staleness <= 2 for f in accepted(fleet, run_id))


async def test_a_stale_update_moves_the_newest_version_by_its_discounted_change(
    tmp_path: Path,
) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        slow = fleet.agents[1]
        let_go = shut(slow)
        fleet.agents[0].trainer.before = _only(2)
        run_id = start(fleet, rounds=3, buffer=1, weighting="equal", server_lr=0.5)
        await until(lambda: versions(fleet, run_id) == 2)
        let_go()
        run = await fleet.finished(run_id)
        (late,) = accepted(fleet, run_id, slow.peer)
        assert late.update.staleness == 2
        base, head = first_weights(5), fleet.version(run.history[-2].digest)
        made = slow.trainer.made[1]
        for name in made:
            change = np.subtract(made[name], base[name]) * 0.5 / math.sqrt(3)
            np.testing.assert_allclose(
                fleet.version(run.head)[name], np.add(head[name], change), rtol=0, atol=1e-6
            )
        assert run.history[-1].staleness == {slow.peer: 2}


def _only(count: int) -> Callable[[str, int], None]:
    """A peer that fails after so many trainings."""
    left = [count]

    def before(kind: str, number: int) -> None:
        left[0] -= kind == "train"
        if left[0] < 0:
            raise CommonweightError("enough")

    return before


async def test_concurrency_bounds_how_many_work(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        run = await fleet.finished(start(fleet, rounds=6, concurrency=1, buffer=1))
        working, most = set[str](), 0
        for fact in fleet.facts(run.id):
            if isinstance(fact, run_events.WorkGiven):
                working.add(fact.peer)
            elif isinstance(fact, run_events.UpdateAccepted) and fact.update.digest:
                working.discard(fact.peer)
            most = max(most, len(working))
        assert most == 1
        assert {f.peer for f in accepted(fleet, run.id)} == {a.peer for a in fleet.agents}


async def test_a_restart_goes_on_with_work_buffer_and_answers(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            for number, data in enumerate(THREE):
                fleet.join(f"agent{number}", data)
            await fleet.online(3)
            let_go = [shut(agent) for agent in fleet.agents[1:]]
            run_id = start(fleet, buffer=4, rounds=2)
            await until(lambda: len(accepted(fleet, run_id)) >= 2)
        before = accepted(fleet, run_id)
        for open_door in let_go:
            open_door()
        async with fleet.up():
            run = await fleet.finished(run_id)
            await fleet.close()
        assert run.state is RunState.FINISHED, run.ended_because
        # What was in the buffer is in the version; nobody trained again what it had in hand.
        assert {fact.peer for fact in before} <= set(run.history[0].contributors)
        for agent in fleet.agents:
            trained = [work for work in agent.trainer.worked if work == ("train", 1)]
            counted = [f for f in accepted(fleet, run_id, agent.peer) if f.round == 1]
            # Not of an evaluation that came as the next version was made.
            refused = fleet.facts(run_id, run_events.UpdateRefused)
            late = [f for f in refused if (f.round, f.peer, f.kind) == (1, agent.peer, "train")]
            # The run may have ended before it could answer what it trained last.
            in_hand = agent.trainer.worked[-1:] == [("train", 1)]
            assert len(trained) - len(counted) - len(late) in ({0, 1} if in_hand else {0})
        committed = fleet.facts(run_id, run_events.VersionCommitted)
        assert sum(len(fact.contributors) for fact in committed) <= len(accepted(fleet, run_id))
    finally:
        await fleet.close()


async def test_a_peer_that_fails_does_not_hold_up_the_others(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        fleet.agents[0].trainer.step = lambda model, data: Weights(
            {name: np.full_like(model[name], math.nan) for name in model}
        )
        run = await fleet.finished(start(fleet, rounds=3, buffer=2))
        assert run.state is RunState.FINISHED
        bad = fleet.agents[0].peer
        reasons = {reason for _, peer, reason in fleet.refusals(run.id) if peer == bad}
        assert "not finite" in reasons
        # Once a version, and not in a circle.
        assert len([1 for _, peer, _ in fleet.refusals(run.id) if peer == bad]) <= 8
        assert all(bad not in closed.contributors for closed in run.history)


@pytest.mark.parametrize("codec", ["fp32", "int8"])
async def test_the_spool_is_empty_and_old_versions_are_gone_after_the_run(
    tmp_path: Path, codec: str
) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        run = await fleet.finished(start(fleet, rounds=6, buffer=2, codec=codec))
        assert run.state is RunState.FINISHED
        held = {path.stem for path in (fleet.home / "versions").glob("*.safetensors")}
        assert {run.head, run.best.digest if run.best else ""} <= held
        assert len(held) <= 6
        for digest in held:
            assert weights.file_digest(fleet.hub.weight_store.version_path(digest)) == digest


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"mode": "buffered"}, "--buffer"),
        ({"mode": "buffered", "buffer": 2, "quorum": 2}, "--quorum"),
        ({"mode": "buffered", "buffer": 2, "max_staleness": -1}, "--max-staleness"),
        ({"mode": "buffered", "buffer": 2, "concurrency": -1}, "--concurrency"),
        ({"mode": "buffered", "buffer": 2, "server_lr": 0.0}, "--server-lr"),
        ({"mode": "buffered", "buffer": 2, "strategy": "fedmedian"}, "several"),
        ({"mode": "buffered", "buffer": 2, "strategy": "scaffold"}, "control variates"),
        (
            {"mode": "buffered", "buffer": 2, "strategy_args": {"fraction_train": 0.5}},
            "fraction_train",
        ),
        ({"buffer": 2}, "--mode buffered"),
        ({"server_lr": 0.5}, "--mode buffered"),
        ({"min_examples": 0}, "--min-examples"),
    ],
)
async def test_what_does_not_fit_is_refused(
    tmp_path: Path, spec: dict[str, Any], words: str
) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        with pytest.raises(UsageError) as caught:
            fleet.hub.runs.start(RunSpec(task="softmax", rounds=1, **spec), "")
        assert words in caught.value.message + caught.value.hint


@pytest.mark.parametrize("mode", ["synchronous", "buffered"])
async def test_a_peer_with_few_examples_is_left_out_with_the_reason(
    tmp_path: Path, mode: str
) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:  # of 20, 50 and 80 examples
        spec: dict[str, Any] = {"mode": mode, "buffer": 2} if mode == "buffered" else {}
        run = await fleet.finished(fleet.start(rounds=3, min_examples=50, **spec))
        small = fleet.agents[0].peer
        assert run.excluded == {small}
        assert all(small not in closed.contributors for closed in run.history)
        assert [r for r in fleet.refusals(run.id) if r[1] == small] == [
            (1, small, "too few examples")
        ]
        assert len([w for w in fleet.agents[0].trainer.worked if w[0] == "train"]) == 1


async def test_a_slow_peer_is_asked_once_in_a_time(tmp_path: Path) -> None:
    """Door as in synchronous runs: its answer of version 0 counts when it comes."""
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        slow = Door(fleet.agents[1], 1)
        run_id = start(fleet, rounds=3, buffer=2)
        await until(slow.reached.is_set)
        await until(lambda: versions(fleet, run_id) >= 1)
        slow.open()
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED


async def test_what_is_moved_beyond_all_numbers_is_no_version(tmp_path: Path) -> None:
    """Each update is finite; three times its change is not."""
    async with fleet_of(tmp_path, THREE[0]) as fleet:
        huge = Weights({n: np.full_like(a, 3e38) for n, a in first_weights(5, 7).items()})
        fleet.agents[0].trainer.step = lambda model, data: huge
        run = await fleet.finished(start(fleet, rounds=1, buffer=1, server_lr=3.0))
        assert run.state is RunState.FAILED
        assert "not finite" in run.ended_because
        version = fleet.version(run.head)
        assert all(np.isfinite(version[name]).all() for name in version)
