"""Carries out the rounds of a run: opens them, aggregates their updates, closes them."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping, Set

from coordinator.runs import (
    aggregation,
    best_version,
    decisions,
    late_updates,
    model_choice,
    steps,
)
from coordinator.runs.messages import round_body
from coordinator.runs.parts import RunParts
from coordinator.runs.retention import Retention
from coordinator.runs.secure.sums import SecureSums
from coordinator.runs.state import Run
from coordinator.storage import noise_key, run_events
from coordinator.strategies import memory_estimate
from coordinator.strategies.state import StateStore
from protocols.local.failpoints import failpoint
from protocols.privacy.user_level import FEW_PEERS


class Rounds:
    """The rounds of one run. `sums`: of a secure run. `protected_digests()`: versions and states
    that other runs keep."""

    def __init__(
        self, parts: RunParts, sums: SecureSums, protected_digests: Callable[[], Set[str]]
    ) -> None:
        self._parts, self._ctx, self._sums = parts, parts.ctx, sums
        self._recorder, self._requests, self._timer = parts.recorder, parts.requests, parts.timer
        self._states = StateStore(parts.ctx.store.states, parts.ctx.store.state_mirror)
        self._retention = Retention(parts.recorder.run, parts.ctx.store, protected_digests)
        self._bytes_at_open = (0, 0)
        self._memory_checked = False
        self._was_doubtful = False

    @property
    def on_disk(self) -> Set[str]:
        """Digests of the run's versions, including older ones that peers still train on."""
        return self._retention.on_disk

    async def open(self, step: steps.OpenRound) -> None:
        run = self._recorder.run
        if not self._memory_checked:  # once per start: the number of peers is known now
            self._memory_checked = True
            self._recorder.memory_bytes, warning = memory_estimate.check_memory(
                self._parts.adapter, run.spec, self._parts.model.schema, len(step.eligible)
            )
            if warning:
                self._recorder.report("warning", warning)
            if run.spec.private_versions and len(step.eligible) < FEW_PEERS:
                text = f"noise for whole peers usually hides the model below {FEW_PEERS} peers"
                self._recorder.report("warning", f"run {run.id}: {text}")
            if self._parts.adapter.feed == "sums" and not run.spec.secure:
                text = f"{model_choice.NO_HESSIANS}: docs/tables.md says why"
                self._recorder.report("info", f"run {run.id}: {text}")
        self._timer.open_round()
        transfer = self._ctx.transfer
        self._bytes_at_open = (transfer.bytes_up, transfer.bytes_down)
        asked: tuple[str, ...] = ()
        if not run.buffered:  # there each peer has an assignment of its own
            chosen = decisions.select_peers(run, step.round, step.eligible)
            asked = await self._requests.configure(run, chosen, opening=step.round)
        failpoint("round.configured")
        await self._recorder.record(
            run_events.RoundOpened(step.round, step.base, asked, len(step.eligible))
        )

    async def aggregate(self, contributors: tuple[str, ...]) -> None:
        run, store, model = self._recorder.run, self._ctx.store, self._parts.model
        version: aggregation.CommittedVersion | None
        if run.spec.secure:
            if (version := await self._sums.commit(self._states)) is None:
                return
        else:
            version = await asyncio.to_thread(
                aggregation.commit,
                run,
                store,
                self._states,
                self._parts.strategy,
                contributors,
                self._ctx.ticket_of,
            )
        await self._recorder.record(
            *version.spent,
            run_events.VersionCommitted(
                run.round,
                version.digest,
                run.head,
                contributors,
                version.metrics,
                version.state,
                version.limited,
            ),
        )
        self._report_limited(run, version.limited)
        store.mark_recorded(version.digest)
        if run.buffered:
            self.drop_unused_uploads({accepted.peer for accepted in run.buffer})
        else:
            late = self._requests.late_bases(self._recorder.run) if run.folds_late else {}
            store.uploads.clear(keep_of=late.keys())
            failpoint("updates.dropped")
        await asyncio.to_thread(model.make_patch, run.head, version.digest)
        self._requests.clear_work()

    def _report_limited(self, run: Run, limited: Mapping[str, float]) -> None:
        """Report the peers whose updates count less, each once in a run."""
        for peer in sorted(limited.keys() - run.limited):
            limit = f"the limit is {run.spec.outlier_limit:g} (--outlier-limit)"
            text = (
                f"{self._ctx.name_of(peer)} counts less in round {run.round}: it pulls the version "
                f"{limited[peer]:.3g} times as far as the median peer, and {limit}"
            )
            self._recorder.report("warning", text, peer)

    def _report_doubtful(self, run: Run, doubtful: Set[str]) -> None:
        """Report that a few peers have moved the mean that people read, when it begins."""
        closed = run.history[-1]
        name = best_version.metric_of(run.spec, closed.metrics)
        before, self._was_doubtful = self._was_doubtful, name in doubtful
        if name not in doubtful or before:
            return
        least, median, most = closed.spread.get(name, (math.nan,) * 3)
        text = (
            f"round {closed.round}: the mean {name} is {closed.metrics[name]:.4g}, but the median "
            f"over the peers is {median:.4g} ({least:.4g} to {most:.4g}): a few peers make the "
            f"difference. The best version is chosen by {closed.decisive[name]:.4g}, the mean of "
            "the peers in the middle"
        )
        self._recorder.report("warning", text)

    def drop_unused_uploads(self, peers: set[str]) -> None:
        """Delete uploads that do not count. Peers that are training keep theirs."""
        run = self._recorder.run
        for peer in peers - run.assignments.keys():
            counted = {a.update.digest for a in run.buffer if a.peer == peer}
            self._ctx.store.uploads.keep_only(peer, counted)

    async def close(self) -> None:
        run, transfer = self._recorder.run, self._ctx.transfer
        if run.cohort is not None:
            if (evaluation := await self._sums.evaluate()) is None:
                return
        else:
            evaluation = aggregation.aggregate_evaluation(
                run, self._parts.strategy, self._ctx.ticket_of
            )
        event = run_events.RoundClosed(
            run.round,
            evaluation.metrics,
            self._timer.round_s,
            transfer.bytes_up - self._bytes_at_open[0],
            transfer.bytes_down - self._bytes_at_open[1],
            self._timer.phase_seconds(),
            evaluation.tallies,
            evaluation.decisive,
        )
        self._requests.clear_work()
        if run.spec.private_versions is not None:
            noise_key.forget(self._ctx.store.home)
        if run.buffered:  # training continues, but another version is evaluated next
            self._requests.cancel(lambda r: r.kind == "evaluate")
        else:
            self._requests.cancel(lambda r: late_updates.is_expired(run, r.kind, r.round))
        await self._recorder.record(event)
        if run.spec.secure:
            self._ctx.store.uploads.clear()
        run = self._recorder.run
        self._report_doubtful(run, evaluation.doubtful)
        self._ctx.publish(round_body(run.id, run.history[-1]))
        self.prune()

    def prune(self) -> None:
        """Delete the versions and states that the run does not need any more."""
        run = self._recorder.run
        self._retention.prune(run, self._requests.late_bases(run).values())
