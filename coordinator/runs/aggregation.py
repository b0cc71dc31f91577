"""Closes a round: aggregates its updates into a version, and its evaluations into metrics.

Both use an unmodified Flower strategy. `strategies.runner` says how it gets the updates.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flwr.serverapp.strategy import Strategy

from coordinator import strategies
from coordinator.runs import buffered, outlier_limits
from coordinator.runs.outlier_limits import OutlierLimits
from coordinator.runs.state import Run
from coordinator.storage import noise_key
from coordinator.storage.run_events import PrivacySpent, Update
from coordinator.storage.weight_store import WeightStore
from coordinator.strategies import averaging, outliers
from coordinator.strategies.failures import strategy_errors
from coordinator.strategies.prefetch import prefetch
from coordinator.strategies.runner import Aggregation, InputUpdate, as_reply
from coordinator.strategies.state import StateStore
from coordinator.strategies.version_noise import VersionNoise, norm_as_folded
from protocols.codecs import registry
from protocols.messages.envelope import Metrics
from protocols.model import fragments
from protocols.model.fragments import Fragment
from protocols.model.weights import PIECE_BYTES, WeightReader
from protocols.model.weights_file import WeightsFile
from protocols.tables import evaluation_counts


def _own_ticket(peer: str) -> str:
    return peer


class CommittedVersion(NamedTuple):
    """A new version, the mean of its updates' metrics, and the strategy's state by slot.

    `limited`: peers whose updates count less, and how many times the median they pull. `spent`:
    what its noise was, if it has any.
    """

    digest: str
    metrics: Metrics
    state: dict[str, str]
    limited: dict[str, float]
    spent: tuple[PrivacySpent, ...] = ()


def commit(
    run: Run,
    store: WeightStore,
    states: StateStore,
    strategy: Strategy,
    contributors: tuple[str, ...],
    ticket_of: Callable[[str], str] = _own_ticket,
) -> CommittedVersion:
    """Aggregate the run's updates. Stores the version and the strategy's new state durably.

    `ticket_of`: the ticket that a peer joined with. Peers of one ticket share a cap.
    """
    spec = run.spec
    adapter = strategies.find(spec.strategy)
    accepted = sorted(run.updates.items())
    accepted += [(one.peer, one.update) for one in buffered.in_order(run)]
    updates = [update for _, update in accepted]
    examples = [1 if spec.weighting == "equal" else update.num_examples for update in updates]
    peers = [peer for peer, _ in accepted]
    shares = _shares(peers, examples, spec.max_weight_share, ticket_of)
    metrics = _mean_metrics([update.metrics for update in updates], shares)
    required = adapter.required_metric(spec.strategy_args)
    limits = OutlierLimits(run, peers, ticket_of)
    scale = [
        min(_clip_factor(update.norm, spec.clip_norm), factor)
        * buffered.discount(update.staleness)
        * spec.server_lr
        for update, factor in zip(updates, limits.norm_factors(updates), strict=True)
    ]
    fragment = Fragment.of_round(spec.fragments, run.round)
    with contextlib.ExitStack() as stack:
        heads = [stack.enter_context(WeightsFile(store.version_path(run.head))) for _ in range(2)]
        base, origin = (fragment.of(head) for head in heads)

        #: The base in the form that updates are compared with.
        seen = registry.parse(spec.codec).base(base)

        def weights_of(peer: str, update: Update) -> WeightReader:
            reader = _open_on_head(run, store, peer, update, seen, stack)
            return adapter.transform_update(spec.strategy_args, reader, base, update.metrics)

        readers = [weights_of(peer, update) for peer, update in accepted]
        noise: VersionNoise | None = None
        spent: tuple[PrivacySpent, ...] = ()
        if spec.private_versions is not None:
            noise, event = noise_of(run, store, accepted, spec.clip_norm)
            spent, metrics = (event,), {}  # the noise does not cover the metrics
            # Shares add up to 1, so this divides the sum of the clipped changes by a fixed number.
            scale = [
                _clip_factor(norm_as_folded(reader, base), event.clip) * len(readers) / event.peers
                for reader in readers
            ]
        if adapter.feed in ("mean", "factors"):
            shares = limits.shares(shares, readers, scale, seen, updates)
        else:  # the strategy itself weighs them, by these numbers
            examples = [int(number) for number in limits.at_most(examples)]
        # Only this metric: Flower's strategies raise if replies have different metrics.
        told = [update.metrics.get(required) for update in updates]
        if adapter.weighs_by_metric:
            told = list(limits.at_most([value or 0.0 for value in told]))
        inputs = [
            InputUpdate(reader, share, by, num_examples, {} if value is None else {required: value})
            for reader, share, by, num_examples, value in zip(
                readers, shares, scale, examples, told, strict=True
            )
        ]
        aggregation = Aggregation(
            adapter,
            strategy,
            spec.strategy_args,
            run.round - run.begun,
            base,
            origin,
            inputs,
            metrics_for_all(
                run,
                metrics,
                sum(update.num_examples for update in updates),
                len(contributors),
            ),
            states,
            fragment.slots_of(run.strategy_state),
            noise.of if noise else None,
            contributors,
        )
        digest = store_version(store, aggregation, heads[1])
    new = {fragment.slot(name): state for name, state in aggregation.new_state.items()}
    state = new if fragment.is_whole else {**run.strategy_state, **new}
    return CommittedVersion(digest, metrics, state, limits.limited, spent)


def noise_of(
    run: Run, store: WeightStore, accepted: list[tuple[str, Update]], clip: float
) -> tuple[VersionNoise, PrivacySpent]:
    """The noise of the mean over the peers that were asked when the round was opened.

    `clip`: the most by which one peer changes their sum.

    How many answered may depend on their data, so it decides neither the noise nor the mean.
    """
    assert run.spec.private_versions is not None
    noise = run.spec.private_versions.noise
    key = noise_key.of_round(
        noise_key.fix(store.home), run.id, run.round, run.head, run.num_asked, accepted
    )
    spent = PrivacySpent(run.round, noise, clip, run.num_asked)
    return VersionNoise(key, noise * clip / run.num_asked), spent


def metrics_for_all(
    run: Run, metrics: Metrics, num_examples: int, num_contributors: int
) -> dict[str, float]:
    """The metrics of the one reply that holds the mean."""
    participation = min(1.0, num_contributors / max(run.num_eligible, 1))
    return {**_finite(metrics), "num-examples": num_examples, "participation": participation}


def store_version(
    store: WeightStore, aggregation: Aggregation, head: WeightReader | None = None
) -> str:
    """Aggregate and store the version durably; its digest. `head`: the version before, which has
    the tensors that are not aggregated."""
    pieces = aggregation.pieces()
    model_bytes = sum(spec.nbytes for spec in aggregation.base.schema.values())
    with contextlib.ExitStack() as stack:
        if model_bytes > PIECE_BYTES:  # for a smaller model, a thread costs more than it saves
            pieces = stack.enter_context(contextlib.closing(prefetch(pieces)))
        schema = head.schema if head else aggregation.base.schema
        if head and schema.keys() != aggregation.base.schema.keys():
            return store.write(schema, fragments.fill(head, aggregation.base.schema, pieces))
        return store.write(schema, pieces)


def _shares(
    peers: list[str], weights: list[int], cap: float, ticket_of: Callable[[str], str]
) -> list[float]:
    """Each update's share of the mean. `cap` bounds the share of a peer with all its updates."""
    totals: Counter[str] = Counter()
    for peer, weight in zip(peers, weights, strict=True):
        totals[peer] += weight
    share = averaging.shares_by_ticket(totals, ticket_of, cap=cap)
    return [share[p] * (w / totals[p]) for p, w in zip(peers, weights, strict=True)]


