"""Decides which versions and strategy states stay on disk, and deletes the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set

from coordinator.runs import buffered
from coordinator.runs.apps import leftovers, rules
from coordinator.runs.state import Run
from coordinator.storage.run_events import Holding
from coordinator.storage.weight_store import WeightStore
from coordinator.strategies.state import StateStore
from protocols.local.failpoints import failpoint


def versions_to_keep(run: Run) -> set[str]:
    """Digests of the versions that a run keeps: the newest `keep_versions`, the best, and bases."""
    keep = {run.head, run.parent, run.best.digest if run.best else ""}
    if not run.ended:  # the best model may change
        standings = (*(one.standing for one in run.trained), run.standing)
        keep |= {one.best.digest for one in standings if one.best is not None}
    keep |= {closed.digest for closed in run.history[-run.spec.keep_versions :]}
    keep |= {work.base for work in run.assignments.values() if not buffered.is_stale(run, work)}
    keep |= {accepted.update.base for accepted in run.buffer}
    return keep - {""}


def states_to_keep(run: Run, versions: Set[str]) -> set[str]:
    """Digests of the strategy's states at these versions and now."""
    rounds = [*run.history, *run.abandoned, *((run.best,) if run.best else ())]
    states = {d for r in rounds if r.digest in versions for d in r.strategy_state.values()}
    return states | set(run.strategy_state.values())


def all_versions(run: Run) -> set[str]:
    """Digests of all versions of a run that its record names."""
    committed = {closed.digest for closed in (*run.history, *run.abandoned)}
    first = {run.first, *(one.first for one in run.trained)}
    return (committed | versions_to_keep(run) | first) - {""}


def all_states(run: Run) -> set[str]:
    """Digests of all states of its strategy that its record names."""
    return states_to_keep(run, all_versions(run))


class Retention:
    """Deletes the versions and states of a run that no run keeps. The ledger still names them.

    `protected_digests()`: digests that other runs keep at the time.
    """

    def __init__(
        self,
        run: Run,
        store: WeightStore,
        protected_digests: Callable[[], Set[str]],
    ) -> None:
        self._store = store
        self._states = StateStore(store.states, store.state_mirror)
        self._protected_digests = protected_digests
        self.on_disk = all_versions(run) | leftovers.versions(rules.folder_of(store.home, run.id))

    def prune(self, run: Run, in_use: Iterable[str] = ()) -> None:
        """Delete what no run needs any more. `in_use`: bases of peers that still train."""
        keep, protected = versions_to_keep(run) | set(in_use), self._protected_digests()
        self.on_disk |= {run.head, run.parent} - {""}  # a single evaluation has no parent
        for digest in self.on_disk - keep - protected:
            self._store.drop(digest)
        rounds = (*run.history, *run.abandoned)
        known = {d for r in rounds for d in r.strategy_state.values()}
        self._states.drop(known - states_to_keep(run, keep) - protected)
        failpoint("round.pruned")
        self.on_disk &= keep


def newest_intact(run: Run, is_intact: Callable[[str], bool]) -> str:
    """The newest version of the run's present model that is intact on disk; empty if there is
    none."""
    versions = (run.head, *(closed.digest for closed in reversed(run.own_rounds)), run.first)
    return next(filter(is_intact, dict.fromkeys(versions)), "")


def state_of(run: Run, version: Holding, store: WeightStore) -> dict[str, str]:
    """The strategy's state at a version; empty if any of its files is missing."""
    for closed in run.history:
        if (closed.round, closed.digest) == (version.round, version.digest):
            states = StateStore(store.states)
            files = closed.strategy_state.values()
            return closed.strategy_state if all(states.path(d).exists() for d in files) else {}
    return {}
