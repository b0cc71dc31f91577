"""Runs with a codec, through the real link, lane, gate and fold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from agent.clientapp.app import CLAIM
from coordinator.storage.run_events import RunSpec
from protocols.codecs import registry
from protocols.errors import UnknownName, UsageError
from protocols.messages.states import RunState
from protocols.messages.work import SIGNED_CLAIM, UpdateClaim
from protocols.model import weights
from tests.support.in_process_fleet import (
    Agent,
    Data,
    Fleet,
    first_weights,
    fleet_of,
    gradient_step,
    loss_of,
    some_data,
)
from tests.support.waiting import until

FEATURES = 2000
DATA = [some_data(60, seed, FEATURES) for seed in (1, 2)]
ROUNDS = 6


def gently(fleet: Fleet) -> None:
    """So many features ask for small steps."""
    for agent in fleet.agents:
        agent.trainer.step = lambda model, data: gradient_step(model, data, 0.001)


@pytest.mark.parametrize(
    ("codec", "fewer"),
    [("bf16", 1.9), ("int8", 3.9), ("sign", 25.0), ("ternary", 20.0), ("topk:0.02", 30.0)],
)
async def test_a_run_with_a_codec_learns_with_fewer_bytes(
    tmp_path: Path, codec: str, fewer: float
) -> None:
    async with fleet_of(tmp_path, *DATA) as fleet:
        gently(fleet)
        run_id = fleet.start(rounds=ROUNDS, quorum=2, codec=codec)
        run = await fleet.finished(run_id)
        assert run.state is RunState.FINISHED
        assert fleet.refusals(run_id) == []
        start = sum(loss_of(first_weights(FEATURES), data) for data in DATA)
        end = sum(loss_of(fleet.version(run.head), data) for data in DATA)
        assert end < start
        model = fleet.hub.weight_store.version_path(run.head).stat().st_size
        for closed in run.history[1:]:  # the first weights came up whole
            assert 2 * model / closed.bytes_up > fewer
        assert all(closed.norms for closed in run.history)
        for agent in fleet.agents:
            left = list((agent._folder / "leftovers").iterdir())
            assert [path.suffix for path in left] == [".left"]
            assert not (agent._folder / "trained.safetensors").exists()


async def test_int8_is_as_good_as_whole_weights(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *DATA) as fleet:
        gently(fleet)
        losses = []
        for codec in ("fp32", "int8"):
            run = await fleet.finished(fleet.start(rounds=ROUNDS, quorum=2, codec=codec))
            losses.append(sum(loss_of(fleet.version(run.head), data) for data in DATA))
        assert abs(losses[0] - losses[1]) < 0.01 * losses[0]


def claim_of(reply: Message) -> UpdateClaim:
    payload = reply.content.config_records[CLAIM]["claim"]
    assert isinstance(payload, bytes)
    return SIGNED_CLAIM.decode(payload)


def claims_instead(agent: Agent, codec: str) -> None:
    """From now on the agent says that it used this codec."""
    honest = agent.answer

    def answer(message: Message) -> Message:
        reply = honest(message)
        claim = claim_of(reply)
        if claim.kind != "train":
            return reply
        changed = msgspec.structs.replace(claim, codec=codec)
        payload, signature = SIGNED_CLAIM.seal(changed, agent.machine.sign_key.sign)
        record = ConfigRecord({"claim": payload, "signature": signature})
        return Message(RecordDict({CLAIM: record}), reply_to=message)

    agent.answer = answer  # type: ignore[method-assign]


def sends_instead(agent: Agent, model: weights.Weights) -> None:
    """From now on the agent's uploads are this file, properly claimed."""
    honest = agent.answer

    def answer(message: Message) -> Message:
        reply = honest(message)
        claim = claim_of(reply)
        if claim.kind != "train":
            return reply
        path = agent._folder / "forged.safetensors"
        digest = weights.save(model, path)
        agent._open_link().upload(digest, path)
        changed = msgspec.structs.replace(claim, digest=digest)
        payload, signature = SIGNED_CLAIM.seal(changed, agent.machine.sign_key.sign)
        record = ConfigRecord({"claim": payload, "signature": signature})
        return Message(RecordDict({CLAIM: record}), reply_to=message)

    agent.answer = answer  # type: ignore[method-assign]


async def refused(fleet: Fleet, word: str, **spec: Any) -> None:
    """The first agent's update is refused by this word, and the run goes on without it."""
    run_id = fleet.start(rounds=1, quorum=1, **spec)
    run = await fleet.finished(run_id)
    assert run.history[0].contributors == (fleet.agents[1].peer,)
    assert fleet.refusals(run_id) == [(1, fleet.agents[0].peer, word)]


async def test_another_codec_than_asked_is_refused_by_name(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *DATA) as fleet:
        claims_instead(fleet.agents[0], "fp32")
        await refused(fleet, "wrong codec", codec="int8")