def _open_on_head(
    run: Run,
    store: WeightStore,
    peer: str,
    update: Update,
    head: WeightReader,
    stack: contextlib.ExitStack,
) -> WeightReader:
    """An update's weights, rebased to the newest version if it was trained on an older one."""
    codec = registry.parse(run.spec.codec)
    file = stack.enter_context(WeightsFile(store.uploads.path(peer, update.digest)))
    if codec.encoding is not None or codec.rank or update.base in ("", run.head):
        return registry.open_update(codec, file, head)
    base = stack.enter_context(WeightsFile(store.version_path(update.base)))
    return averaging.RebasedUpdate(file, base, head)


class Evaluation(NamedTuple):
    """The metrics of all peers together, the sum of their tallies, the values that decide instead
    of the metrics, and the metrics that a few peers have moved far."""

    metrics: Metrics
    tallies: dict[str, list[float]]
    decisive: Metrics
    doubtful: frozenset[str]


def aggregate_evaluation(
    run: Run, strategy: Strategy, ticket_of: Callable[[str], str] = _own_ticket
) -> Evaluation:
    """The round's federated evaluation: means through the strategy, and metrics from tallies.

    The strategy gets one reply with the mean of all: Flower's strategies raise if two replies have
    different metrics, and cannot cap a peer's share.
    """
    answers = dict(sorted(run.updates.items()))
    if not answers:
        return Evaluation({}, {}, {}, frozenset())
    counts = {peer: update.num_examples for peer, update in answers.items()}
    # The same for all models of a run, which are compared; a run of trees alone has none.
    total, limit = sum(counts.values()), (run.ordered or run.spec).outlier_limit
    capped = outliers.cap_counts(counts, ticket_of, limit) if limit else counts
    share = averaging.shares_by_ticket(capped, ticket_of, cap=run.spec.max_weight_share)
    answered = {peer: update.metrics for peer, update in answers.items()}
    if limit:
        answered = outlier_limits.usual_metrics(answered, ticket_of)
    mean = _mean_metrics(list(answered.values()), [share[p] for p in answers], by_peers=limit > 0)
    means = evaluated_by(run, strategy, mean, total)
    # The cap on a peer's share applies to its tallies as well.
    scale = [share[peer] * total / counts[peer] for peer in answers]
    tallies = evaluation_counts.merge((update.tallies for update in answers.values()), scale)
    metrics = {**means, **evaluation_counts.compute_metrics(tallies)}
    if not limit:
        return Evaluation(metrics, tallies, {}, frozenset())
    decisive = outlier_limits.decisive_metrics(metrics, answers, ticket_of)
    return Evaluation(metrics, tallies, *decisive)


