"""Runs that train while they exchange updates: a round late, and with the same weights whatever
happens meanwhile."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Message
from msgspec.structs import replace

from agent.clientapp.training import Training
from agent.data.settings import DataSettings
from agent.tasks import registry
from agent.tasks.work import Done, Trainer, Work
from agent.trainer.in_process import InProcessTrainer
from coordinator.runs import spec_rules
from coordinator.storage.run_events import RunSpec
from protocols.codecs import registry as codecs
from protocols.errors import UnknownName, UsageError
from protocols.messages.states import RunState
from protocols.messages.work import SIGNED_WORK
from protocols.model import weights
from protocols.model.weights import Weights
from tests.coordinator.runs.test_loop import Door
from tests.support.in_process_fleet import (
    Agent,
    Data,
    Fleet,
    first_weights,
    fleet_of,
    gradient_step,
    some_data,
)
from tests.support.softmax_task import NAME
from tests.support.waiting import until

DATA = [some_data(30, 1), some_data(70, 2)]
ROUNDS = 5


def by_the_rule(parts: list[Data], rounds: int, seed: int, *turns: str) -> Weights:
    """Each peer trains from its own weights, and merges the version that came meanwhile.

    `turns`: the tensors that are exchanged in turn; without any, all are exchanged in each round.
    """
    share = np.array([len(part.y) for part in parts]) / sum(len(part.y) for part in parts)
    version = first_weights(parts[0].x.shape[1], seed)
    own = [version for _ in parts]
    for number in range(rounds):
        sent = {turns[number % len(turns)]} if turns else {*version}
        came = {turns[(number - 1) % len(turns)]} if turns else {*version}
        trained = [gradient_step(start, part) for start, part in zip(own, parts, strict=True)]
        own = [
            Weights(
                {
                    n: new[n] + (version[n] - old[n]) / 2 if number and n in came else new[n]
                    for n in version
                }
            )
            for new, old in zip(trained, own, strict=True)
        ]
        means = {
            n: sum(s * np.asarray(w[n], np.float64) for s, w in zip(share, own, strict=True))
            for n in sent
        }
        new = {n: np.asarray(mean, np.float32) for n, mean in means.items()}
        version = Weights({**version, **new})
    return version


def in_background(agent: Agent, trainer: Trainer | None = None) -> None:
    """From now on the agent trains ahead in a thread, as outside of tests."""
    client, trainer = agent.client, trainer or agent.trainer
    assert client is not None
    trainer.trains_ahead = True
    client.training = Training(trainer, client._outbox)


async def test_versions_follow_the_rule(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *DATA) as fleet:
        in_background(fleet.agents[0])
        spec: dict[str, Any] = {"rounds": ROUNDS, "quorum": 2, "seed": 4}
        run = await fleet.finished(fleet.start(**spec, overlap=1))
        assert run.state is RunState.FINISHED
        assert fleet.refusals(run.id) == []
        expected = by_the_rule(DATA, ROUNDS, 4)
        for name in expected:
            np.testing.assert_allclose(fleet.version(run.head)[name], expected[name], atol=1e-5)
        plain = await fleet.finished(fleet.start(**spec))
        assert plain.head != run.head
        for agent in fleet.agents:
            trained = [number for kind, number in agent.trainer.worked if kind == "train"]
            assert trained == [*range(1, ROUNDS + 1)] * 2, "no training is lost, none is extra"


async def test_fragments_take_turns(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *DATA) as fleet:
        in_background(fleet.agents[0])
        spec: dict[str, Any] = {"rounds": ROUNDS, "quorum": 2, "overlap": 1, "fragments": 2}
        run = await fleet.finished(fleet.start(**spec, seed=4))
        assert run.state is RunState.FINISHED
        assert fleet.refusals(run.id) == []
        expected = by_the_rule(DATA, ROUNDS, 4, "w", "b")
        for name in expected:
            np.testing.assert_allclose(fleet.version(run.head)[name], expected[name], atol=1e-5)
        diloco = spec | {"strategy": "diloco", "strategy_args": {"keep_optimiser": False}}
        for codec in ("int8", "topk:0.2"):
            coded = await fleet.finished(fleet.start(**diloco, codec=codec))
            assert coded.state is RunState.FINISHED
            assert fleet.refusals(coded.id) == []
            assert set(coded.strategy_state) == {"momentum 0", "momentum 1"}
            assert coded.history[0].strategy_state.keys() == {"momentum 0"}
        more = await fleet.finished(fleet.start(**(spec | {"fragments": 3})))
        assert more.state is RunState.FAILED
        assert "has 2 layers" in more.ended_because


async def test_what_a_peer_keeps_for_itself_goes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry.BUILT_IN, "softmax", NAME)
    async with fleet_of(tmp_path, *DATA) as fleet:
        spec: dict[str, Any] = {
            "rounds": 4,
            "quorum": 2,
            "overlap": 1,
            "strategy": "fedbn",
            "settings": {"norm": True, "steps": 2},
        }
        kept = []
        for is_ahead in (False, True):
            for index, agent in enumerate(fleet.agents):
                trainer = InProcessTrainer(DataSettings(index=index))
                if is_ahead:
                    in_background(agent, Locked(trainer))
                else:
                    agent.client.training.trainer = trainer  # type: ignore[union-attr]
            run = await fleet.finished(fleet.start(**spec))
            assert run.state is RunState.FINISHED, run.ended_because
            assert fleet.refusals(run.id) == []
            files = [max((a._folder / "personal").iterdir(), key=_age) for a in fleet.agents]
            kept.append((run.head, *(weights.load(file)["norm.scale"].tobytes() for file in files)))
        assert kept[0] == kept[1]
        assert len({*kept[0]}) == 3, "each has its own"


def _age(path: Path) -> float:
    return path.stat().st_mtime


class Locked:
    """A trainer that does one work at a time, as a process does."""

    trains_ahead = True

    def __init__(self, trainer: InProcessTrainer) -> None:
        self._trainer, self._lock = trainer, threading.Lock()
        self.cancel_training = trainer.cancel_training

    def run(self, work: Work) -> Done:
        with self._lock:
            return self._trainer.run(work)


async def test_an_agent_that_knows_no_fragments_refuses_before_it_trains(tmp_path: Path) -> None:
    """It reads the codec as agents did before there were fragments. The run leaves it out."""
    async with fleet_of(tmp_path, *DATA, some_data(20, 3)) as fleet:
        older = fleet.agents[2]

        def parse(message: Message) -> None:
            work = SIGNED_WORK.decode(bytes(message.content.config_records["config"]["work"]))  # type: ignore[arg-type]
            codecs.parse(work.codec)

        older.before_answer = parse
        for codec in ("int8", "ternary:0.125"):
            run_id = fleet.start(rounds=2, quorum=2, overlap=1, fragments=2, codec=codec)
            run = await fleet.finished(run_id)
            assert run.state is RunState.FINISHED
            refused = {(peer, reason) for _, peer, reason in fleet.refusals(run_id)}
            assert refused == {(older.peer, UnknownName.code)}
        assert "train" not in dict(older.trainer.worked)


async def test_an_update_with_another_fragment_is_refused(tmp_path: Path) -> None:
    """A peer sends all of the model."""
    async with fleet_of(tmp_path, *DATA, some_data(20, 3)) as fleet:
        honest = fleet.agents[2].answer

        def answer(message: Message) -> Message:
            work = SIGNED_WORK.decode(bytes(message.content.config_records["config"]["work"]))  # type: ignore[arg-type]
            older = replace(work, fragments=0)
            payload, signature = SIGNED_WORK.seal(older, fleet.keys.sign_key.sign)
            message.content.config_records["config"]["work"] = payload
            message.content.config_records["config"]["signature"] = signature
            return honest(message)

        fleet.agents[2].answer = answer  # type: ignore[method-assign]
        run_id = fleet.start(rounds=2, quorum=2, overlap=1, fragments=2)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        refused = {(peer, reason) for _, peer, reason in fleet.refusals(run_id)}
        assert refused == {(fleet.agents[2].peer, "bad weights")}


async def test_restarts_in_the_middle_change_nothing(tmp_path: Path) -> None:
    fleet = Fleet(tmp_path)
    spec = {"rounds": 4, "quorum": 2, "seed": 21, "overlap": 1, "fragments": 2}
    try:
        async with fleet.up():
            for number, part in enumerate(DATA):
                fleet.join(f"agent{number}", part)
            await fleet.online(2)
            undisturbed = await fleet.finished(fleet.start(**spec))
            held = Door(fleet.agents[1], 3, "train")
            in_background(fleet.agents[0])
            run_id = fleet.start(**spec)
            await until(held.reached.is_set)
        in_background(fleet.agents[0])  # what it trains in the background is lost
        async with fleet.up():
            held.open()
            run = await fleet.finished(run_id)
            assert [closed.digest for closed in run.history] == [
                closed.digest for closed in undisturbed.history
            ]
            await fleet.close()
    finally:
        await fleet.close()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mode": "buffered", "buffer": 2}, "--overlap cannot be used with --mode buffered"),
        ({"late": "fold"}, "an older version"),
        ({"secure": True, "quorum": 3}, "--secure cannot be used with --overlap"),
        ({"dp_epsilon": 3.0}, "--dp cannot be used with --overlap"),
        ({"strategy": "scaffold"}, "corrections"),
        ({"overlap": 2}, "--overlap must be 0 or 1"),
        ({"overlap": 0, "fragments": 2}, "--fragments needs --overlap 1"),
        ({"fragments": 2, "strategy": "krum", "quorum": 5}, "may need whole models"),
        (
            {
                "fragments": 2,
                "dp_user_epsilon": 8.0,
                "clip_norm": 1.0,
                "weighting": "equal",
            },
            "--dp-user cannot be used with --fragments",
        ),
    ],
    ids=lambda part: str(part)[:24],
)
def test_what_cannot_be_combined_is_refused_before_the_start(
    fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        spec_rules.check(RunSpec(**({"task": "mnist", "rounds": 3, "overlap": 1} | fields)))


@pytest.mark.parametrize("strategy", ["fedavg", "diloco", "krum"])
def test_it_works_with_updates_that_are_changes_of_weights(strategy: str) -> None:
    for codec in ("fp32", "int8", "sparse2:64"):
        quorum = 5 if strategy == "krum" else 2
        spec_rules.check(
            RunSpec(
                task="mnist", rounds=3, overlap=1, strategy=strategy, codec=codec, quorum=quorum
            )
        )
