"""Trains for the next round while the last update is on its way, and while a version is awaited.

Round r ends with weights of this peer's own, x. It trains for round r + 1 from them at once, to y,
and does not wait for version r. When that version is here, y is merged with it
(`protocols.model.late_merge`). The result is the update of round r + 1, and the training for round
r + 2 begins with it. So training and the exchange of weights take place at the same time, and the
training is one round late.

A run may exchange one fragment of the model in each round (`model.fragments`). Then version r has
a new value for the fragment of round r alone, and this peer's own weights stay in the others.

Files say whether a round has such a beginning, never the time. So the update is the same whether
the training ended before the version came, or began again after a kill.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from agent.clientapp.outbox import Outbox, settings_key
from agent.home.run_state import RunStatePaths
from agent.tasks.work import Done
from protocols.errors import BadWeights, TrainerFailed
from protocols.local.atomic_files import fsync_files
from protocols.messages.work import Work
from protocols.model.fragments import Fragment, Spliced
from protocols.model.late_merge import LateMerge
from protocols.model.weights import WeightReader, check_finite, check_schema
from protocols.model.weights_file import WeightsFile, WeightsWriter

log = logging.getLogger("commonweight.agent")

#: Trains the work from the weights in a file, into a file, with the peer's own part of the model.
Train = Callable[[Work, Path, Path, RunStatePaths | None], Done]
#: How often the cancellation of a training is repeated: it may not have begun, or may be about to
#: retry.
_CANCEL_EVERY_S = 0.2


class _Job(NamedTuple):
    """Training in the background: its run, the name of its beginning, and its result."""

    run: str
    start: str
    result: Future[Done]


class TrainingAhead:
    """The rounds that begin before their version is here, of one run at a time.

    Unless `in_background`, `begin` does nothing, and `finish` trains. The results are the same.
    `cancel()` ends the training in progress. `on_ahead(work | None)`: as in `Observer`.
    """

    def __init__(
        self,
        outbox: Outbox,
        train: Train,
        cancel: Callable[[], None],
        on_ahead: Callable[[Work | None], None],
        *,
        in_background: bool,
    ) -> None:
        self._outbox, self._train = outbox, train
        self._cancel, self._on_ahead = cancel, on_ahead
        self._trained = outbox.folder / "ahead.safetensors"
        self._kept = outbox.folder / "ahead.kept"
        self._thread = ThreadPoolExecutor(1, "ahead") if in_background else None
        self._job: _Job | None = None

    def has_begun(self, work: Work, columns: Sequence[str], base: Path) -> bool:
        """True if the round of this work begins with weights of this peer's own."""
        if self._outbox.running.is_empty:
            return False
        start = self._start_of(work, columns)
        try:
            with WeightsFile(start) as own, WeightsFile(base) as version:
                check_schema(own.schema, version.schema)
        except FileNotFoundError:
            return False
        except BadWeights as err:
            log.warning("training begins with the version: own weights are damaged: %s", err)
            start.unlink()
            return False
        return True

    def finish(self, work: Work, columns: Sequence[str], base: Path, out: Path) -> Done:
        """Wait for the training of this round, and write the weights that `base` and it make.

        Raises TrainerFailed, BadWeights, OSError.
        """
        start = self._start_of(work, columns)
        done = self._result_of(start) or self._do(work, start)
        if (personal := self._outbox.personal_paths(work)) is not None:
            os.replace(self._kept, personal.next)
        with (
            WeightsFile(self._trained) as new,
            WeightsFile(start) as old,
            WeightsFile(base) as version,
            WeightsWriter(out, version.schema, synced=False) as file,
        ):
            file.write_all(self._merged(work, new, old, version))
        self._trained.unlink()
        return replace(done, digest=file.digest, nbytes=file.nbytes)

    def _result_of(self, start: Path) -> Done | None:
        """The result of the background training from these weights. None if it began with others,
        or was cancelled."""
        if self._job is None or self._job.start != start.name:
            self.cancel()
            return None
        job, self._job = self._job, None
        was_done = job.result.done()
        try:
            return job.result.result()
        except TrainerFailed as err:
            if err.kind == "cancelled" and was_done:
                return None
            raise

    def end_others(self, run: str) -> None:
        """Cancel training for another run than this one, which asks for work now."""
        if self._job is not None and self._job.run != run:
            self.cancel()

    def cancel(self) -> None:
        """Cancel the training in the background, and wait for its end."""
        job, self._job = self._job, None
        while job is not None and not job.result.done():
            self._cancel()
            wait([job.result], _CANCEL_EVERY_S)

    def _merged(
        self, work: Work, new: WeightReader, old: WeightReader, version: WeightReader
    ) -> WeightReader:
        """The trained weights, merged with what the last round has brought to the version."""
        exchanged = Fragment.of_round(work.fragments, work.round - 1).names(version.schema)
        return Spliced(exchanged, LateMerge(new, old, version), new)

    def keep(self, work: Work, columns: Sequence[str], weights: Path, digest: str) -> None:
        """Keep these weights for the next round, once the update with this digest is in the outbox.

        A training that diverged is not kept, so the next one begins with the version. Raises
        OSError.
        """
        try:
            with WeightsFile(weights) as own:
                check_finite(own)
        except BadWeights as err:
            log.warning("the next round begins with its version: %s", err.message)
            return
        name = _name(work, columns, work.round)
        following = self._outbox.running.paths(name).next
        following.unlink(missing_ok=True)
        try:
            os.link(weights, following)
        except OSError:  # not on all file systems
            shutil.copyfile(weights, following)
        fsync_files(following)
        self._outbox.running.stage(name, digest)

    def begin(self, work: Work, columns: Sequence[str]) -> bool:
        """Train for the round after this one in the background, if weights are kept for it.

        The reply to `work` is in the outbox.
        """
        following = replace(work, round=work.round + 1)
        start = self._start_of(following, columns)
        if self._thread is None or not start.exists():
            return False
        if self._job is None or self._job.start != start.name:
            self._outbox.running.keep_only(_name(work, columns, work.round))
            result = self._thread.submit(self._do_ahead, following, start)
            self._job = _Job(work.run, start.name, result)
        return True

    def close(self) -> None:
        """Wait for the end of the thread, as the next agent uses its files. The trainer has been
        stopped."""
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)

    def _do_ahead(self, work: Work, start: Path) -> Done:
        self._on_ahead(work)
        try:
            return self._do(work, start)
        finally:
            self._on_ahead(None)

    def _do(self, work: Work, start: Path) -> Done:
        personal = self._outbox.personal_paths(work)
        own = RunStatePaths(personal.file, self._kept) if personal else None
        return self._train(work, start, self._trained, own)

    def _start_of(self, work: Work, columns: Sequence[str]) -> Path:
        """Where the weights are, if they exist, with which the round of this work begins."""
        return self._outbox.running.paths(_name(work, columns, work.round - 1)).file


def _name(work: Work, columns: Sequence[str], number: int) -> str:
    """The name of this peer's weights after a round. With other settings, it finds none."""
    return f"{work.run} {number} {work.turn} {settings_key(work, columns)}"
