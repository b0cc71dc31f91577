"""Whole runs: a real coordinator and agents in threads, with peers that dawdle, fail and cheat."""

from __future__ import annotations

import contextlib
import math
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from msgspec.structs import replace

from agent.tasks.work import Done
from coordinator.remote import run_options
from coordinator.runs import state, timing, transitions
from coordinator.storage import run_events, settings
from coordinator.storage.run_events import RunSpec
from coordinator.storage.sqlite_ledger import SqliteLedger
from coordinator.transport.flower import Superlink
from coordinator.transport.flower_records import CLAIM, read_claim
from protocols.enrollment import identity
from protocols.errors import (
    BadMessage,
    CannotBeMet,
    CommonweightError,
    DiskFull,
    NotRunning,
    UnknownName,
    Unreachable,
    UsageError,
)
from protocols.messages import envelope
from protocols.messages.states import RunState
from protocols.messages.work import SIGNED_CLAIM, UpdateClaim
from protocols.model import weights
from protocols.model.bfloat16 import bf16_to_float32, float32_to_bf16
from protocols.model.weights import Weights
from tests.support.in_process_fleet import (
    Agent,
    Data,
    Fleet,
    first_weights,
    fleet_of,
    gradient_step,
    some_data,
)
from tests.support.waiting import until

pytestmark = pytest.mark.usefixtures("coordinator_home")


THREE = tuple(some_data(20 + 30 * seed, seed) for seed in range(3))


class Door:
    """Holds up an agent's training in one round until it is opened; stopping opens it too."""

    def __init__(self, agent: Agent, number: int, kind: str = "train") -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        self._agent, self._at = agent, (kind, number)
        self._next = agent.trainer.before
        agent.trainer.before = self._pass

    def _pass(self, kind: str, number: int) -> None:
        self._next(kind, number)
        if (kind, number) == self._at:
            self.reached.set()
            while not self._open.wait(0.02) and not self._agent.stopping:
                pass

    def open(self) -> None:
        self._open.set()


class Clock:
    """The clock that deadlines are measured with."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self._ahead_s

    def pass_deadline(self, fleet: Fleet) -> None:
        """Let the deadline of the present phase pass. Later phases have theirs from now on."""
        self._ahead_s += 3600.0
        fleet.hub.runs.wake()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock


def contributors(run: state.Run) -> list[tuple[str, ...]]:
    return [closed.contributors for closed in run.history]


def named(agents: list[Agent]) -> tuple[str, ...]:
    return tuple(sorted(agent.peer for agent in agents))


def accepted(
    fleet: Fleet, run_id: str, number: int, *agents: Agent, evaluations: bool = False
) -> bool:
    """True if the ledger has these agents' updates of the round, or their evaluations of it."""
    facts = fleet.facts(run_id, run_events.UpdateAccepted)
    found = {
        fact.peer
        for fact in facts
        if fact.round == number and bool(fact.update.digest) is not evaluations
    }
    return found >= {agent.peer for agent in agents}


# --- from start to end -----------------------------------------------------------------------


