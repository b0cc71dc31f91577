"""Which files go when an ended run is deleted. The ledger keeps the run's record."""

from __future__ import annotations

from collections.abc import Iterable, Set

from msgspec import Struct

from coordinator.runs import retention
from coordinator.runs.state import Run
from coordinator.storage.weight_store import WeightStore
from coordinator.strategies.state import StateStore


class Deletion(Struct, frozen=True, kw_only=True):
    """What the deletion of a run deletes from the disk: `nbytes` in all.

    `versions` and `states` (what its strategy remembers) are digests. `shared` versions stay, as
    another run keeps them. `in_use` versions are deleted when the jobs that use them have ended;
    `nbytes` counts them.
    """

    run: str
    versions: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    nbytes: int = 0
    shared: tuple[str, ...] = ()
    in_use: tuple[str, ...] = ()


def plan(run: Run, kept: Set[str], store: WeightStore) -> Deletion:
    """What there is to delete of a run. `kept`: digests that other runs keep."""
    states = StateStore(store.states)
    versions = set(filter(store.has, retention.all_versions(run)))
    remembered = {d for d in retention.all_states(run) if states.path(d).exists()} - kept
    unshared = versions - kept
    nbytes = sum(map(store.nbytes, unshared))
    nbytes += sum(states.path(digest).stat().st_size for digest in remembered)
    return Deletion(
        run=run.id,
        versions=tuple(sorted(d for d in unshared if not store.is_pinned(d))),
        states=tuple(sorted(remembered)),
        nbytes=nbytes,
        shared=tuple(sorted(versions & kept)),
        in_use=tuple(sorted(filter(store.is_pinned, unshared))),
    )


def execute(deletion: Deletion, store: WeightStore) -> None:
    """Delete the files; those that a job uses, when it has ended."""
    for digest in (*deletion.versions, *deletion.in_use):
        store.drop(digest)
    StateStore(store.states).drop(deletion.states)


def format_deletion(deletion: Deletion) -> str:
    """The deletion as sentences for a person."""
    lines = [
        f"{deletion.run}: {_count(deletion.versions, 'version')} and "
        f"{_count(deletion.states, 'strategy state')}, {deletion.nbytes / 1e6:,.1f} MB in all"
    ]
    if deletion.in_use:
        used = _count(deletion.in_use, "more version")
        lines.append(f"deleted when the jobs that use them have ended: {used}")
    if deletion.shared:
        lines.append(f"kept, as other runs need them: {_count(deletion.shared, 'version')}")
    return "\n".join(lines)


def _count(digests: Iterable[str], what: str) -> str:
    number = len(tuple(digests))
    return f"{number} {what}{'' if number == 1 else 's'}"
