"""Makes a version and metrics from the sum of a cohort's masked updates."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import numpy as np
from flwr.serverapp.strategy import Strategy

from coordinator import strategies
from coordinator.runs import aggregation, best_version
from coordinator.runs.aggregation import CommittedVersion, Evaluation
from coordinator.runs.state import Run
from coordinator.storage.run_events import PrivacySpent
from coordinator.storage.weight_store import WeightStore
from coordinator.strategies.runner import Aggregation, InputUpdate
from coordinator.strategies.state import StateStore
from coordinator.strategies.version_noise import VersionNoise
from protocols.codecs import sums
from protocols.codecs.delta import FlatLayout
from protocols.errors import BadWeights, CohortLost
from protocols.messages.envelope import Metrics
from protocols.model import weights
from protocols.model.bfloat16 import difference
from protocols.model.weights import Array, Part, WeightReader, Weights
from protocols.model.weights_file import WeightsFile
from protocols.privacy.secagg import ring, tails
from protocols.privacy.secagg.aggregator import Aggregator
from protocols.privacy.secagg.masked_file import SecureMean
from protocols.privacy.secagg.recovery import recover
from protocols.tables import evaluation_counts
from protocols.tables.trees.layout import SUMS

#: Elements of the mean that are unmasked at once: opening the key streams costs little then.
_AHEAD_ELEMENTS = 1 << 20
#: Relative: float32 has fewer digits than the norm. Absolute: sums of metrics are rounded.
_FLOAT_SLACK, _SUM_SLACK = 1e-4, 1e-3
_AGAIN = "the coordinator asks all peers to train again, with new keys"


class SecureVersion(NamedTuple):
    """A new version, and other results of the sum.

    `largest`: of each averaged tensor, the largest change. `false_shares`: owner and holder of
    each share that does not fit the others; one of the two has lied.
    """

    version: CommittedVersion
    largest: list[float]
    false_shares: frozenset[tuple[str, str]]


class CheckedMean:
    """The weights of a SecureMean, read ahead, and measured and checked on the way.

    Each element must be read once, in file order. Raises CohortLost if the mean cannot be one of
    honest peers: at its last element for the norm `max_norm`.
    """

    def __init__(self, mean: WeightReader, base: WeightReader, max_norm: float) -> None:
        self.schema = mean.schema
        self._mean, self._base, self._max_norm = mean, base, max_norm
        self._part = Part("", 0, 0)
        self._array: Array = np.empty(0, np.uint8)
        self._squares = 0.0
        self._fields = FlatLayout(mean.schema).fields
        self._largest = dict.fromkeys(self._fields, 0.0)

    def read(self, part: Part) -> Array:
        """The elements of a part, flat, in the tensor's dtype (bf16 as uint16)."""
        ahead = self._part
        if part.name != ahead.name or part.start < ahead.start or part.stop > ahead.stop:
            size = math.prod(self.schema[part.name].shape)
            stop = max(part.stop, min(size, part.start + _AHEAD_ELEMENTS))
            self._part = ahead = Part(part.name, part.start, stop)
            try:
                self._array = self._mean.read(ahead)
            except BadWeights as err:
                raise CohortLost(err.message, _AGAIN) from err
            if (field := self._fields.get(part.name)) is not None:
                self._measure(part.name)
                if field.start + stop == self._count:
                    self._check_norm()
        return self._array[part.start - ahead.start : part.stop - ahead.start]

    @property
    def _count(self) -> int:
        last = next(reversed(self._fields.values()))
        return last.start + math.prod(self.schema[last.name].shape)

    def _measure(self, name: str) -> None:
        dtype, new, old = self.schema[name].dtype, self._array, self._base.read(self._part)
        if not weights.is_finite(new, dtype):
            raise CohortLost(f"the sum of the updates is too large for tensor {name!r}", _AGAIN)
        change = difference(new, old, dtype)
        self._squares += float(np.einsum("i,i->", change, change))
        self._largest[name] = max(self._largest[name], float(np.abs(change, out=change).max()))

    def _check_norm(self) -> None:
        if (norm := math.sqrt(self._squares)) > self._max_norm:
            raise CohortLost(
                f"the mean of the masked updates has the norm {norm:.4g}, but each peer scales its "
                f"own to at most {self._max_norm:.4g}: the sum is outside of what honest peers can "
                "send",
                _AGAIN,
            )

    @property
    def largest(self) -> list[float]:
        """By averaged tensor: the largest absolute change of an element."""
        return list(self._largest.values())


class ExactSums:
    """The sums of all survivors, as an update. Raises CohortLost if the sums of `rows` rows cannot
    be those of honest peers."""

    largest: tuple[float, ...] = ()

    def __init__(self, mean: SecureMean, base: WeightReader, rows: int) -> None:
        self._sums = Weights({SUMS: mean.sums()})
        self.schema = self._sums.schema
        if why := sums.objection(self, base, rows, masked=True):
            raise CohortLost(f"the sum of the masked updates has {why}", _AGAIN)

    def read(self, part: Part) -> Array:
        """The elements of a part, flat."""
        return self._sums.read(part)


