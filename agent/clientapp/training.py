"""The part of a client that trains: lets the trainer work, and encodes the update."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from msgspec.structs import replace

from agent.clientapp import trainer_work
from agent.clientapp.interfaces import Observer
from agent.clientapp.outbox import Outbox
from agent.clientapp.training_ahead import TrainingAhead
from agent.data.settings import Floors
from agent.home.run_state import RunStatePaths
from agent.tasks import floors as owner_floors
from agent.tasks.work import Done, Trainer
from protocols.codecs import registry
from protocols.codecs.registry import Codec, Encoded
from protocols.local.atomic_files import fsync_files
from protocols.messages.work import Work
from protocols.model.fragments import Fragment
from protocols.model.weights_file import WeightsFile, WeightsWriter


class Training:
    """Training and evaluations by `trainer`, with results in `outbox`.

    `floors`: as in `OwnerRules`. `observer` gets training ahead, and the time of each training.
    """

    def __init__(
        self,
        trainer: Trainer,
        outbox: Outbox,
        floors: Floors = Floors(),
        observer: Observer = Observer(),
    ) -> None:
        self.trainer, self._outbox, self._floors = trainer, outbox, floors
        self._on_time = observer.on_time
        self._ahead = TrainingAhead(
            outbox,
            self._run,
            trainer.cancel_training,
            observer.on_ahead,
            in_background=trainer.trains_ahead,
        )
        self.begin_next, self.end_others = self._ahead.begin, self._ahead.end_others
        self.close = self._ahead.close

    def do(self, work: Work, base: Path, out: Path, personal: RunStatePaths | None) -> Done:
        """Do the work from the weights in `base`; new ones go to `out`. Raises TrainerFailed."""
        return self._checked(work, self._run(work, base, out, personal))

    def _run(self, work: Work, base: Path, out: Path, personal: RunStatePaths | None) -> Done:
        return self.trainer.run(trainer_work.of(work, base, out, personal))

    def _checked(self, work: Work, done: Done) -> Done:
        if work.kind == "train":
            owner_floors.check_examples(work.task, done.num_examples, self._floors)
            self._on_time(work, done.seconds)
        if not work.scores and "scores" in done.tallies:
            told = {name: tally for name, tally in done.tallies.items() if name != "scores"}
            return replace(done, tallies=told)
        return done

    def train(
        self, work: Work, base: Path, personal: RunStatePaths | None, columns: Sequence[str]
    ) -> Done:
        """Train, and write the update in the run's codec to the outbox."""
        codec, update = registry.parse_in_work(work.codec), self._outbox.update
        fragment = Fragment.of_round(work.fragments, work.round)
        is_encoded = codec.encoding is not None or not fragment.is_whole
        trained = self._outbox.trained if is_encoded else update
        try:
            if self._ahead.has_begun(work, columns, base):
                done = self._checked(work, self._ahead.finish(work, columns, base, trained))
            else:
                done = self.do(work, base, trained, personal)
            if is_encoded:
                encoded = self._encode(codec, work, trained, base, fragment)
                done = replace(done, digest=encoded.digest, nbytes=encoded.nbytes, tallies={})
            if work.ahead:
                fsync_files(update)  # before the state that stays here changes
                self._ahead.keep(work, columns, trained, done.digest)
        finally:
            if is_encoded:
                trained.unlink(missing_ok=True)
        if personal:
            self.stage_personal(work, update, done)
        return done

    def stage_personal(self, work: Work, update: Path, done: Done) -> None:
        """Keep the peer's own part of the model with this update, which is on disk before."""
        fsync_files(update)
        self._outbox.personal.stage(work.run, done.digest)

    def _encode(
        self, codec: Codec, work: Work, trained: Path, base: Path, fragment: Fragment
    ) -> Encoded:
        """Write the update, of this fragment, to the outbox."""
        update = self._outbox.update
        if codec.encoding is not None:
            feedback = self._outbox.error_feedback
            return feedback.encode(codec, work.run, trained, base, update, fragment)
        with WeightsFile(trained) as whole:
            part = fragment.of(whole)
            with WeightsWriter(update, part.schema, synced=False) as file:
                file.write_all(part)
        return Encoded(file.digest, file.nbytes)
