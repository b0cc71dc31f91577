"""What closes a round: the fold of its updates into a version, and its federated evaluation.

Both go through an unmodified Flower strategy; `strategies.feeding` says how it gets the updates.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

from flwr.serverapp.strategy import Strategy

from coordinator import aggregate, strategies
from coordinator.lane import Lane
from coordinator.runs import Run
from coordinator.strategies.feeding import Work, as_reply, next_version
from coordinator.strategies.state import States
from protocols import codecs
from protocols.messages import Metrics
from protocols.stored import Stored


class Committed(NamedTuple):
    """A new version, the mean of its updates' metrics, and the strategy's state by slot."""

    digest: str
    metrics: Metrics
    state: dict[str, str]


def commit(
    run: Run, lane: Lane, states: States, strategy: Strategy, contributors: tuple[str, ...]
) -> Committed:
    """Updates → the strategy → a new version, durable together with the strategy's new state."""
    recipe, codec = strategies.find(run.spec.strategy), codecs.find(run.spec.codec)
    equal = run.spec.weighting == "equal"
    updates = [run.updates[peer] for peer in contributors]
    counts = {peer: run.updates[peer].num_examples for peer in contributors}
    share = aggregate.shares(counts, equal=equal, cap=run.spec.max_weight_share)
    metrics = _mean_metrics({p: run.updates[p].metrics for p in contributors}, share)
    told = {name: value for name, value in metrics.items() if value is not None}
    asked = recipe.metric(run.spec.strategy_args)
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(Stored(lane.version(run.head)))
        work = Work(
            round=run.round,
            base=base,
            origin=stack.enter_context(Stored(lane.version(run.head))),
            updates=[
                codecs.decoded(
                    codec,
                    stack.enter_context(Stored(lane.update(peer, run.updates[peer].digest))),
                    base,
                )
                for peer in contributors
            ],
            share=[share[peer] for peer in contributors],
            scale=[_clipped(update.norm, run.spec.clip_norm) for update in updates],
            examples=[1 if equal else update.num_examples for update in updates],
            # Not all that they told: Flower's strategies raise when two tell different metrics.
            metrics=[{n: v for n, v in u.metrics.items() if n == asked and v} for u in updates],
            told={
                **told,
                "num-examples": sum(counts.values()),
                "participation": len(contributors) / max(run.eligible, len(contributors)),
            },
        )
        made = next_version(
            recipe,
            strategy,
            work,
            states,
            run.strategy_state,
            lambda: recipe.make(run.spec.strategy_args),
        )
        digest = lane.write(base.schema, made.pieces)
    return Committed(digest, metrics, made.state)


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
    reply = as_reply("evaluate", None, told | {"num-examples": sum(counts.values())})
    found = strategy.aggregate_evaluate(run.round, [reply])
    return {
        name: float(value) if math.isfinite(value) else None
        for name, value in (found or {}).items()
        if isinstance(value, int | float)
    }


def _clipped(norm: float, most: float) -> float:
    """The factor that brings an update of this norm within `most` (0: no bound)."""
    return most / norm if most and norm > most else 1.0


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