async def test_a_run_from_start_to_end(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        run_id = fleet.start(rounds=3, quorum=3, seed=5, keep_versions=2)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        await until(lambda: fleet.hub.runs.current is None)
        (listed,) = fleet.hub.runs.all()
        assert [closed.digest for closed in listed.history] == [c.digest for c in run.history[-2:]]
        assert listed.best is not None
        assert not any(closed.norms or closed.contributors for closed in listed.history)
        assert not any((listed.training_seconds, listed.described, listed.best.norms))
        assert fleet.hub.runs.find(run_id) == run
        assert contributors(run) == [named(fleet.agents)] * 3
        assert [set(closed.metrics) for closed in run.history] == [{"loss"}] * 3
        assert all(closed.bytes_up > 0 for closed in run.history)
        assert run.best is not None
        assert fleet.refusals(run_id) == []
        committed = fleet.facts(run_id, run_events.VersionCommitted)
        first = fleet.facts(run_id, run_events.WeightsInitialised)[0]
        assert [fact.parent for fact in committed] == [
            first.digest,
            *(fact.digest for fact in committed[:-1]),
        ]
        assert weights.file_digest(fleet.hub.weight_store.version_path(run.head)) == run.head
        assert first.digest == weights.digest(first_weights(5, seed=5))
        # One version is sent to an agent once, for training and evaluation alike.
        for agent in fleet.agents:
            assert [work for work in agent.trainer.worked if work[0] == "train"] == [
                ("train", number) for number in (1, 2, 3)
            ]
        assert list((fleet.home / "spool").iterdir()) == []


async def test_two_runs_one_after_the_other(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        first, second = (fleet.start(rounds=1, quorum=2, seed=seed) for seed in (1, 2))
        assert (await fleet.finished(first)).head != (await fleet.finished(second)).head


async def test_a_task_names_its_newest_run_but_not_to_delete_one(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        runs = fleet.hub.runs
        first = fleet.start(rounds=1, quorum=2, seed=1)
        await fleet.finished(first)
        task = runs.find(first).spec.task
        assert first.startswith(task)
        assert runs.find(task).id == runs.find(first[:-1]).id == first
        second = fleet.start(rounds=1, quorum=2, seed=2)
        await fleet.finished(second)
        await until(lambda: runs.current is None)
        assert runs.find(task).id == runs.find(second).id == second
        assert runs.find(first).id == first
        with pytest.raises(UnknownName, match=f"2 runs start with '{task[:2]}'.* {second}"):
            runs.find(task[:2])
        with pytest.raises(UnknownName, match="2 runs start with"):
            runs.deletion(task)
        with pytest.raises(UnknownName, match="no run 'nothing'"):
            runs.find("nothing")


async def test_the_same_seed_gives_the_same_digest(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        one = await fleet.finished(fleet.start(rounds=2, quorum=3, seed=9))
        # Whoever comes first: the updates are summed in name order.
        slow = Door(min(fleet.agents, key=lambda agent: agent.peer), 1)
        other_id = fleet.start(rounds=2, quorum=3, seed=9)
        await until(slow.reached.is_set)
        slow.open()
        assert (await fleet.finished(other_id)).head == one.head


async def test_a_run_goes_on_from_a_version(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        digest = fleet.hub.weight_store.save(first_weights(5, seed=1))
        run_id = fleet.hub.runs.start(RunSpec(task="softmax", rounds=1, quorum=2), digest)
        run = await fleet.finished(run_id)
        assert fleet.facts(run_id, run_events.VersionCommitted)[0].parent == digest
        assert run.state is RunState.FINISHED
        assert all(("init", 0) not in agent.trainer.worked for agent in fleet.agents)


async def test_a_run_that_only_evaluates_has_no_version_before_its_own(tmp_path: Path) -> None:
    """An upper fleet asks a fleet below for one."""
    async with fleet_of(tmp_path, some_data(30, 0)) as fleet:
        trained = await fleet.finished(fleet.start(rounds=1))
        spec = RunSpec(task="softmax", rounds=1, only="evaluate")
        run = await fleet.finished(fleet.hub.runs.start(spec, trained.head))
        assert run.state is RunState.FINISHED, run.ended_because
        assert run.history[-1].metrics["loss"]
        assert fleet.hub.weight_store.has(trained.head)


async def test_a_run_starts_from_a_bf16_file(tmp_path: Path) -> None:
    model = narrowed(first_weights(5, seed=1))
    file = tmp_path / "model.safetensors"
    weights.save(model, file)

    def step(base: Weights, data: Data) -> Weights:
        wide = Weights({name: bf16_to_float32(base[name]) for name in base})
        return narrowed(gradient_step(wide, data))

    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        for agent in fleet.agents:
            agent.trainer.first, agent.trainer.step = lambda seed: model, step
            agent.trainer.loss = lambda model, data: 1.0
        typed = {"task": "softmax", "rounds": 1, "quorum": 2, "from": file}
        order = run_options.build_order(typed)
        run = await fleet.finished(fleet.hub.runs.start(order.spec, order.from_digest))
        assert (run.state, run.first) == (RunState.FINISHED, weights.digest(model))
        assert run.head != run.first
        assert fleet.version(run.head).schema == model.schema


async def test_first_weights_of_a_run_that_is_refused_do_not_stay(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    weights.save(first_weights(5, seed=1), file)
    typed = {"task": "softmax", "rounds": 1, "quorum": 2, "from": file}
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        order = run_options.build_order(typed)
        assert fleet.hub.weight_store.has(order.from_digest)
        with pytest.raises(UnknownName, match="codec"):
            fleet.hub.runs.start(replace(order.spec, codec="another"), order.from_digest)
        assert not fleet.hub.weight_store.has(order.from_digest)
        # What a run keeps stays when another run that would start from it is refused.
        order = run_options.build_order(typed)
        run = await fleet.finished(fleet.hub.runs.start(order.spec, order.from_digest))
        with pytest.raises(UnknownName, match="codec"):
            fleet.hub.runs.start(replace(order.spec, codec="another"), run.head)
        assert fleet.hub.weight_store.has(run.head)
        # A run that starts from another form of the weights leaves only that form.
        weights.save(first_weights(5, seed=2), file)
        scaffold = run_options.build_order(typed | {"strategy": "scaffold"})
        fleet.hub.runs.stop(fleet.hub.runs.start(scaffold.spec, scaffold.from_digest))
        assert not fleet.hub.weight_store.has(scaffold.from_digest)


async def test_weights_are_not_imported_without_a_coordinator(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, home = tmp_path / "model.safetensors", tmp_path / "home"
    weights.save(first_weights(5, seed=1), file)
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(home))
    settings.init([])
    with pytest.raises(NotRunning):
        run_options.build_order({"task": "softmax", "from": file})
    assert not list(home.glob("versions/*.safetensors"))


def narrowed(model: Weights) -> Weights:
    """The same weights as bf16."""
    return Weights({name: float32_to_bf16(np.asarray(model[name])) for name in model}, model)


async def test_a_queued_run_keeps_its_first_weights_when_another_run_drops_that_version(
    tmp_path: Path,
) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        held = Door(fleet.agents[0], 1)
        running = fleet.start(rounds=5, quorum=2, keep_versions=1)
        await until(held.reached.is_set)
        first = fleet.hub.runs.find(running).first
        queued = fleet.hub.runs.start(RunSpec(task="softmax", rounds=1, quorum=2), first)
        held.open()
        run = await fleet.finished(running)
        assert first not in {closed.digest for closed in run.history}
        run = await fleet.finished(queued)
        assert (run.state, run.first) == (RunState.FINISHED, first)


async def test_a_run_keeps_the_versions_that_an_ended_run_keeps(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        ended = await fleet.finished(fleet.start(rounds=4, quorum=2, keep_versions=3))
        kept = [closed.digest for closed in ended.history[-3:]]
        spec = RunSpec(task="softmax", rounds=4, quorum=2, keep_versions=1)
        await fleet.finished(fleet.hub.runs.start(spec, kept[0]))
        assert all(map(fleet.hub.weight_store.has, kept))


# --- peers that dawdle, leave and fail -------------------------------------------------------


async def test_flowers_word_that_a_node_is_gone_is_believed_as_soon_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeat has run out, and our own look at all sessions is still to come."""
    monkeypatch.setattr("coordinator.daemon.peer_events.ONLINE_EVERY_S", 600.0)
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        gone = fleet.agents[1]
        door = Door(gone, 1)
        run_id = fleet.start(rounds=1, quorum=2)
        await until(door.reached.is_set)
        superlink, node = fleet.hub._superlink, fleet.hub._sessions.node_of(gone.peer)
        assert node is not None
        with superlink.lock:
            superlink.state.acknowledge_node_heartbeat(node, -1.0)
        fleet.hub.runs.wake()
        await until(lambda: fleet.facts(run_id, run_events.PeerLost))
        door.open()
        run = await fleet.finished(run_id)
        assert contributors(run) == [named(fleet.agents[:2])]
        assert fleet.refusals(run_id) == []
        assert gone.trainer.worked.count(("train", 1)) == 1


async def test_the_fleet_knows_whose_session_holds(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        gone, there = fleet.agents
        shown = fleet.hub.fleet.peers
        assert shown[gone.peer].flower, "told as it opens, not at the next look"
        assert shown[there.peer].flower
        gone.stop()
        await until(lambda: shown[gone.peer].flower is False)
        assert shown[there.peer].flower


async def test_a_straggler_is_left_behind_refused_as_late_and_asked_again(
    tmp_path: Path, clock: Clock
) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        straggler, *prompt = fleet.agents
        held = Door(straggler, 1)
        second_round = [Door(agent, 2) for agent in prompt]
        run_id = fleet.start(rounds=2, quorum=2)
        await until(lambda: accepted(fleet, run_id, 1, *prompt))
        clock.pass_deadline(fleet)
        await until(lambda: accepted(fleet, run_id, 1, *prompt, evaluations=True))
        clock.pass_deadline(fleet)
        for door in second_round:
            await until(door.reached.is_set)
        assert contributors(fleet.hub.runs.find(run_id)) == [named(prompt)]
        held.open()
        await until(lambda: accepted(fleet, run_id, 2, straggler))
        for door in second_round:
            door.open()
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        assert contributors(run)[1] == named(fleet.agents)
        refusals = fleet.refusals(run_id)
        assert (1, straggler.peer, "late") in refusals
        assert {(peer, word) for _, peer, word in refusals} == {(straggler.peer, "late")}


async def test_a_late_update_is_folded_into_the_next_round_with_less_weight(
    tmp_path: Path, clock: Clock
) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        straggler, other = fleet.agents
        held, next_round = Door(straggler, 1), Door(other, 2)
        run_id = fleet.start(rounds=3, quorum=1, late="fold", keep_versions=3)
        await until(lambda: held.reached.is_set() and accepted(fleet, run_id, 1, other))
        clock.pass_deadline(fleet)
        await until(next_round.reached.is_set)
        held.open()
        await until(lambda: fleet.hub.runs.find(run_id).buffer)
        first = fleet.facts(run_id, run_events.WeightsInitialised)[0].digest
        v0 = np.array(fleet.version(first)["w"])
        next_round.open()
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        assert fleet.refusals(run_id) == []
        (late,) = [f for f in fleet.facts(run_id, run_events.UpdateAccepted) if f.update.staleness]
        assert (late.round, late.peer, late.update.base) == (1, straggler.peer, first)
        # Nothing else was asked of it before it had answered.
        asked = [fact.asked for fact in fleet.facts(run_id, run_events.RoundOpened)]
        assert asked[1] == (other.peer,)
        closed = fleet.facts(run_id, run_events.TrainingClosed)
        assert closed[0].contributors == (other.peer,)
        assert set(closed[1].contributors) == {straggler.peer, other.peer}
        # Version 2 is version 1 and both changes, that of round 1 divided by the root of 2.
        counts = [len(part.y) for part in THREE[:2]]
        v1, v2 = (np.asarray(fleet.version(closed.digest)["w"]) for closed in run.history[:2])
        late_change = np.asarray(straggler.trainer.made[1]["w"]) - v0
        change = np.asarray(other.trainer.made[2]["w"]) - v1
        mean = (counts[0] * late_change / math.sqrt(2) + counts[1] * change) / sum(counts)
        np.testing.assert_allclose(v2, v1 + mean, atol=1e-6)


async def test_a_late_update_that_was_cut_off_is_asked_for_again(
    tmp_path: Path, clock: Clock
) -> None:
    """Its peer opens another session, such as after a restart in the middle of the upload."""
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        straggler, other = fleet.agents
        held, next_round = Door(straggler, 1), Door(other, 2)
        send, cut = straggler.send, threading.Event()

        def cut_once(digest: str, path: Path) -> None:
            if held.reached.is_set() and not cut.is_set():
                cut.set()
                raise Unreachable("the line was cut")
            send(digest, path)

        straggler.send = cut_once  # type: ignore[method-assign]
        run_id = fleet.start(rounds=3, quorum=1, late="fold")
        await until(lambda: held.reached.is_set() and accepted(fleet, run_id, 1, other))
        clock.pass_deadline(fleet)
        await until(next_round.reached.is_set)
        held.open()
        await until(lambda: fleet.hub.runs.find(run_id).buffer)
        next_round.open()
        run = await fleet.finished(run_id)
        assert (run.state, fleet.refusals(run_id)) == (RunState.FINISHED, [])
        assert cut.is_set()
        late = [f for f in fleet.facts(run_id, run_events.UpdateAccepted) if f.update.staleness]
        assert [(one.round, one.peer) for one in late] == [(1, straggler.peer)]
        assert straggler.trainer.worked.count(("train", 1)) == 1


async def test_below_the_quorum_it_waits_and_says_for_whom(tmp_path: Path, clock: Clock) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        held = Door(fleet.agents[0], 1)
        run_id = fleet.start(rounds=1, quorum=2)
        await until(lambda: held.reached.is_set() and accepted(fleet, run_id, 1, fleet.agents[1]))
        num_asked = len(fleet.facts(run_id, run_events.PeersAsked))
        clock.pass_deadline(fleet)
        await until(lambda: fleet.facts(run_id, run_events.PeersAsked)[num_asked:])
        assert fleet.facts(run_id, run_events.PeersAsked)[-1].peers == (fleet.agents[0].peer,)
        await until(lambda: fleet.waits_for(run_id) == "updates of 1 peer (agent0)")
        assert not fleet.hub.runs.find(run_id).ended
        held.open()
        assert (await fleet.finished(run_id)).state is RunState.FINISHED


async def test_a_newcomer_fills_the_quorum_when_the_deadline_has_passed(
    tmp_path: Path, clock: Clock
) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        absent, present = fleet.agents
        held = Door(absent, 1)
        run_id = fleet.start(rounds=1, quorum=2)
        await until(lambda: held.reached.is_set() and accepted(fleet, run_id, 1, present))
        newcomer = fleet.join("newcomer", THREE[2])
        await fleet.online(3)
        clock.pass_deadline(fleet)
        await until(lambda: accepted(fleet, run_id, 1, present, newcomer))
        clock.pass_deadline(fleet)
        await until(lambda: accepted(fleet, run_id, 1, present, newcomer, evaluations=True))
        clock.pass_deadline(fleet)
        run = await fleet.finished(run_id)
        assert contributors(run) == [named([present, newcomer])]


async def test_a_lost_answer_is_asked_for_again_and_costs_no_second_training(
    tmp_path: Path,
) -> None:
    """The link breaks before the reply: the new session gets the question, the outbox answers."""
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        leaver = fleet.agents[0]
        answer, broken = leaver.answer, threading.Event()

        def break_off(message: Message) -> Message:
            reply = answer(message)
            if ("train", 1) in leaver.trainer.worked and not broken.is_set():
                broken.set()
                raise Unreachable("the link broke")
            return reply

        leaver.answer = break_off  # type: ignore[method-assign]
        run_id = fleet.start(rounds=1, quorum=2)
        run = await fleet.finished(run_id)
        assert contributors(run) == [named(fleet.agents)]
        assert leaver.trainer.worked.count(("train", 1)) == 1


async def test_an_answer_is_settled_once_it_is_in_the_ledger(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, THREE[0]) as fleet:
        (agent,) = fleet.agents
        told: list[tuple[bool, int]] = []
        assert agent.link is not None
        exchange = agent.link.exchange

        def watched(reply: Message) -> Message | None:
            following = exchange(reply)
            assert agent.link is not None
            accepted = fleet.facts(run_id, run_events.UpdateAccepted)
            told.append((agent.link.acknowledged, len(accepted)))
            return following

        agent.link.exchange = watched  # type: ignore[method-assign]
        run_id = fleet.start(rounds=1, quorum=1)
        await fleet.finished(run_id)
        await until(lambda: len(told) == 3)
        assert told == [(True, 0), (True, 1), (True, 2)]  # first weights, update, evaluation


async def test_work_that_fails_is_refused_and_the_others_go_on(tmp_path: Path) -> None:
    def fail(kind: str, number: int) -> None:
        if (kind, number) == ("train", 1):
            raise CommonweightError("no \x1b[31mdata")

    async with fleet_of(tmp_path, *THREE) as fleet:
        fleet.agents[0].trainer.before = fail
        run_id = fleet.start(rounds=2, quorum=2)
        run = await fleet.finished(run_id)
        assert contributors(run) == [named(fleet.agents[1:]), named(fleet.agents)]
        (refused,) = fleet.facts(run_id, run_events.UpdateRefused)
        assert (refused.peer, refused.reason) == (fleet.agents[0].peer, "failed")
        assert "\x1b" not in refused.detail


def limit(ledger: SqliteLedger, more_pages: int) -> None:
    """Let the ledger grow by `more_pages` pages at most, as on a full disk."""
    with ledger._lock:
        (pages,) = ledger._db.execute("PRAGMA page_count").fetchone()
        ledger._db.execute(f"PRAGMA max_page_count = {pages + more_pages}")


def fill(ledger: SqliteLedger) -> None:
    """Leave no room for another entry of a run."""
    limit(ledger, 0)
    with contextlib.suppress(DiskFull):
        while True:
            ledger.append("filler", [b"{}"])


def waits_for_space(fleet: Fleet, run_id: str) -> bool:
    return "space on the coordinator's disk" in fleet.waits_for(run_id)


async def test_a_full_disk_under_the_ledger_holds_up_the_run_and_loses_nothing(
    tmp_path: Path,
) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        ledger = fleet.hub._ledger

        def fill_up(kind: str, number: int) -> None:
            if (kind, number) == ("train", 2):
                limit(ledger, 0)

        fleet.agents[0].trainer.before = fill_up
        run_id = fleet.start(rounds=40, quorum=2)
        await until(lambda: waits_for_space(fleet, run_id))
        said = [event.text for event in fleet.hub.fleet.events]
        assert any(text.startswith(f"run {run_id} is interrupted") for text in said)
        limit(ledger, 10_000)
        run = await fleet.finished(run_id)
        assert contributors(run) == [named(fleet.agents)] * 40
        assert len(fleet.facts(run_id, run_events.UpdateAccepted)) == 40 * 2 * 2
        said = [event.text for event in fleet.hub.fleet.events]
        assert f"the disk has space again: run {run_id} continues" in said
        assert ledger.verify() is None


async def test_a_deadline_does_not_pass_while_the_disk_is_full(
    tmp_path: Path, clock: Clock
) -> None:
    """It is full for an hour while the first evaluation is recorded: the second one counts too."""
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        held = Door(fleet.agents[1], 1, "evaluate")

        def fill_up(kind: str, number: int) -> None:
            if kind == "evaluate":
                held.reached.wait()
                fill(fleet.hub._ledger)

        fleet.agents[0].trainer.before = fill_up
        run_id = fleet.start(rounds=1, quorum=2)
        await until(lambda: waits_for_space(fleet, run_id))
        clock.pass_deadline(fleet)
        held.open()
        limit(fleet.hub._ledger, 10_000)
        await fleet.finished(run_id)
        assert len(fleet.facts(run_id, run_events.UpdateAccepted)) == 2 * 2
        assert fleet.refusals(run_id) == []


async def test_a_full_disk_on_an_agent_is_a_failure_and_not_its_end(tmp_path: Path) -> None:
    def fail(kind: str, number: int) -> None:
        if (kind, number) == ("train", 1):
            raise OSError(28, "No space left on device")

    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        fleet.agents[0].trainer.before = fail
        run_id = fleet.start(rounds=2, quorum=1)
        run = await fleet.finished(run_id)
        assert len(contributors(run)[1]) == 2
        refused = fleet.facts(run_id, run_events.UpdateRefused)[0]
        assert (refused.reason, refused.detail) == ("disk_full", "the disk is full")


async def test_who_failed_gets_another_chance_after_the_deadline(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        failed = threading.Event()

        def fail_once(kind: str, number: int) -> None:
            if kind == "train" and not failed.is_set():
                failed.set()
                raise CommonweightError("out of memory")

        fleet.agents[0].trainer.before = fail_once
        run = await fleet.finished(fleet.start(rounds=1, quorum=2, deadline_s=0.5))
        assert contributors(run) == [named(fleet.agents)]


async def test_another_peer_makes_the_first_weights(tmp_path: Path) -> None:
    def fail(kind: str, number: int) -> None:
        if kind == "init":
            raise CommonweightError("no torch here")

    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        first, second = sorted(fleet.agents, key=lambda agent: agent.peer)
        first.trainer.before = fail
        run_id = fleet.start(rounds=1, quorum=2)
        await fleet.finished(run_id)
        assert fleet.facts(run_id, run_events.WeightsInitialised)[0].by == second.peer


async def test_a_peer_that_hangs_over_the_first_weights_is_not_waited_for(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        first, second = sorted(fleet.agents, key=lambda agent: agent.peer)
        held = Door(first, 0, "init")
        run_id = fleet.start(rounds=1, quorum=2, deadline_s=0.5)
        await until(lambda: fleet.facts(run_id, run_events.WeightsInitialised))
        assert fleet.facts(run_id, run_events.WeightsInitialised)[0].by == second.peer
        held.open()
        assert (await fleet.finished(run_id)).state is RunState.FINISHED


async def test_a_removed_peer_is_not_waited_for(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        held = Door(fleet.agents[0], 1)
        run_id = fleet.start(rounds=2, quorum=1)
        await until(held.reached.is_set)
        fleet.hub.registry.remove(fleet.agents[0].peer, "test")
        run = await fleet.finished(run_id)
        assert contributors(run) == [named(fleet.agents[1:])] * 2


async def test_a_run_is_stopped_in_the_middle(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        held = Door(fleet.agents[0], 2)
        run_id = fleet.start(rounds=3, quorum=2)
        await until(held.reached.is_set)
        head = fleet.hub.runs.find(run_id).head
        fleet.hub.runs.stop(run_id)
        run = await fleet.finished(run_id)
        assert (run.state, run.head) == (RunState.STOPPED, head)
        held.open()
        assert (await fleet.finished(fleet.start(rounds=1, quorum=2))).round == 1


# --- a coordinator that is started again -----------------------------------------------------


@pytest.mark.parametrize("kind", ["train", "evaluate"])
async def test_a_restart_in_the_middle_changes_nothing(tmp_path: Path, kind: str) -> None:
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            for number, part in enumerate(THREE):
                fleet.join(f"agent{number}", part)
            await fleet.online(3)
            undisturbed = await fleet.finished(fleet.start(rounds=4, quorum=3, seed=21))
            held = Door(fleet.agents[1], 3, kind)
            run_id = fleet.start(rounds=4, quorum=3, seed=21)
            await until(held.reached.is_set)
            before = fleet.hub.runs.find(run_id)
        async with fleet.up():
            again = fleet.hub.runs.find(run_id)
            assert (again.round, again.head) == (before.round, before.head)
            held.open()
            run = await fleet.finished(run_id)
            assert run.state is RunState.FINISHED
            assert run.head == undisturbed.head
            assert [closed.digest for closed in run.history] == [
                closed.digest for closed in undisturbed.history
            ]
            await fleet.close()
    finally:
        await fleet.close()


async def test_updates_that_came_during_an_evaluation_and_are_lost_are_repeated(
    tmp_path: Path,
) -> None:
    """As after a restore of a buffered run: the ledger has the next update, the spool has not."""
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            fleet.join("agent0", THREE[0])
            await fleet.online(1)
            run_id = fleet.start(rounds=30, quorum=1, mode="buffered", buffer=1)
            await until(lambda: fleet.facts(run_id, run_events.VersionCommitted))
        with contextlib.closing(SqliteLedger(fleet.home / "ledger.db")) as ledger:
            past = [run_events.decode(entry.body) for entry in ledger.entries(run_id)]
            last = max(n for n, e in enumerate(past) if isinstance(e, run_events.VersionCommitted))
            run = transitions.replay(run_id, past)
            lost = run_events.Update(digest="e" * 64, num_examples=1, base=run.head)
            peer = run.history[-1].contributors[0] if run.history else past[last].contributors[0]
            more = [
                run_events.TrainingClosed(run.round, (peer,)),
                run_events.VersionCommitted(run.round, run.head, run.head, (peer,), {}, {}),
                run_events.EvaluationOpened(run.round, (peer,)),
                run_events.WorkGiven(peer, run.round + 1, run.head, 0),
                run_events.UpdateAccepted(run.round + 1, peer, lost),
            ]
            ledger.append(run_id, [run_events.encode(event) for event in more])
            run = transitions.replay(run_id, [*past, *more])
            assert run.state is RunState.EVALUATING
            assert "e" * 64 in {one.update.digest for one in run.buffer}
        shutil.rmtree(fleet.home / "spool")
        async with fleet.up():
            assert (await fleet.finished(run_id)).state is RunState.FINISHED
            await fleet.close()
    finally:
        await fleet.close()


async def test_a_round_whose_updates_are_lost_is_repeated(tmp_path: Path) -> None:
    """As after a restore: a backup holds what was accepted, but not the uploads."""
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            for number, part in enumerate(THREE[:2]):
                fleet.join(f"agent{number}", part)
            await fleet.online(2)
            held = Door(fleet.agents[1], 2)
            run_id = fleet.start(rounds=3, quorum=2)
            await until(held.reached.is_set)
            await until(lambda: len(fleet.facts(run_id, run_events.UpdateAccepted)) >= 3)
        shutil.rmtree(fleet.home / "spool")
        async with fleet.up():
            held.open()
            run = await fleet.finished(run_id)
            assert (run.state, run.round) == (RunState.FINISHED, 3)
            await fleet.close()
    finally:
        await fleet.close()


async def test_a_restart_in_round_2_does_not_keep_the_first_version_for_ever(
    tmp_path: Path,
) -> None:
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            fleet.join("agent", THREE[0])
            await fleet.online(1)
            held = Door(fleet.agents[0], 2)
            run_id = fleet.start(rounds=4, quorum=1, keep_versions=1)
            await until(held.reached.is_set)
        async with fleet.up():
            held.open()
            run = await fleet.finished(run_id)
            store = fleet.hub.weight_store
            await until(lambda: not store.has(run.first))
            await fleet.close()
    finally:
        await fleet.close()


async def test_a_late_update_counts_also_after_a_restart(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            for number, part in enumerate(THREE[:2]):
                fleet.join(f"agent{number}", part)
            await fleet.online(2)
            straggler, other = fleet.agents
            held, next_round = Door(straggler, 1), Door(other, 2)
            run_id = fleet.start(rounds=3, quorum=1, deadline_s=0.5, late="fold")
            await until(next_round.reached.is_set)
        async with fleet.up():
            held.open()
            await until(lambda: fleet.hub.runs.find(run_id).buffer)
            next_round.open()
            run = await fleet.finished(run_id)
            assert (run.state, fleet.refusals(run_id)) == (RunState.FINISHED, [])
            late = [f for f in fleet.facts(run_id, run_events.UpdateAccepted) if f.update.staleness]
            assert [(one.round, one.peer) for one in late] == [(1, straggler.peer)]
            assert straggler.trainer.worked.count(("train", 1)) == 1
            await fleet.close()
    finally:
        await fleet.close()


@pytest.mark.parametrize(("lost", "number"), [(1, 1), (1, 2), (2, 2), (1, 3), (2, 3), (3, 3)])
async def test_a_damaged_version_is_put_aside_and_made_again(
    tmp_path: Path, lost: int, number: int
) -> None:
    """The newest `lost` versions are damaged when the coordinator starts again in this round."""
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            for number, part in enumerate(THREE[:2]):
                fleet.join(f"agent{number}", part)
            await fleet.online(2)
            undisturbed = await fleet.finished(fleet.start(rounds=4, quorum=2, seed=21))
            held = Door(fleet.agents[1], number)
            run_id = fleet.start(rounds=4, quorum=2, seed=21)
            await until(held.reached.is_set)
            # First weights, and versions 1 and 2: older ones than the last two are pruned.
            made = [fact.digest for fact in fleet.facts(run_id, run_events.WeightsInitialised)]
            made += [fact.digest for fact in fleet.facts(run_id, run_events.VersionCommitted)]
        kept = [digest for digest in made if fleet.hub.weight_store.has(digest)]
        for digest in kept[-lost:]:
            path = fleet.hub.weight_store.version_path(digest)
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        async with fleet.up():
            held.open()
            run = await fleet.finished(run_id)
            if lost >= len(kept):
                assert run.state is RunState.FAILED
                assert "so are all earlier ones" in run.ended_because
            else:
                assert run.head == undisturbed.head
                (lost_version,) = fleet.facts(run_id, run_events.VersionLost)
                assert (lost_version.digest, lost_version.to) == (made[-1], kept[-1 - lost])
                assert (
                    fleet.hub.weight_store.version_path(made[-1]).with_suffix(".damaged").exists()
                )
            await fleet.close()
    finally:
        await fleet.close()


async def test_a_stopped_run_is_resumed_to_the_same_weights(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        undisturbed = await fleet.finished(fleet.start(rounds=4, quorum=2, seed=21))
        held = Door(fleet.agents[1], 3)
        run_id = fleet.start(rounds=4, quorum=2, seed=21)
        await until(held.reached.is_set)
        with pytest.raises(CannotBeMet, match="has not ended"):
            fleet.hub.runs.resume(run_id)
        fleet.hub.runs.stop(run_id)
        stopped = await fleet.finished(run_id)
        assert (stopped.state, len(stopped.history)) == (RunState.STOPPED, 2)
        held.open()
        fleet.hub.runs.resume(run_id)
        run = await fleet.finished(run_id)
        assert [closed.round for closed in run.history] == [1, 2, 3, 4]
        assert run.head == undisturbed.head
        with pytest.raises(CannotBeMet, match="has finished"):
            fleet.hub.runs.resume(run_id)


async def test_whoever_selects_leaves_a_peer_out_and_keeps_the_versions_it_wants(
    tmp_path: Path,
) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        spec = {"quorum": 1, "select": 2.0, "keep_versions": 3, "deadline": "auto"}
        run = await fleet.finished(fleet.start(rounds=6, **spec))
        assert run.state is RunState.FINISHED
        opened = fleet.facts(run.id, run_events.RoundOpened)
        assert {len(fact.asked) for fact in opened} == {2}
        assert len({fact.asked for fact in opened}) > 1
        on_disk = [c.round for c in run.history if fleet.hub.weight_store.has(c.digest)]
        assert set(on_disk) == {4, 5, 6, run.best.round if run.best else 0}


async def test_a_run_that_is_not_resumed_is_stopped(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    try:
        async with fleet.up():
            agent = fleet.join("agent", THREE[0])
            await fleet.online(1)
            held = Door(agent, 1)
            run_id = fleet.start(rounds=2, quorum=1)
            await until(held.reached.is_set)
        async with fleet.up(resume=False):
            run = await fleet.finished(run_id)
            assert (run.state, run.ended_because) == (RunState.STOPPED, "not resumed")
            await fleet.close()
    finally:
        await fleet.close()


# --- peers that cheat ------------------------------------------------------------------------


class Cheat:
    """Changes what an agent answers: one trick a round."""

    def __init__(self, agent: Agent, *tricks: Callable[[Cheat, UpdateClaim], None]) -> None:
        self.agent, self.tricks = agent, tricks
        self._honest = agent.answer
        agent.answer = self.answer  # type: ignore[method-assign]
        self.changed: dict[str, Any] = {}
        self.signer = agent.machine.sign_key
        self.content: RecordDict | None = None

    def answer(self, message: Message) -> Message:
        reply = self._honest(message)
        claim = SIGNED_CLAIM.decode(reply.content.config_records[CLAIM]["claim"])  # type: ignore[arg-type]
        if claim.kind != "train":
            return reply
        self.changed, self.signer, self.content = {}, self.agent.machine.sign_key, None
        self.tricks[claim.round - 1](self, claim)
        changed = msgspec.structs.replace(claim, **self.changed)
        payload, signature = SIGNED_CLAIM.seal(changed, self.signer.sign)
        record = ConfigRecord({"claim": payload, "signature": signature})
        content = RecordDict({CLAIM: record}) if self.content is None else self.content
        return Message(content, reply_to=message)

    def send(self, model: Weights) -> None:
        path = self.agent._folder / "forged.safetensors"
        digest = weights.save(model, path)
        self.agent._open_link().upload(digest, path)
        self.changed = {"digest": digest}


def claims(**changed: Any) -> Callable[[Cheat, UpdateClaim], None]:
    return lambda cheat, claim: cheat.changed.update(changed)


def sends(**tensors: Any) -> Callable[[Cheat, UpdateClaim], None]:
    def trick(cheat: Cheat, claim: UpdateClaim) -> None:
        model = cheat.agent.trainer.made[claim.round]
        changed = {name: np.array(model[name]) for name in model} | tensors
        cheat.send(Weights({n: array for n, array in changed.items() if array is not None}))

    return trick


def answers(content: RecordDict) -> Callable[[Cheat, UpdateClaim], None]:
    def trick(cheat: Cheat, claim: UpdateClaim) -> None:
        cheat.content = content

    return trick


def signs_with_another_key(cheat: Cheat, claim: UpdateClaim) -> None:
    cheat.signer = identity.new_signing_key()


def sends_junk(cheat: Cheat, claim: UpdateClaim) -> None:
    path = cheat.agent._folder / "junk"
    path.write_bytes(b"\x10\0\0\0\0\0\0\0no header at all")
    digest = weights.file_digest(path)
    cheat.agent._open_link().upload(digest, path)
    cheat.changed = {"digest": digest}


TRICKS: list[tuple[str, Callable[[Cheat, UpdateClaim], None]]] = [
    ("wrong base", claims(base="0" * 64)),
    ("late", claims(round=99)),
    ("late", claims(kind="evaluate")),
    ("another run", claims(run="other")),
    ("bad signature", claims(peer="AAAA-AAAA-AAAA-AAAA")),
    ("bad signature", signs_with_another_key),
    ("bad example count", claims(num_examples=-80)),
    ("bad example count", claims(num_examples=10**12)),
    ("bad weights", claims(digest="0" * 64)),
    ("bad claim", claims(digest="../../versions/x")),
    ("bad weights", claims(digest="")),
    ("bad weights", sends_junk),
    ("bad weights", sends(w=np.zeros((1, 3), np.float32))),
    ("bad weights", sends(w=None)),
    ("bad weights", sends(extra=np.zeros(1, np.float32))),
    ("not finite", sends(b=np.array([0, np.nan, 0], np.float32))),
    ("not finite", sends(b=np.array([0, np.inf, 0], np.float32))),
    ("bad claim", answers(RecordDict())),
    ("bad claim", answers(RecordDict({CLAIM: MetricRecord({"claim": 1.0})}))),
    ("bad claim", answers(RecordDict({CLAIM: ConfigRecord({"claim": b"{}", "signature": b""})}))),
]


async def test_every_trick_is_refused_by_its_word_and_the_round_goes_on(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE) as fleet:
        honest = fleet.agents[1:]
        cheat = Cheat(fleet.agents[0], *(trick for _, trick in TRICKS))
        run_id = fleet.start(rounds=len(TRICKS), quorum=2)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        assert contributors(run) == [named(honest)] * len(TRICKS)
        assert fleet.refusals(run_id) == [
            (number, cheat.agent.peer, word) for number, (word, _) in enumerate(TRICKS, 1)
        ]
        assert [closed.refused for closed in run.history] == [1] * len(TRICKS)


async def test_evaluations_that_do_not_agree_on_their_metrics_do_no_harm(tmp_path: Path) -> None:
    """Flower's own strategies end the run there."""
    odd: list[envelope.Metrics] = [
        {"loss": math.nan, "accuracy": 0.25},
        {"loss": 1.0, "num-examples": -5.0, "": 1e308, "own idea": math.inf},
        {"loss": 2.0, "accuracy": 0.5},
    ]
    async with fleet_of(tmp_path, *THREE) as fleet:
        for agent, metrics in zip(fleet.agents, odd, strict=True):
            counted = Done(num_examples=len(agent.trainer.data.y), metrics=metrics)
            agent.trainer.evaluate = lambda *_, counted=counted: counted  # type: ignore[method-assign]
        run = await fleet.finished(fleet.start(rounds=1, quorum=3))
        assert run.state is RunState.FINISHED
        found = run.history[0].metrics
        sizes = [len(part.y) for part in THREE]
        assert found["loss"] == pytest.approx((sizes[1] + 2 * sizes[2]) / sum(sizes[1:]))
        assert found["accuracy"] == pytest.approx(
            (0.25 * sizes[0] + 0.5 * sizes[2]) / (sizes[0] + sizes[2])
        )


async def test_all_diverged_is_shown_and_the_run_goes_on(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        for agent in fleet.agents:
            agent.trainer.loss = lambda model, data: math.nan
        run_id = fleet.start(rounds=2, quorum=2)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        assert [closed.metrics.get("loss") for closed in run.history] == [None, None]


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({"other": ConfigRecord()}),
        RecordDict({CLAIM: ConfigRecord()}),
        RecordDict({CLAIM: ConfigRecord({"claim": "text", "signature": b"x"})}),
        RecordDict({CLAIM: ConfigRecord({"claim": [1, 2], "signature": b"x"})}),
        RecordDict({CLAIM: MetricRecord({"claim": 1, "signature": 2})}),
        RecordDict({CLAIM: ArrayRecord([np.zeros(2)])}),
    ],
)
async def test_what_is_no_claim_is_one_of_four_errors(tmp_path: Path, content: RecordDict) -> None:
    """Those that the run loop turns into a refusal."""
    Superlink()  # a message belongs to a Flower run
    message = Message(content, 1, "train")
    with pytest.raises((BadMessage, KeyError, TypeError, ValueError)):
        read_claim(message)


# --- what is asked for -----------------------------------------------------------------------


async def test_what_cannot_be_met_is_said_before_the_start(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *THREE[:2]) as fleet:
        for spec, fault in (
            ({"rounds": 0}, UsageError),
            ({"quorum": 0}, UsageError),
            ({"quorum": 3}, CannotBeMet),
            ({"deadline_s": 0.0}, UsageError),
            ({"deadline_s": -1.0}, UsageError),
            ({"select": 0.5}, UsageError),
            ({"select": math.nan}, UsageError),
            ({"keep_versions": 0}, UsageError),
            ({"late": "fold", "strategy": "fedmedian"}, UsageError),
            ({"max_weight_share": 0.0}, UsageError),
            ({"max_weight_share": 1.5}, UsageError),
            ({"strategy": "magic"}, UnknownName),
            ({"strategy_args": {"x": 1}}, UsageError),
        ):
            with pytest.raises(fault):
                fleet.start(**({"rounds": 1} | spec))
        with pytest.raises(UnknownName, match="no version"):
            fleet.hub.runs.start(RunSpec(task="softmax", rounds=1), "0" * 64)
        assert fleet.hub.runs.all() == []
