"""Updates that would spoil a model: refused by name, and the result is that of the run without."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from coordinator.fleet.state import decode, encode
from coordinator.runs import state, transitions
from coordinator.storage import run_events
from coordinator.transport.flower_records import CLAIM
from protocols.messages.states import RunState
from protocols.messages.work import SIGNED_CLAIM, UpdateClaim
from protocols.model import weights
from protocols.model.weights import Weights
from tests.support.in_process_fleet import Agent, first_weights, fleet_of, some_data

#: The model has a tensor of (20, 3): numpy would take (1, 3) for it without a word.
FEATURES, CLASSES = 20, 3
HONEST = tuple(some_data(20 + 10 * seed, seed, FEATURES) for seed in range(2))


pytestmark = [pytest.mark.usefixtures("coordinator_home"), pytest.mark.attack("20.5")]


class Poisoner:
    """An enrolled peer that trains like the others and then changes what it sends.

    `train` gives, round by round, what becomes of (weights, claim); `evaluate` is for the claim.
    """

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self._honest = agent.answer
        agent.answer = self.answer  # type: ignore[method-assign]
        self.train: dict[int, dict[str, Any]] = {}
        self.evaluate: dict[int, dict[str, Any]] = {}
        self.raw: dict[int, Callable[[bytes], bytes]] = {}
        self.models: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}

    def answer(self, message: Message) -> Message:
        reply = self._honest(message)
        record = reply.content.config_records.get(CLAIM)
        if record is None:
            return reply
        claim = SIGNED_CLAIM.decode(record["claim"])  # type: ignore[arg-type]
        if claim.kind in ("init", "describe"):
            return reply
        changed = dict(
            (self.train if claim.kind == "train" else self.evaluate).get(claim.round, {})
        )
        if claim.kind == "train" and claim.round in self.models:
            changed |= self._send(claim)
        payload = SIGNED_CLAIM.seal(msgspec.structs.replace(claim, **changed), self._sign)[0]
        if claim.kind == "train" and claim.round in self.raw:
            payload = self.raw[claim.round](payload)
        signature = self._sign(SIGNED_CLAIM.signed_bytes(payload))
        content = RecordDict({CLAIM: ConfigRecord({"claim": payload, "signature": signature})})
        return Message(content, reply_to=message)

    def _sign(self, signed: bytes) -> bytes:
        return self.agent.machine.sign_key.sign(signed)

    def _send(self, claim: UpdateClaim) -> dict[str, Any]:
        model = self.agent.trainer.made[claim.round]
        tensors = self.models[claim.round]({name: np.array(model[name]) for name in model})
        path = self.agent._folder / "poison.safetensors"
        digest = weights.save(Weights(tensors), path)
        self.agent._open_link().upload(digest, path)
        return {"digest": digest, "nbytes": path.stat().st_size}


def with_nan(model: dict[str, Any]) -> dict[str, Any]:
    model["w"][0, 0] = math.nan
    return model


BAD_MODELS: list[tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = [
    ("not finite", with_nan),
    ("bad weights", lambda model: model | {"extra": np.zeros(1, np.float32)}),
    ("bad weights", lambda model: {"w": model["w"]}),
    ("bad weights", lambda model: model | {"w": model["w"][:1]}),
    ("bad weights", lambda model: model | {"w": model["w"].astype(np.int32)}),
    ("bad weights", lambda model: model | {"w": model["w"].astype(np.float64)}),
    ("bad weights", lambda model: model | {"w": model["w"].T.copy()}),
    ("not finite", lambda model: model | {"b": np.full_like(model["b"], np.inf)}),
]
BAD_CLAIMS: list[tuple[str, dict[str, Any]]] = [
    ("bad example count", {"num_examples": -80}),
    ("bad example count", {"num_examples": 0}),
    ("bad example count", {"num_examples": 10**12}),
    ("bad example count", {"num_examples": 10**18}),
    ("bad claim", {"metrics": {f"{n:04d}" + "m" * 60: 1.0 for n in range(1000)}}),
    ("bad metrics", {"metrics": {"accuracy": 1e300}}),
]
BAD_BYTES: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("bad claim", lambda raw: raw.replace(b'"num_examples":', b'"num_examples":1' + b"0" * 5000)),
    ("bad claim", lambda raw: raw.replace(b'"num_examples":', b'"num_examples":0.5,"x":')),
    ("bad claim", lambda raw: raw.replace(b'"metrics":{', b'"metrics":{"z":1e999,')),
    ("bad claim", lambda raw: raw.replace(b'"metrics":{', b'"metrics":{"z":NaN,')),
    ("bad claim", lambda raw: raw.replace(b'"metrics":{', b'"metrics":{"\\u001b[31m":1,')),
    ("bad claim", lambda raw: b"[" * 100_000),
]
#: Told of an evaluation: word of its refusal, or None where it may count and do no harm.
EVALUATIONS: list[tuple[str | None, dict[str, Any]]] = [
    ("bad metrics", {"metrics": {"loss": 0.1, "accuracy": 1e308}}),
    ("bad metrics", {"metrics": {"loss": 0.1, "accuracy": -5.0}}),
    ("bad claim", {"metrics": {f"{n:04d}" + "m" * 60: 1.0 for n in range(1000)}}),
    ("bad example count", {"num_examples": 10**12}),
    ("bad example count", {"num_examples": 0}),
    (None, {"metrics": {"loss": None}}),
    (None, {"metrics": {}}),
    (None, {"metrics": {"num-examples": -1e308, "own": 1e308}}),
]


def digests(run: state.Run) -> list[str]:
    return [closed.digest for closed in run.history]


async def test_the_result_is_that_of_the_run_without_the_rogue(tmp_path: Path) -> None:
    """Attack: send updates with NaN, other shapes, names, counts and bytes in each round."""
    async with fleet_of(tmp_path, *HONEST) as fleet:
        rounds = len(BAD_MODELS) + len(BAD_CLAIMS) + len(BAD_BYTES)
        plain = await fleet.finished(fleet.start(rounds=rounds, quorum=2, seed=3))
        rogue = fleet.join("rogue", some_data(40, 7, FEATURES))
        await fleet.online(3)
        poison = Poisoner(rogue)
        words = []
        for word, model in BAD_MODELS:
            words.append(word)
            poison.models[len(words)] = model
        for word, claim in BAD_CLAIMS:
            words.append(word)
            poison.train[len(words)] = claim
        for word, raw in BAD_BYTES:
            words.append(word)
            poison.raw[len(words)] = raw
        # Of its evaluations none counts either: the metrics of both runs are the same.
        poison.evaluate = {number: {"num_examples": -1} for number in range(1, rounds + 1)}
        run_id = fleet.start(rounds=rounds, quorum=2, seed=3)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        found = [f for f in fleet.facts(run_id, run_events.UpdateRefused) if f.kind == "train"]
        assert [(f.round, f.peer, f.reason) for f in found] == [
            (number, rogue.peer, word) for number, word in enumerate(words, 1)
        ]
        assert digests(run) == digests(plain)
        for with_rogue, without in zip(run.history, plain.history, strict=True):
            assert with_rogue.metrics == without.metrics
            assert with_rogue.contributors == without.contributors
        assert run.best is not None
        assert plain.best is not None
        assert run.best.digest == plain.best.digest
        print(f"{rounds} poisoned rounds: all refused by name, the same digest {run.head[:12]}")


async def test_lies_about_an_evaluation_move_nothing(tmp_path: Path) -> None:
    """Attack: report an evaluation with impossible counts and metrics."""
    async with fleet_of(tmp_path, *HONEST) as fleet:
        rounds = len(EVALUATIONS)
        plain = await fleet.finished(fleet.start(rounds=rounds, quorum=2, seed=3))
        rogue = fleet.join("rogue", some_data(20, 7, FEATURES))
        await fleet.online(3)
        poison = Poisoner(rogue)
        poison.train = {number: {"num_examples": -1} for number in range(1, rounds + 1)}
        for number, (_, lie) in enumerate(EVALUATIONS, 1):
            poison.evaluate[number] = lie
        run_id = fleet.start(rounds=rounds, quorum=2, seed=3)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        refused = {
            f.round: f.reason
            for f in fleet.facts(run_id, run_events.UpdateRefused)
            if f.kind == "evaluate"
        }
        assert refused == {n: word for n, (word, _) in enumerate(EVALUATIONS, 1) if word}
        assert digests(run) == digests(plain)
        for with_rogue, without in zip(run.history, plain.history, strict=True):
            assert set(with_rogue.metrics) == {"loss"}
            assert with_rogue.metrics["loss"] == pytest.approx(without.metrics["loss"])
        assert run.best is not None
        assert plain.best is not None
        assert run.best.digest == plain.best.digest
        # What the live run says is what the ledger says: no infinity was rounded to nothing there.
        again = transitions.replay(run_id, fleet.facts(run_id))
        assert again == run


@pytest.mark.parametrize("cap", [0.34, 0.5])
async def test_the_cap_on_a_peers_share_holds(tmp_path: Path, cap: float) -> None:
    """Attack: claim ten million examples, to move the model by more than one share."""
    async with fleet_of(tmp_path, *HONEST) as fleet:
        rogue = fleet.join("rogue", some_data(40, 7, FEATURES))
        await fleet.online(3)
        poison = Poisoner(rogue)
        poison.train = {1: {"num_examples": 10_000_000}}
        poison.models[1] = lambda model: {n: np.full_like(a, 1000.0) for n, a in model.items()}
        poison.evaluate = {1: {"num_examples": 10_000_000, "metrics": {"loss": 1e6}}}
        run_id = fleet.start(rounds=1, quorum=3, seed=3, max_weight_share=cap)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        assert rogue.peer in run.history[0].contributors
        made = [np.asarray(agent.trainer.made[1]["w"]) for agent in fleet.agents[:2]]
        counts = [len(data.y) for data in HONEST]
        honest = sum(c * w for c, w in zip(counts, made, strict=True)) / sum(counts)
        found = np.asarray(fleet.version(run.head)["w"])
        moved = (found - honest) / (1000.0 - honest)
        # Within what the honest, capped too, may lose to each other.
        spread = abs(made[0] - made[1]).max() / 999
        assert moved.max() <= cap + spread + 1e-6
        loss = run.history[0].metrics["loss"]
        assert loss is not None
        assert loss <= cap * 1e6 + 10


async def test_one_peer_alone_can_tell_only_so_much(tmp_path: Path) -> None:
    """Attack: send as many metrics as may be, with the longest names, which go to every monitor."""
    async with fleet_of(tmp_path, HONEST[0]) as fleet:
        poison = Poisoner(fleet.agents[0])
        many = {f"{n:02d}" + "\U0001f4a5" * 62: 1e308 for n in range(32)}
        poison.train = {1: {"metrics": many}}
        poison.evaluate = {1: {"metrics": many}}
        run = await fleet.finished(fleet.start(rounds=2, quorum=1))
        assert run.state is RunState.FINISHED
        assert len(run.history[0].metrics) == 32
        decode(encode(fleet.hub.fleet, 0.0))


def test_broadcasting_is_what_the_gate_prevents() -> None:
    """Control: numpy itself adds arrays of other shapes, so the check of shapes is needed."""
    model = first_weights(FEATURES)
    assert (np.asarray(model["w"]) + np.ones((1, CLASSES), np.float32)).shape == (FEATURES, CLASSES)
