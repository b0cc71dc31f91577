"""Which versions and strategy states stay on disk when a round has closed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set

from coordinator.runs import buffered
from coordinator.runs.state import Run
from coordinator.storage.run_events import Holding
from coordinator.storage.weight_store import WeightStore
from coordinator.strategies.state import StateStore
from protocols.failpoints import failpoint


def versions_to_keep(run: Run) -> set[str]:
    """Digests of the versions that a run keeps: the newest, as many as it wants, and the best."""
    keep = {run.head, run.parent, run.best.digest if run.best else ""}
    keep |= {closed.digest for closed in run.history[-run.spec.keep_versions :]}
    keep |= {given.base for given in run.assignments.values() if not buffered.is_stale(run, given)}
    keep |= {accepted.update.base for accepted in run.buffer}
    return keep - {""}


def states_to_keep(run: Run, versions: Set[str]) -> set[str]:
    """Digests of what the run's strategy remembers at these versions and now."""
    rounds = [*run.history, *((run.best,) if run.best else ())]
    states = {d for r in rounds if r.digest in versions for d in r.strategy_state.values()}
    return states | set(run.strategy_state.values())


def all_versions(run: Run) -> set[str]:
    """Digests of all versions that a run has begun with or made, and that its record names."""
    made = {closed.digest for closed in run.history}
    return (made | versions_to_keep(run) | {run.first}) - {""}


def all_states(run: Run) -> set[str]:
    """Digests of all that its strategy has remembered, as far as its record names it."""
    return states_to_keep(run, all_versions(run))


class Retention:
    """Deletes the versions and states that neither the run nor another one keeps.

    The ledger still names them. `elsewhere()`: digests that other runs keep at that time.
    """

    def __init__(
        self, run: Run, store: WeightStore, states: StateStore, elsewhere: Callable[[], Set[str]]
    ) -> None:
        self._store, self._states, self._elsewhere = store, states, elsewhere
        self.on_disk = {closed.digest for closed in run.history}

    def prune(self, run: Run, in_use: Iterable[str] = ()) -> None:
        """Drop the others. `in_use`: digests that peers still train on."""
        keep, elsewhere = versions_to_keep(run) | set(in_use), self._elsewhere()
        self.on_disk |= {run.head, run.parent}
        for digest in self.on_disk - keep - elsewhere:
            self._store.drop(digest)
        known = {d for r in run.history for d in r.strategy_state.values()}
        self._states.drop(known - states_to_keep(run, keep) - elsewhere)
        failpoint("round.pruned")
        self.on_disk &= keep


def newest_intact(run: Run, is_whole: Callable[[str], bool]) -> str:
    """The newest of a run's versions that is not damaged on disk; empty if there is none."""
    versions = (run.head, *(closed.digest for closed in reversed(run.history)), run.first)
    return next(filter(is_whole, dict.fromkeys(versions)), "")


def state_of(run: Run, version: Holding, store: WeightStore) -> dict[str, str]:
    """What the strategy remembered at a version, if all of it is on disk; else it begins anew."""
    for closed in run.history:
        if (closed.round, closed.digest) == (version.round, version.digest):
            states = StateStore(store.states)
            files = closed.strategy_state.values()
            return closed.strategy_state if all(states.path(d).exists() for d in files) else {}
    return {}