def _largest_norm(of: Aggregator) -> float:
    """The largest norm of an honest change: that of the plan, and what rounding can add."""
    plan, step = of.cohort.plan, 1.0 / ring.max_value(of.cohort.bits)
    rounding = sum(
        size * (limit * step) ** 2 for size, limit in zip(plan.sizes, plan.limits, strict=True)
    )
    return plan.clip * (1 + _FLOAT_SLACK) + math.sqrt(rounding)


def commit(
    run: Run, store: WeightStore, states: StateStore, strategy: Strategy, of: Aggregator
) -> SecureVersion:
    """Aggregate the sum. Stores the version and the strategy's new state durably.

    Raises CohortLost if the sum cannot be known, or is none that honest peers can have sent.
    """
    recovery, spec = recover(of), run.spec
    num_examples = sum(update.num_examples for update in run.updates.values())
    with contextlib.ExitStack() as stack:
        path = store.version_path(run.head)
        base, origin, *others = (stack.enter_context(WeightsFile(path)) for _ in range(4))
        mean = SecureMean(of.cohort, recovery, _open_masked(of, store, stack), others[0])
        metrics, _ = _metrics(run, of, mean)
        checked = (
            ExactSums(mean, base, num_examples)
            if of.cohort.plan.exact
            else CheckedMean(mean, others[1], _largest_norm(of))
        )
        noise: VersionNoise | None = None
        spent: tuple[PrivacySpent, ...] = ()
        scale = 1.0
        if spec.private_versions is not None:
            updates = sorted(run.updates.items())
            noise, event = aggregation.noise_of(run, store, updates, _largest_norm(of))
            spent, metrics = (event,), {}  # the noise does not cover the metrics
            # The sum of the changes, which peers have clipped, divided by the fixed number.
            scale = len(of.survivors) / event.peers
        if divisor := of.cohort.plan.divisor:
            # The mean over all rows of the survivors.
            rows = sum(of.cohort.cards[peer].examples for peer in of.survivors)
            scale = len(of.survivors) * divisor / max(rows, 1)
        aggregation_ = Aggregation(
            strategies.find(spec.strategy),
            strategy,
            spec.strategy_args,
            run.round - run.begun,
            base,
            origin,
            [InputUpdate(checked, 1.0, scale, num_examples, {})],
            aggregation.metrics_for_all(run, metrics, num_examples, len(of.survivors)),
            states,
            run.strategy_state,
            noise.of if noise else None,
            tuple(of.survivors),
        )
        digest = aggregation.store_version(store, aggregation_)
    version = CommittedVersion(digest, metrics, aggregation_.new_state, {}, spent)
    return SecureVersion(version, list(checked.largest), recovery.false_shares)


def evaluate(run: Run, store: WeightStore, strategy: Strategy, of: Aggregator) -> Evaluation:
    """The metrics of a secure evaluation. Raises CohortLost."""
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(WeightsFile(store.version_path(run.head)))
        files = _open_masked(of, store, stack)
        mean, tallies = _metrics(run, of, SecureMean(of.cohort, recover(of), files, base))
    num_examples = sum(update.num_examples for update in run.updates.values())
    means = aggregation.evaluated_by(run, strategy, mean, num_examples)
    metrics = {**means, **evaluation_counts.compute_metrics(tallies)}
    return Evaluation(metrics, tallies, {}, frozenset())


def _open_masked(
    of: Aggregator, store: WeightStore, stack: contextlib.ExitStack
) -> dict[str, WeightsFile]:
    return {
        peer: stack.enter_context(store.uploads.open(peer, of.uploads[peer]))
        for peer in of.survivors
    }


def _metrics(run: Run, of: Aggregator, mean: SecureMean) -> tuple[Metrics, dict[str, list[float]]]:
    """The mean metrics and the summed tallies. What no honest peers can have sent is left out."""
    metrics, tallies = tails.means(of.cohort.plan.names, mean.metrics())
    for name, value in metrics.items():
        least, most = best_version.bounds_of(run.spec.task, name)
        if value is not None:
            is_likely = least - _SUM_SLACK <= value <= most + _SUM_SLACK
            metrics[name] = min(most, max(least, value)) if is_likely else None
    summed = {
        name: [max(0.0, n) if abs(n) < _SUM_SLACK else n for n in tally]
        for name, tally in tails.known(tallies, len(of.cohort.peers)).items()
    }
    num_examples = sum(update.num_examples for update in run.updates.values())
    return metrics, {} if evaluation_counts.validate(summed, num_examples) else summed
