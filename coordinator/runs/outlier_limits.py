"""Applies the limits on outliers (`strategies.outliers`) to the updates of a round."""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence

from coordinator.runs.state import Run
from coordinator.storage.run_events import Update
from coordinator.strategies import outliers
from protocols.messages.envelope import Metrics
from protocols.model import personalization
from protocols.model.weights import WeightReader
from protocols.tables import evaluation_counts

#: How many closed rounds a round of few updates is compared with.
_MAX_EARLIER_ROUNDS = 5
#: An update that the limit on norms has shrunk is judged by its own norm, up to this many times
#: the limit.
_MAX_ENLARGED = 1e6


#: A mean is reported if it differs from the middle by more than this share of it.
_TOLD_FROM = 0.05
#: Metrics of all examples that need not lie between those of the peers.
_POOLED = frozenset({"balanced_accuracy", "macro_f1", "ece", "auc", "average_precision"})


def usual_metrics(
    metrics: Mapping[str, Metrics], ticket_of: Callable[[str], str]
) -> dict[str, Metrics]:
    """The metrics of each peer, without those that only a minority of the voters has reported.

    One peer must not add a metric that decides.
    """
    voter_of = dict(zip(metrics, outliers.voters(list(metrics), ticket_of), strict=True))
    reporting = {voter_of[peer] for peer, told in metrics.items() if told}
    if len(reporting) < outliers.MIN_VOTERS:
        return dict(metrics)
    by_name: dict[str, set[str]] = {}
    for peer, told in metrics.items():
        for name in told:
            by_name.setdefault(name, set()).add(voter_of[peer])
    return {
        peer: {n: v for n, v in told.items() if 2 * len(by_name[n]) > len(reporting)}
        for peer, told in metrics.items()
    }


def decisive_metrics(
    metrics: Metrics, answers: Mapping[str, Update], ticket_of: Callable[[str], str]
) -> tuple[Metrics, frozenset[str]]:
    """The values that decide instead of those in `metrics`: means of the voters in the middle.

    One peer of three or more hardly moves them. The second result names the metrics that are far
    from all voters in the middle, so that a few peers have made them what they are.
    """
    decisive: Metrics = {}
    doubtful = set()
    told = {
        peer: {**evaluation_counts.compute_metrics(answer.tallies), **answer.metrics}
        for peer, answer in answers.items()
    }
    for name, mean in metrics.items():
        values = {peer: v for peer, each in told.items() if (v := each.get(name)) is not None}
        if mean is None:
            continue
        voter_of = outliers.voters(list(values), ticket_of)
        if middle := outliers.values_in_the_middle(list(values.values()), voter_of):
            decides = sum(middle) / len(middle)
            decisive[name] = decides
            beyond = max(middle[0] - mean, mean - middle[-1])
            usual = max(middle[-1] - middle[0], _TOLD_FROM * abs(decides))
            if name not in _POOLED and beyond > usual:
                doubtful.add(name)
    return decisive, frozenset(doubtful)


class OutlierLimits:
    """The limits on outliers among the updates of `peers` (`strategies.outliers`).

    Without `outlier_limit`, or with fewer than three voters, nothing is changed. `limited`: the
    peers for which something was, and how many times the median they pull.
    """

    def __init__(self, run: Run, peers: list[str], ticket_of: Callable[[str], str]) -> None:
        self._run, self._peers, self._ticket_of = run, peers, ticket_of
        self._limit = run.spec.outlier_limit
        self._voter_of = outliers.voters(peers, ticket_of)
        self._is_on = self._limit > 0 and len(set(self._voter_of)) >= outliers.MIN_VOTERS
        self._factors = [1.0] * len(peers)
        self.limited: dict[str, float] = {}

    def norm_factors(self, updates: Sequence[Update]) -> list[float]:
        """The factors that bring all norms to `limit` times the median norm of the round.

        A round of fewer than three voters is compared with other peers in the rounds before.
        """
        peers, norms = list(self._peers), [update.norm for update in updates]
        if self._limit and not self._is_on:
            for closed in self._run.history[: -_MAX_EARLIER_ROUNDS - 1 : -1]:
                earlier = {p: n for p, n in closed.norms.items() if p not in peers}
                peers += earlier
                norms += earlier.values()
        voter_of = outliers.voters(peers, self._ticket_of)
        if not self._limit or len(set(voter_of)) < outliers.MIN_VOTERS:
            return [1.0] * len(updates)
        factors = outliers.norm_factors(norms, voter_of, self._limit)[: len(updates)]
        self._factors = factors
        for peer, factor in zip(self._peers, factors, strict=True):
            if factor < 1.0:
                self._note(peer, self._limit / factor if factor else math.inf)
        return factors

    def shares(
        self,
        shares: list[float],
        readers: Sequence[WeightReader],
        scale: Sequence[float],
        base: WeightReader,
        updates: Sequence[Update],
    ) -> list[float]:
        """The shares with which no voter pulls further than `limit` times the median voter."""
        if not self._is_on:
            return shares
        groups = [
            [name for name in base.schema if personalization.is_control(name) is controls]
            for controls in (False, True)
        ]
        # No peer knows the digests of all others, so none knows which blocks are a sample.
        seed = int(hashlib.sha256("".join(u.digest for u in updates).encode()).hexdigest(), 16)
        # As they were sent, so that an enlarged update counts less than one that is at the limit;
        # but an enormous one has no finite products.
        sent = [
            by * min(1.0 / factor, _MAX_ENLARGED) if factor else 0.0
            for by, factor in zip(scale, self._factors, strict=True)
        ]
        matrices = [outliers.products(readers, sent, base, each, seed) for each in groups if each]
        limited = outliers.limit_shares(shares, self._voter_of, matrices, self._limit)
        for peer, voter in zip(self._peers, self._voter_of, strict=True):
            if voter in limited.pulls:
                self._note(peer, limited.pulls[voter])
        return limited.shares

    def at_most(self, values: Sequence[float]) -> Sequence[float]:
        """The values, none above `limit` times their median."""
        if not self._is_on:
            return values
        most = self._limit * outliers.median_by_voter(values, self._voter_of)
        for peer, value in zip(self._peers, values, strict=True):
            if value > most:
                self._note(peer, self._limit * value / most if most else math.inf)
        return [min(value, most) for value in values]

    def _note(self, peer: str, times: float) -> None:
        # The ledger has no infinity.
        self.limited[peer] = min(max(times, self.limited.get(peer, 0.0)), sys.float_info.max)
