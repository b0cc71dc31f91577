"""The agent's Flower ClientApp: unpacks the work, calls the trainer, packs the reply.

A message carries no code. The work names a task, and only a task that is installed here and allowed
by the owner runs. A finished reply stays in the outbox until its round is over, so repeating the
same request after a lost connection costs nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from msgspec.structs import replace

from agent.clientapp import secure_rules, trainer_work
from agent.clientapp.interfaces import Observer, PeerIdentity, Queries, Transport
from agent.clientapp.outbox import Finished, Outbox
from agent.clientapp.owner_rules import OwnerRules
from agent.clientapp.secure_turns import SecureTurns
from agent.clientapp.secure_work import SecureWork
from agent.clientapp.training import Training
from agent.clientapp.work_reader import SignedRequest, WorkReader
from agent.tasks.work import Done, Trainer
from protocols.codecs import registry
from protocols.errors import CommonweightError, DiskFull, NotAllowed, SchemaMismatch, TrainerFailed
from protocols.local.atomic_files import fsync_files
from protocols.local.disk_space import is_disk_full
from protocols.local.failpoints import failpoint, note
from protocols.messages.jobs import Score
from protocols.messages.work import INLINE_MAX_BYTES, SIGNED_CLAIM, Work
from protocols.model import schema_card
from protocols.privacy.secagg.messages import STEPS

CLAIM, DESCRIPTION = "cw.claim", "cw.description"
#: Disk space beside the weights: claims, logs, the trainer's files.
_SPARE_BYTES = 4 * 1024 * 1024
_MAKE_ROOM = "free some space; the agent then continues"


class Client:
    """Answers the coordinator's messages: trains, evaluates, describes, and passes queries on.

    `outbox` is this peer's own, as its replies are signed. `secure_turns` opens what this peer has
    answered in secure runs; without it, the peer takes part in none.
    """

    def __init__(
        self,
        me: PeerIdentity,
        trainer: Trainer,
        transport: Transport,
        outbox: Outbox,
        owner: OwnerRules,
        *,
        observer: Observer = Observer(),
        queries: Queries = Queries(),
        secure_turns: Callable[[], SecureTurns] | None = None,
    ) -> None:
        self._transport, self._queries, self._outbox = transport, queries, outbox
        self._observer, self._budget = observer, owner.budget
        self.training = Training(trainer, outbox, owner.floors, observer)
        self._reader = WorkReader(me, owner, transport.check_log)
        self.secure = SecureWork(
            me,
            outbox.folder / "secure",
            secure_turns,
            transport,
            self._observer,
            self._reader.check_consent,
        )
        #: The run and schema card that matched this peer's task and data.
        self._matched_card = ("", "")
        self.app = ClientApp()
        self.app.train()(self._answer)
        self.app.evaluate()(self._answer)
        for action in ("describe", "init", "holdings", "recall", *STEPS):
            self.app.query(action)(self._answer)
        for action in ("infer", "analyze"):
            self.app.query(action)(
                lambda message, _: Message(self._queries.answer(message), reply_to=message)
            )

    def end_sum(self) -> None:
        """Deletes what is left of a secure sum that is over."""
        self._commit_last()
        self.secure.end()

    def wait_for_sync(self) -> None:
        """Waits until the last update is on disk. Raises OSError."""
        self._outbox.wait_for_sync()

    def handle(self, message: Message) -> Message:
        """Returns the reply to a message. Raises CommonweightError if the work fails.

        After DiskFull the same message can be handled again and continues where it stopped.
        """
        context = Context(
            run_id=message.metadata.run_id,
            node_id=message.metadata.dst_node_id,
            node_config={},
            state=RecordDict(),
            run_config={},
        )
        try:
            return self.app(message, context)
        except TrainerFailed as err:
            if err.kind == DiskFull.code:
                raise DiskFull(err.message, err.hint) from err
            raise
        except OSError as err:  # fails this work only, not the agent
            if is_disk_full(err):
                raise DiskFull("the disk is full", _MAKE_ROOM) from err
            # Not the text of the error itself, which may have a path.
            why = err.strerror or type(err).__name__
            raise CommonweightError(f"cannot use the disk: {why}") from err

    def _answer(self, message: Message, _: Context) -> Message:
        request = self._reader.read(message)
        work = request.work
        note("work", run=work.run, round=work.round, kind=work.kind)
        if work.kind in ("holdings", "recall"):
            return Message(self._queries.recall(work), reply_to=message)
        self._observer.on_work(work)
        try:
            finished = self._finish(request, message)
        finally:
            self._observer.on_work(None)
        content = RecordDict(
            {
                CLAIM: ConfigRecord({"claim": finished.claim, "signature": finished.signature}),
            }
        )
        if finished.description:
            content[DESCRIPTION] = ConfigRecord({"description": finished.description})
        return Message(content, reply_to=message)

    def _finish(self, request: SignedRequest, message: Message) -> Finished:
        """Does the work, unless its reply is here, and sends what the reply names."""
        work = request.work
        self.secure.end_others(work.run)
        self.training.end_others(work.run)
        if work.kind in STEPS:
            return self.secure.step(work, work.kind, message)
        is_secure = work.kind in ("train", "evaluate") and secure_rules.is_secure(work)
        finished = self.secure.card(work) if is_secure else self._stored(work)
        if finished is None and work.kind != "describe":
            self._check_card(work)
            base = self._fetch_base(work)
            if work.base:
                self._observer.on_version(*request)
            return self._run_secure(work, base) if is_secure else self._run_work(work, base)
        finished = finished or self._describe(work)
        self._charge_update(work, finished)
        if work.ahead:
            self.training.begin_next(work, self._reader.columns(work))
        self._write_audit_entry(work, finished)
        self._send_update(finished)
        return finished

    def _stored(self, work: Work) -> Finished | None:
        return self._outbox.finished(work, self._reader.columns(work))

    def _fetch_base(self, work: Work) -> Path:
        """Returns the file of the work's base version; an empty path for the first weights."""
        if work.kind == "init":
            return Path()
        # Space for the version and the update. Check it before an hour of training, not after.
        models = 5 if work.ahead else 2
        self._outbox.check_room(models * work.nbytes + _SPARE_BYTES)
        base = self._transport.fetch(work)
        failpoint("agent.version.fetched")
        return base

    def _describe(self, work: Work) -> Finished:
        """Describes data and model."""
        columns = self._reader.columns(work)
        told = self._run_describe(work)
        self._reader.check_consent(work, columns)
        self._budget.charge(work, told)
        self._commit_last()
        description = told.description
        digest = hashlib.sha256(description).hexdigest()
        done = replace(told, description=b"", digest=digest, nbytes=len(description))
        return self._outbox.keep(work, done, description, columns=columns)

    def _run_describe(self, work: Work) -> Done:
        return self.training.trainer.run(trainer_work.describe(work))

    def _check_card(self, work: Work) -> None:
        """Compares this peer's schema card with the run's, once per run, as it may load the data.

        Raises SchemaMismatch, which names the field.
        """
        if not work.card or self._matched_card == (work.run, work.card):
            return
        expected = schema_card.decode_card(work.card)
        actual = schema_card.decode(self._run_describe(work).description)
        if not isinstance(actual, schema_card.SchemaCard):
            raise SchemaMismatch("schema", "a model", "data without agreed preprocessing")
        if (difference := schema_card.first_difference(expected, actual)) is not None:
            raise difference
        self._matched_card = (work.run, work.card)

    def _run_work(self, work: Work, base: Path) -> Finished:
        self._begin_work()
        if work.kind != "evaluate":  # the update of the last reply is overwritten next
            self._outbox.clear()
            failpoint("agent.outbox.cleared")
        personal, columns = self._outbox.personal_paths(work), self._reader.columns(work)
        if work.kind == "train":
            done = self.training.train(work, base, personal, columns)
        else:
            done = self.training.do(work, base, self._outbox.update, personal)
        failpoint("agent.work.done")
        self._reader.check_consent(work, columns)  # the owner may have withdrawn it since
        if done.privacy:  # before the reply names it: a lost update is made and charged again
            fsync_files(self._outbox.update)
        else:
            self._budget.charge(work, done)
        # Sync the reply at once if state that stays on this peer changes with the update.
        is_stateful = work.kind == "train" and bool(
            personal or registry.parse_in_work(work.codec).encoding or done.privacy or work.ahead
        )
        finished = self._outbox.keep(work, done, synced=is_stateful, columns=columns)
        failpoint("agent.outbox.written")
        self._charge_update(work, finished)
        failpoint("agent.privacy.charged")
        goes_on = work.ahead and self.training.begin_next(work, columns)
        if work.kind == "evaluate":
            self._observer.on_evaluated(work, Score(done.num_examples, done.metrics))
        try:
            self._write_audit_entry(work, finished)
        finally:
            # Start the fsync after the short one of the audit log, which then does not wait. Start
            # it even if the audit log fails, as the reply is in the outbox anyway. The trainer's
            # checkpoint is obsolete once the whole reply is on disk. An evaluation gets no fsync:
            # repeating it costs less.
            if done.digest:
                is_over = work.kind == "train" and not goes_on
                self._outbox.start_sync(self._observer.on_trained if is_over else lambda: None)
        self._send_update(finished)
        return finished

    def _charge_update(self, work: Work, finished: Finished) -> None:
        """Charge an update with noise, once, after the outbox has it and before it leaves.

        So a kill at any point charges it exactly once. Raises NotAllowed if it must not leave.
        """
        if not finished.privacy:
            return
        try:
            self._budget.charge(work, Done(digest=finished.digest, privacy=finished.privacy))
        except NotAllowed:
            self._outbox.clear()
            raise

    def _run_secure(self, work: Work, base: Path) -> Finished:
        """Trains or evaluates for a secure sum. The result stays here; a card leaves."""
        done = self.secure.kept_result(work, self._reader.columns(work))
        if done is None:
            done = self._begin_secure(work, base)
        self._budget.charge(work, done)
        failpoint("agent.privacy.charged")
        finished = self.secure.ready(work, done)
        self._outbox.commit(done.digest)
        self._write_audit_entry(work, finished)
        if work.kind == "train":
            self._observer.on_trained()
        return finished

    def _begin_secure(self, work: Work, base: Path) -> Done:
        """Does the work of a turn, and keeps what it gives on this disk."""
        self._begin_work()
        columns = self._reader.columns(work)
        trained, personal = self.secure.begin(), self._outbox.personal_paths(work)
        done = self.training.do(work, base, trained, personal)
        if personal and work.kind == "train":
            self.training.stage_personal(work, trained, done)
        failpoint("agent.work.done")
        self._reader.check_consent(work, columns)  # the owner may have withdrawn it since
        return self.secure.keep(work, done, columns)

    def _begin_work(self) -> None:
        self._outbox.wait_for_sync()
        self._commit_last()

    def _commit_last(self) -> None:
        """Discards state of an update that was never sent or promised."""
        if self._outbox.has_state:
            self._outbox.commit_last(self.secure.promised())

    def _write_audit_entry(self, work: Work, finished: Finished) -> None:
        claim = SIGNED_CLAIM.decode(finished.claim)
        self._observer.on_leaving(claim, work.task, finished.description)

    def _send_update(self, finished: Finished) -> None:
        """Uploads the update in the outbox, if the reply has one."""
        if finished.digest:
            if self._outbox.update.stat().st_size > INLINE_MAX_BYTES:  # else its reply has it
                self._observer.on_sending()
            self._transport.send(finished.digest, self._outbox.update)
            failpoint("agent.upload.done")


def claim_text(reply: Message) -> str:
    """Returns the claim in a reply as JSON; empty for failures and replies of jobs."""
    if reply.has_error() or CLAIM not in reply.content:
        return ""
    return bytes(cast(ConfigRecord, reply.content[CLAIM])["claim"]).decode()  # type: ignore[arg-type]
