"""What closes a round: the fold of its updates into a version, and its federated evaluation.

Both go through an unmodified Flower strategy, which gets one reply that stands for all.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import Strategy

from coordinator import aggregate
from coordinator.lane import Lane
from coordinator.records import from_record, to_record
from coordinator.runs import Run
from protocols import codecs
from protocols.errors import CommonweightError
from protocols.messages import Metrics
from protocols.stored import Stored
from protocols.weights import Array, Part


def commit(
    run: Run, lane: Lane, strategy: Strategy, contributors: tuple[str, ...]
) -> tuple[str, Metrics]:
    """Mean of the updates → the strategy → a new version; its digest and train metrics."""
    codec = codecs.find(run.spec.codec)
    counts = {peer: run.updates[peer].num_examples for peer in contributors}
    share = aggregate.shares(
        counts, equal=run.spec.weighting == "equal", cap=run.spec.max_weight_share
    )
    metrics = _mean_metrics({p: run.updates[p].metrics for p in contributors}, share)
    told = {name: value for name, value in metrics.items() if value is not None}
    told["num-examples"] = sum(counts.values())

    def through(mean: dict[Part, Array]) -> dict[Part, Array]:
        # Part by part the same as all at once: these strategies know no tensor's neighbour.
        reply = _as_reply("train", to_record(mean), told)
        arrays, _ = strategy.aggregate_train(run.round, [reply])
        if arrays is None:
            raise CommonweightError("the strategy gave no new weights")
        return from_record(arrays, mean)

    with contextlib.ExitStack() as stack:
        base = stack.enter_context(Stored(lane.version(run.head)))
        updates = [
            codecs.decoded(
                codec,
                stack.enter_context(Stored(lane.update(peer, run.updates[peer].digest))),
                base,
            )
            for peer in contributors
        ]
        version = aggregate.fold(
            updates,
            [share[peer] for peer in contributors],
            [_clipped(run.updates[peer].norm, run.spec.clip_norm) for peer in contributors],
            base,
            through,
        )
        return lane.write(base.schema, version), metrics


def evaluation(run: Run, strategy: Strategy) -> Metrics:
    """The round's federated evaluation, through the strategy.

    One reply holds the mean of all: Flower's strategies raise when two replies tell different
    metrics, and know no cap on a peer's share.
    """
    answers = dict(sorted(run.updates.items()))
    if not answers:
        return {}
    counts = {peer: update.num_examples for peer, update in answers.items()}
    share = aggregate.shares(counts, equal=False, cap=run.spec.max_weight_share)
    mean = _mean_metrics({p: update.metrics for p, update in answers.items()}, share)
    told = {name: value for name, value in mean.items() if value is not None}
    reply = _as_reply("evaluate", None, told | {"num-examples": sum(counts.values())})
    found = strategy.aggregate_evaluate(run.round, [reply])
    return {
        name: float(value) if math.isfinite(value) else None
        for name, value in (found or {}).items()
        if isinstance(value, int | float)
    }


def _clipped(norm: float, most: float) -> float:
    """The factor that brings an update of this norm within `most` (0: no bound)."""
    return most / norm if most and norm > most else 1.0


def _as_reply(kind: str, arrays: ArrayRecord | None, metrics: dict[str, Any]) -> Message:
    """A reply message as Flower's strategies expect it."""
    content = RecordDict({"metrics": MetricRecord(metrics)})
    if arrays is not None:
        content["arrays"] = arrays
    return Message(content, reply_to=Message(RecordDict(), 1, kind))


def _mean_metrics(found: dict[str, Metrics], share: dict[str, float]) -> Metrics:
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
