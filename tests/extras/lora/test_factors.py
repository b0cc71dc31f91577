"""Adapters of different ranks: what peers send, what a version adds, what a run learns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from agent.data.settings import DataSettings
from agent.tasks import Setting
from agent.tasks.language import factored
from agent.tasks.language.lora import Lora
from benchmarks.quality.fleet import fleet_of
from coordinator.remote.run_options import build_order
from coordinator.runs import spec_rules
from coordinator.storage.run_events import RunSpec
from coordinator.strategies import averaging, svd
from protocols.codecs import factors, registry
from protocols.codecs.factors import DELTA, A, B
from protocols.codecs.registry import FactoredUpdate
from protocols.errors import UsageError
from protocols.messages.states import RunState
from protocols.model import weights
from protocols.model.weights import Weights
from tests.extras.lora.test_lora import data_of
from tests.support.callbacks import ignore_step

SETTINGS: dict[str, Setting] = {"model": "tiny", "context": 24, "rank": 8, "lr": 0.01}
WAYS = ("stack", "svd")


def order(way: str, **typed: Any) -> RunSpec:
    asked = {**SETTINGS, "max_steps": 8, "aggregation": way}
    words = [f"{name}={value}" for name, value in asked.items()]
    return build_order({"task": "lora", "set": words, **typed}).spec


def task_of(data: DataSettings) -> Lora:
    task = Lora()
    task.load(data)
    return task


def memory_for(rank: int) -> int:
    """Of a device that has room for adapters of this rank."""
    numbers = 2 * 2 * 2 * 256  # parameters at rank 1
    fits = numbers * rank * factored.BYTES_OF_PARAMETER / factored.SHARE_OF_MEMORY
    return math.ceil(fits)


class Trained(NamedTuple):
    """A version, and what two peers with ranks of 8 and 4 make of it."""

    base: Weights
    updates: list[Weights]
    tasks: list[Lora]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def peers(hub: Path, texts: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> Trained:
    tasks = [task_of(data_of(hub, texts, peer)) for peer in ("one", "two")]
    settings = {**SETTINGS, "max_steps": 6, "aggregation": way, "rank": "auto"}
    base = tasks[0].init(1, settings)
    updates = []
    for seed, (task, rank) in enumerate(zip(tasks, (8, 4), strict=True)):
        monkeypatch.setattr(factored, "memory_bytes", lambda device, n=memory_for(rank): n)
        updates.append(Weights(task.train(base, settings | {"seed": seed}, ignore_step).weights))
        assert task.sums_schema(base, settings) == updates[-1].schema
        assert {a.shape[0] for name, a in updates[-1].items() if name.endswith(A)} == {rank}
    return Trained(base, updates, tasks)


def opened(peers: Trained) -> list[FactoredUpdate]:
    codec = registry.parse("factors:32")
    found = [registry.open_update(codec, one, codec.base(peers.base)) for one in peers.updates]
    return [one for one in found if isinstance(one, FactoredUpdate)]


def next_version(peers: Trained, share: list[float]) -> Weights:
    """As the coordinator makes it."""
    readers, scale = opened(peers), [1.0] * len(share)
    if factors.is_factored(peers.base.schema):
        pieces = svd.aggregate(readers, share, scale, peers.base)
    else:
        pieces = averaging.average(readers, share, scale, peers.base, lambda mean: mean)
    arrays = {part.name: array for piece in pieces for part, array in piece.items()}
    return Weights({n: array.reshape(peers.base[n].shape) for n, array in arrays.items()})


def product(update: Weights, layer: str) -> np.ndarray:
    return update[layer + B].astype(np.float64) @ update[layer + A].astype(np.float64)


def test_a_version_adds_the_mean_of_the_products(peers: Trained, way: str) -> None:
    version, share = next_version(peers, [0.3, 0.7]), [0.3, 0.7]
    for layer in factors.layers(peers.base.schema):
        one, two = (product(update, layer) for update in peers.updates)
        expected = 0.3 * one + 0.7 * two
        if way == "stack":
            added = version[layer + DELTA]
        else:  # the ranks add up to 12, and the version has 32
            added = product(version, layer)
            stacked = svd.stack(layer, list(zip(peers.updates, share, strict=True)))
            assert 1e-6 < svd.truncate(*stacked, 8).error < 1.0
        assert np.abs(added - expected).max() < 1e-6
        assert np.abs(expected).max() > 1e-3


def test_what_a_version_adds_is_what_the_peer_trained(hub: Path, peers: Trained, way: str) -> None:
    """The update of one peer alone is a version that answers as its model does."""
    settings = {**SETTINGS, "aggregation": way, "rank": "auto"}
    tokens, task = torch.arange(12)[None], peers.tasks[0]
    with torch.no_grad():
        own = task._adapted(task._read(settings)).eval()(tokens)
        seen = task._ready(next_version(peers, [1.0, 0.0]), settings)(tokens)
        plain = AutoModelForCausalLM.from_pretrained(hub / "tiny").eval()
        torch.testing.assert_close(seen, own, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(seen, plain(tokens).logits, atol=1e-2)


def test_a_peer_trains_the_first_factors_of_a_version(peers: Trained, way: str) -> None:
    settings: dict[str, Setting] = {**SETTINGS, "aggregation": way, "rank": "auto", "lr": 0.0}
    version, task = next_version(peers, [0.3, 0.7]), peers.tasks[0]
    found = Weights(task.train(version, settings | {"max_steps": 1}, ignore_step).weights)
    for layer in factors.layers(peers.base.schema):
        if way == "stack":  # it begins anew
            assert not product(found, layer).any()
            continue
        best = version[layer + B][:, :8].astype(np.float64) @ version[layer + A][:8]
        np.testing.assert_allclose(product(found, layer), best, atol=1e-6)


def test_a_run_learns_and_sends_factors(hub: Path, texts: Path, tmp_path: Path, way: str) -> None:
    spec = order(way, rounds=3, quorum=2)
    assert spec.codec == "factors:8"
    assert spec.strategy == ("svd" if way == "svd" else "fedavg")
    spec_rules.check(spec)
    peers = [data_of(hub, texts, peer) for peer in ("one", "two")]
    with fleet_of(peers) as fleet:
        run = fleet.run(spec)
        version = weights.load(fleet.lane.version_path(run.head))
    assert run.state is RunState.FINISHED, run.ended_because
    assert not any(closed.refused for closed in run.history)
    losses = [closed.metrics["loss"] for closed in run.history]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * np.log(320)
    factor_bytes = 2 * 2 * 2 * 8 * 256 * 4
    for closed in run.history:
        assert 2 * factor_bytes <= closed.bytes_up <= 2 * factor_bytes * 1.02
    assert version.nbytes == (factor_bytes if way == "svd" else 2 * 2 * 256 * 256 * 4)
    out = tmp_path / "merged"
    Lora().export(version, spec.settings, "merged", peers[0], out)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        seen = task_of(peers[0])._ready(version, spec.settings)(tokens)
        merged = AutoModelForCausalLM.from_pretrained(out).eval()(tokens).logits
    torch.testing.assert_close(merged, seen, rtol=1e-4, atol=1e-4)


def test_goes_on_where_it_was_cut_off(hub: Path, texts: Path, way: str) -> None:
    settings = {**SETTINGS, "max_steps": 6, "aggregation": way}
    task, kept = task_of(data_of(hub, texts)), []

    def keep(step: int, *_: float) -> None:
        if step == 3:
            found = task.snapshot()
            kept.append(found._replace(arrays={n: a.copy() for n, a in found.arrays.items()}))

    base = task.init(1, settings)
    whole = task.train(base, settings, keep)
    other = task_of(data_of(hub, texts))
    other.restore(kept[0])
    rest = other.train(base, settings, ignore_step)
    assert weights.digest(Weights(rest.weights)) == weights.digest(Weights(whole.weights))


def test_a_rank_of_auto_follows_from_the_memory(hub: Path, texts: Path) -> None:
    numbers = 2 * 2 * 2 * 256
    for rank in (1, 2, 8, 32):
        assert factored.rank_for(memory_for(rank), numbers) == rank
        assert factored.rank_for(2 * memory_for(rank) - 9, numbers) == rank
    assert factored.rank_for(1, numbers) == 1
    assert factored.rank_for(1 << 50, numbers) == factors.AUTO_RANK
    task = task_of(data_of(hub, texts))
    for way in ("ffa", "average"):
        with pytest.raises(UsageError, match="all peers have adapters of one rank"):
            task.schema({**SETTINGS, "rank": "auto", "aggregation": way})
    settings = {**SETTINGS, "rank": "auto", "aggregation": "svd"}
    (a, _), *_ = factors.layers(task.schema(settings)).values()
    assert a == 256
    ranks = {a.shape[0] for n, a in task.init(1, settings).items() if n.endswith(A)}
    assert ranks == {factors.AUTO_RANK}
    asked = ["model=tiny", "rank=auto", "aggregation=svd"]
    assert build_order({"task": "lora", "set": asked}).spec.codec == "factors:32"
