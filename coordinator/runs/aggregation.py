"""What closes a round: the fold of its updates into a version, and its federated evaluation.

Both go through an unmodified Flower strategy; `strategies.runner` says how it gets the updates.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Hashable, Mapping
from typing import NamedTuple, TypeVar

from flwr.serverapp.strategy import Strategy

from coordinator import strategies
from coordinator.runs import buffered
from coordinator.runs.state import Run
from coordinator.storage.run_events import Update
from coordinator.storage.weight_store import WeightStore
from coordinator.strategies import averaging
from coordinator.strategies.failures import strategy_errors
from coordinator.strategies.prefetch import prefetch
from coordinator.strategies.runner import AggregationInput, as_reply, next_version
from coordinator.strategies.state import StateStore
from protocols.codecs import registry
from protocols.codecs.registry import Codec
from protocols.messages.envelope import Metrics
from protocols.model.weights import PIECE_BYTES, WeightReader
from protocols.model.weights_file import WeightsFile
from protocols.tables import evaluation_counts as tallies

K = TypeVar("K", bound=Hashable)


class CommittedVersion(NamedTuple):
    """A new version, the mean of its updates' metrics, and the strategy's state by slot."""

    digest: str
    metrics: Metrics
    state: dict[str, str]


def commit(
    run: Run,
    store: WeightStore,
    states: StateStore,
    strategy: Strategy,
    contributors: tuple[str, ...],
) -> CommittedVersion:
    """Updates → the strategy → a new version, durable together with the strategy's new state."""
    adapter, codec = strategies.find(run.spec.strategy), registry.parse(run.spec.codec)
    equal = run.spec.weighting == "equal"
    accepted = sorted(run.updates.items())
    accepted += [(one.peer, one.update) for one in buffered.in_order(run)]
    updates = [update for _, update in accepted]
    examples = [1 if equal else update.num_examples for update in updates]
    share = _shares([peer for peer, _ in accepted], examples, run.spec.max_weight_share)
    metrics = _mean_metrics(
        {number: update.metrics for number, update in enumerate(updates)}, dict(enumerate(share))
    )
    told = {name: value for name, value in metrics.items() if value is not None}
    asked = adapter.required_metric(run.spec.strategy_args)
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(WeightsFile(store.version_path(run.head)))
        work = AggregationInput(
            round=run.round,
            base=base,
            origin=stack.enter_context(WeightsFile(store.version_path(run.head))),
            updates=[
                adapter.transform_update(
                    run.spec.strategy_args,
                    _rebased(codec, store, peer, update, run.head, base, stack),
                    base,
                    update.metrics,
                )
                for peer, update in accepted
            ],
            share=share,
            scale=[
                _clipped(update.norm, run.spec.clip_norm)
                * buffered.discount(update.staleness)
                * run.spec.server_lr
                for update in updates
            ],
            examples=examples,
            # Not all that they told: Flower's strategies raise when two tell different metrics.
            metrics=[
                {n: v for n, v in u.metrics.items() if n == asked and v is not None}
                for u in updates
            ],
            told={
                **told,
                "num-examples": sum(update.num_examples for update in updates),
                "participation": min(1.0, len(contributors) / max(run.num_eligible, 1)),
            },
        )
        made = next_version(
            adapter,
            strategy,
            work,
            states,
            run.strategy_state,
            lambda: adapter.make(run.spec.strategy_args),
        )
        # A thread for a model of one piece costs more than it saves.
        pieces = made.pieces
        if base.nbytes > PIECE_BYTES:
            pieces = stack.enter_context(contextlib.closing(prefetch(pieces)))
        digest = store.write(base.schema, pieces)
    return CommittedVersion(digest, metrics, made.state)


def _shares(peers: list[str], weights: list[int], cap: float) -> list[float]:
    """Each update's share of the mean; `cap` bounds that of a peer with all its updates."""
    of_peer: dict[str, int] = {}
    for peer, weight in zip(peers, weights, strict=True):
        of_peer[peer] = of_peer.get(peer, 0) + weight
    share = averaging.shares(of_peer, equal=False, cap=cap)
    return [share[p] * (w / of_peer[p]) for p, w in zip(peers, weights, strict=True)]


def _rebased(
    codec: Codec,
    store: WeightStore,
    peer: str,
    update: Update,
    digest: str,
    head: WeightsFile,
    stack: contextlib.ExitStack,
) -> WeightReader:
    """An update's weights as if it had begun at the newest version, `head`, named by its digest."""
    file = stack.enter_context(WeightsFile(store.uploads.path(peer, update.digest)))
    if codec.encoding is not None or update.base in ("", digest):
        return registry.open_update(codec, file, head)
    base = stack.enter_context(WeightsFile(store.version_path(update.base)))
    return averaging.RebasedUpdate(file, base, head)


class Evaluation(NamedTuple):
    """The metrics of all peers together, and the sum of their tallies."""

    metrics: Metrics
    tallies: dict[str, list[float]]


def aggregate_evaluation(run: Run, strategy: Strategy) -> Evaluation:
    """The round's federated evaluation: means through the strategy, and what the tallies amount to.

    One reply holds the mean of all: Flower's strategies raise when two replies tell different
    metrics, and know no cap on a peer's share.
    """
    answers = dict(sorted(run.updates.items()))
    if not answers:
        return Evaluation({}, {})
    counts = {peer: update.num_examples for peer, update in answers.items()}
    share = averaging.shares(counts, equal=False, cap=run.spec.max_weight_share)
    mean = _mean_metrics({p: update.metrics for p, update in answers.items()}, share)
    told = {name: value for name, value in mean.items() if value is not None}
    reply = as_reply("evaluate", None, told | {"num-examples": sum(counts.values())})
    with strategy_errors(run.spec.strategy):
        found = strategy.aggregate_evaluate(run.round, [reply])
        means: Metrics = {
            name: float(value) if math.isfinite(value) else None
            for name, value in (found or {}).items()
            if isinstance(value, int | float)
        }
    # As a peer's share may be capped, so is what it counted.
    scale = [share[peer] * sum(counts.values()) / counts[peer] for peer in answers]
    total = tallies.merge((update.tallies for update in answers.values()), scale)
    return Evaluation({**means, **tallies.compute_metrics(total)}, total)


def _clipped(norm: float, most: float) -> float:
    """The factor that brings an update of this norm within `most` (0: no bound)."""
    return most / norm if most and norm > most else 1.0


def _mean_metrics(found: Mapping[K, Metrics], share: Mapping[K, float]) -> Metrics:
    """The mean, by share, of the metrics that peers with half of all shares told as finite.

    Those who did not are left out of it: one that diverges, or keeps a number back, hides it not
    from all.
    """
    result: Metrics = {}
    for name in sorted(set[str]().union(*found.values())):
        whole = {p: value for p in found if (value := found[p].get(name)) is not None}
        held = sum(share[peer] for peer in whole)
        if len(whole) == len(found):
            held = 1.0
        if held >= 0.5:
            result[name] = sum(share[peer] * value for peer, value in whole.items()) / held
    return result
