"""Deletes the files of an ended run. The ledger keeps the run's record."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Set
from typing import Annotated

from msgspec import Meta, Struct

from coordinator.runs import retention
from coordinator.runs.apps import rules
from coordinator.runs.state import Run
from coordinator.storage.weight_store import WeightStore
from coordinator.strategies.state import StateStore
from protocols.messages.envelope import Count

_Line = Annotated[str, Meta(max_length=64 * 1024)]
_Digests = Annotated[tuple[_Line, ...], Meta(max_length=1 << 20)]


class Deletion(Struct, frozen=True, kw_only=True):
    """What the deletion of a run removes from the disk: `nbytes` in total.

    All fields but `run` and `nbytes` are digests. `states` are those of the strategy. `shared`
    versions stay, because other runs keep them. `in_use` versions are deleted when the jobs that
    use them have ended, and `nbytes` includes them.
    """

    run: _Line
    versions: _Digests = ()
    states: _Digests = ()
    nbytes: Count = 0
    shared: _Digests = ()
    in_use: _Digests = ()


def plan(run: Run, protected: Set[str], store: WeightStore) -> Deletion:
    """The deletion of a run. `protected`: digests that other runs keep."""
    states = StateStore(store.states)
    versions = set(filter(store.has, retention.all_versions(run)))
    unshared_states = {d for d in retention.all_states(run) if states.path(d).exists()} - protected
    unshared = versions - protected
    nbytes = sum(map(store.nbytes, unshared))
    nbytes += sum(states.path(digest).stat().st_size for digest in unshared_states)
    return Deletion(
        run=run.id,
        versions=tuple(sorted(d for d in unshared if not store.is_pinned(d))),
        states=tuple(sorted(unshared_states)),
        nbytes=nbytes,
        shared=tuple(sorted(versions & protected)),
        in_use=tuple(sorted(filter(store.is_pinned, unshared))),
    )


def execute(deletion: Deletion, store: WeightStore) -> None:
    """Delete the files. Those that a job uses are deleted when it has ended."""
    for digest in (*deletion.versions, *deletion.in_use):
        store.drop(digest)
    StateStore(store.states, store.state_mirror).drop(deletion.states)
    shutil.rmtree(rules.folder_of(store.home, deletion.run), ignore_errors=True)


def format_deletion(deletion: Deletion) -> str:
    """The deletion as text for a person."""
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