@pytest.mark.parametrize("scale", [[np.nan, 1], [1]])
async def test_a_forged_coded_file_is_refused(tmp_path: Path, scale: list[float]) -> None:
    count = (FEATURES + 1) * 3
    rows = -(-FEATURES * 3 // 513)  # rows of 3 are joined to 513; the bias is one more
    scales = np.array([1] * (rows - 1) + scale, np.float32)
    async with fleet_of(tmp_path, *DATA) as fleet:
        coded = {"q": np.ones(count, np.int8), "s": scales}
        sends_instead(fleet.agents[0], weights.Weights(coded))
        await refused(fleet, "bad weights", codec="int8")


async def test_values_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    coded = weights.Weights({"i": np.zeros(1, np.uint8), "v": np.full(1, np.nan, np.float32)})
    async with fleet_of(tmp_path, *DATA) as fleet:
        sends_instead(fleet.agents[0], coded)
        await refused(fleet, "not finite", codec="topk")


async def test_an_upload_may_not_be_larger_than_its_codec_makes_it(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *DATA) as fleet:
        limits = fleet.hub.transfer.limits
        while_training = list[int]()
        fleet.agents[0].trainer.before = lambda kind, _: (
            while_training.append(limits.max_bytes) if kind == "train" else None
        )
        run = await fleet.finished(fleet.start(rounds=1, quorum=2, codec="sign"))
        schema = fleet.version(run.head).schema
        model = fleet.hub.weight_store.version_path(run.head).stat().st_size
        most = registry.max_bytes(registry.parse("sign"), schema, model)
        assert most < model / 25
        assert most <= while_training[0] < model + 1024 * 1024
        await until(lambda: fleet.hub.runs.current is None)
        assert limits.max_bytes == 0, "the next run sets its own"


async def test_an_unknown_codec_is_refused_before_the_start(tmp_path: Path) -> None:
    async with fleet_of(tmp_path, *DATA) as fleet:
        with pytest.raises(UnknownName, match="known: fp32, bf16, int8, sign, ternary, topk"):
            fleet.start(rounds=1, codec="zip")
        with pytest.raises(UsageError, match="share"):
            fleet.start(rounds=1, codec="topk:7")


def test_the_record_of_an_old_run_has_no_codec() -> None:
    assert msgspec.json.decode(b'{"task":"t","rounds":1}', type=RunSpec).codec == "fp32"


# --- the way down ----------------------------------------------------------------------------

WIDE = 30_000


def coarse(model: weights.Weights, data: Data) -> weights.Weights:
    """A training that moves a few hundred weights."""
    moved = gradient_step(model, data, 0.0001)
    w = np.array(model["w"])
    w[::300] = moved["w"][::300]
    return weights.Weights({"w": w, "b": np.array(moved["b"])})


@pytest.mark.parametrize("codec", ["fp32", "topk"])
async def test_where_little_moves_a_version_comes_as_a_patch(tmp_path: Path, codec: str) -> None:
    data = [some_data(20, seed, WIDE) for seed in (1, 2)]
    async with fleet_of(tmp_path, *data) as fleet:
        for agent in fleet.agents:
            agent.trainer.step = coarse
        run = await fleet.finished(fleet.start(rounds=4, quorum=2, codec=codec))
        assert fleet.refusals(run.id) == []
        model = fleet.hub.weight_store.version_path(run.head).stat().st_size
        down = [closed.bytes_down for closed in run.history]
        # The first weights come down whole; they are already there for whoever made them, or not.
        assert down[0] >= model
        assert max(down[1:]) < 2 * model / 5
        for agent in fleet.agents:
            kept = {path.stem for path in (agent._folder / "cache").iterdir()}
            assert run.head in kept
            assert all(weights.file_digest(path) == path.stem for path in cached(agent))
        lane = fleet.hub.weight_store
        patched = {p.stem for p in (fleet.home / "versions").glob("*.patch")}
        assert patched <= {run.head, run.parent, run.best.digest if run.best else ""}
        assert lane.patch_path(run.head).exists()


def cached(agent: Agent) -> list[Path]:
    return list((agent._folder / "cache").glob("*.safetensors"))


@pytest.mark.parametrize("harm", ["gone", "cut", "another"])
async def test_whatever_is_wrong_with_a_patch_the_version_comes_whole(
    tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [some_data(20, seed, WIDE) for seed in (1, 2)]
    async with fleet_of(tmp_path, *data) as fleet:
        lane = fleet.hub.weight_store
        make = lane.make_patch

        def spoilt(parent: str, digest: str) -> int:
            nbytes = make(parent, digest)
            assert nbytes
            path = lane.patch_path(digest)
            found = path.read_bytes()
            if harm == "gone":
                path.unlink()
            elif harm == "cut":
                path.write_bytes(found[:-5])
            else:
                path.write_bytes(found[:-1] + bytes([found[-1] ^ 1]))
            return nbytes

        monkeypatch.setattr(lane, "make_patch", spoilt)
        for agent in fleet.agents:
            agent.trainer.step = coarse
        run = await fleet.finished(fleet.start(rounds=3, quorum=2))
        assert run.state is RunState.FINISHED
        assert fleet.refusals(run.id) == []
        model = lane.version_path(run.head).stat().st_size
        assert all(closed.bytes_down >= 2 * model for closed in run.history[1:])
        for agent in fleet.agents:
            assert all(
                path.name.endswith((".safetensors", ".work.json"))
                for path in (agent._folder / "cache").iterdir()
            )