def evaluated_by(run: Run, strategy: Strategy, mean: Metrics, total: int) -> Metrics:
    """The metrics that the strategy makes of the mean over `total` examples."""
    reply = as_reply("evaluate", None, {**_finite(mean), "num-examples": total})
    with strategy_errors(run.spec.strategy):
        result = strategy.aggregate_evaluate(run.round - run.begun, [reply])
        return {
            name: float(value) if math.isfinite(value) else None
            for name, value in (result or {}).items()
            if isinstance(value, int | float)
        }


def _clip_factor(norm: float, max_norm: float) -> float:
    """The factor that scales an update with this norm down to `max_norm` (0: no bound)."""
    return max_norm / norm if max_norm and norm > max_norm else 1.0


def _finite(metrics: Metrics) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if value is not None}


def _mean_metrics(
    metrics: Sequence[Metrics], shares: Sequence[float], *, by_peers: bool = False
) -> Metrics:
    """The mean, by share, of metrics that are finite at peers with at least half of all shares.

    Other peers do not count: one diverging peer cannot hide a metric for everyone. `by_peers`: at
    half of the peers, so that a peer with a large share cannot hide it either.
    """
    means: Metrics = {}
    for name in sorted(set[str]().union(*metrics)):
        finite = [
            (value, share)
            for each, share in zip(metrics, shares, strict=True)
            if (value := each.get(name)) is not None
        ]
        held = 1.0 if len(finite) == len(metrics) else sum(share for _, share in finite)
        enough = 2 * len(finite) >= len(metrics) if by_peers and len(metrics) > 2 else held >= 0.5
        if enough and held:
            means[name] = sum(share * value for value, share in finite) / held
    return means
