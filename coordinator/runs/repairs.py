"""Repairs a run that continues after a restart, if its files are damaged or missing."""

from __future__ import annotations

import asyncio

from coordinator.runs import candidates, retention, steps
from coordinator.runs.recorder import RunRecorder
from coordinator.runs.rollback import present
from coordinator.runs.secure.sums import SecureSums
from coordinator.runs.state import accepted_uploads
from coordinator.storage import run_events
from coordinator.storage.weight_store import WeightStore
from protocols.messages.states import RunState


async def repair(recorder: RunRecorder, store: WeightStore, sums: SecureSums) -> None:
    """Return the run to what is on disk; end it if no version is intact."""
    run = recorder.run
    if run.head and not run.recalling:
        await _find_intact_version(recorder, store)
    if recorder.run.state in (RunState.TRAINING, RunState.AGGREGATING, RunState.EVALUATING):
        await _repeat_round_without_updates(recorder, store, sums)


async def _find_intact_version(recorder: RunRecorder, store: WeightStore) -> None:
    """Return to the newest version that is not damaged on disk; end if there is none."""
    run = recorder.run
    intact = await asyncio.to_thread(retention.newest_intact, run, store.verify_digest)
    if intact == run.head:
        return
    damage = f"version {run.head[:12]} is damaged on disk"
    if not intact and run.ordered is not None:
        recorder.report("warning", f"{damage}: run {run.id} begins this model again")
        again = steps.BeginModel(present(run).model, damage)
        await recorder.record(candidates.event(run, again))
        return
    if not intact:
        because = f"{damage}, and so are all earlier ones"
        await recorder.record(run_events.RunEnded(RunState.FAILED, because))
        return
    await recorder.record(run_events.VersionLost(run.head, intact))
    recorder.report("warning", f"{damage}: run {run.id} continues from {intact[:12]}")


async def _repeat_round_without_updates(
    recorder: RunRecorder, store: WeightStore, sums: SecureSums
) -> None:
    """Repeat the round if accepted updates are not on disk: a backup does not hold them."""
    run, path = recorder.run, store.uploads.path
    is_evaluating = run.state is RunState.EVALUATING
    if is_evaluating and not run.spec.secure:  # the version contains the others
        accepted = {(one.peer, one.update.digest) for one in run.buffer}
    else:
        accepted = accepted_uploads(run)
    if all(path(peer, digest).exists() for peer, digest in accepted):
        return
    if is_evaluating and run.spec.secure:
        await sums.lose("files of the evaluation are not on disk")
        return
    closed = run.own_rounds[-1].digest if run.own_rounds else run.first
    await recorder.record(run_events.VersionLost(run.head, closed))
    text = f"updates of run {run.id} are not on disk: round {run.round} is repeated"
    recorder.report("warning", text)
