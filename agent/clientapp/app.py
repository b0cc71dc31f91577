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

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from msgspec.structs import replace

from agent.clientapp.background_sync import BackgroundSync
from agent.clientapp.interfaces import Observer, PeerIdentity, Queries, Transport
from agent.clientapp.outbox import Finished, Outbox
from agent.tasks.work import Describe, Done, Evaluate, Init, Train, Trainer
from protocols.codecs import registry
from protocols.errors import (
    SETTINGS_CODES,
    SHAREABLE_CODES,
    BadMessage,
    CommonweightError,
    DiskFull,
    OutOfMemory,
    Refused,
    SchemaMismatch,
    TrainerFailed,
)
from protocols.failpoints import failpoint, note
from protocols.local.atomic_files import fsync_files
from protocols.local.disk_space import check_room, is_disk_full
from protocols.messages.work import SIGNED_CLAIM, SIGNED_WORK, Work
from protocols.model import schema_card

CLAIM, DESCRIPTION = "cw.claim", "cw.description"
#: Disk space beside the weights: claims, logs, the trainer's files.
_SPARE_BYTES = 4 * 1024 * 1024
_MAKE_ROOM = "free some space; the agent then continues"


class Client:
    """Answers the coordinator's messages: trains, evaluates, describes, and passes queries on.

    `allowed(task)` says whether the owner allows a task; `outbox` is the folder of the outbox.
    """

    def __init__(
        self,
        me: PeerIdentity,
        trainer: Trainer,
        transport: Transport,
        outbox: Path,
        *,
        allowed: Callable[[str], bool],
        observer: Observer | None = None,
        queries: Queries = Queries(),
    ) -> None:
        self._me, self._trainer, self._transport = me, trainer, transport
        self._outbox = Outbox(outbox, me.peer, me.sign)
        self._allowed, self._queries = allowed, queries
        self._observer = observer or Observer()
        self._syncing: BackgroundSync | None = None
        #: The run and schema card that matched this peer's task and data.
        self._matched_card = ("", "")
        self.app = ClientApp()
        self.app.train()(self._answer)
        self.app.evaluate()(self._answer)
        for action in ("describe", "init", "holdings", "recall"):
            self.app.query(action)(self._answer)
        for action in ("infer", "analyze"):
            self.app.query(action)(self._answer_job)

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
            raise CommonweightError(f"cannot use the disk: {err.strerror or err}") from err

    def _answer(self, message: Message, _: Context) -> Message:
        work, payload, signature = self._read(message)
        note("work", run=work.run, round=work.round, kind=work.kind)
        if work.kind in ("holdings", "recall"):
            return Message(self._queries.recall(work), reply_to=message)
        self._observer.on_work(work)
        try:
            finished = self._outbox.finished(work)
            if finished is not None:
                self._deliver(work, finished)
            elif work.kind == "describe":
                finished = self._describe(work)
                self._deliver(work, finished)
            else:
                self._check_card(work)
                base = self._fetch_base(work)
                if work.base:
                    self._observer.on_version(work, payload, signature)
                finished = self._run_work(work, base)
        finally:
            self._observer.on_work(None)
        content = RecordDict(
            {
                CLAIM: ConfigRecord({"claim": finished.claim, "signature": finished.signature}),
                "metrics": MetricRecord(),
            }
        )
        if finished.description:
            content[DESCRIPTION] = ConfigRecord({"description": finished.description})
        return Message(content, reply_to=message)

    def _answer_job(self, message: Message, _: Context) -> Message:
        return Message(self._queries.job(message), reply_to=message)

    def _read(self, message: Message) -> tuple[Work, bytes, bytes]:
        """Returns the work, its bytes and the coordinator's signature over them."""
        config = message.content.config_records.get("config", ConfigRecord())
        payload, signature = config.get("work"), config.get("signature")
        if not isinstance(payload, bytes) or not isinstance(signature, bytes):
            raise BadMessage("a message without signed work")
        work = SIGNED_WORK.open(payload, signature, self._me.is_coordinators)
        if not self._allowed(work.task):
            raise Refused(
                f"the owner of this machine does not allow the task {work.task!r}",
                f"commonweight-agent policy set tasks {work.task}",
            )
        if work.kind == "train":
            registry.parse(work.codec)  # fail before an hour of training, not after
        return work, payload, signature

    def _fetch_base(self, work: Work) -> Path:
        """Returns the file of the work's base version; an empty path for the first weights."""
        if work.kind == "init":
            return Path()
        # Space for the version and the update. Check it before an hour of training, not after.
        check_room(self._outbox.folder, 2 * work.nbytes + _SPARE_BYTES)
        base = self._transport.fetch(work)
        failpoint("agent.version.fetched")
        return base

    def _describe(self, work: Work) -> Finished:
        """Describes data and model."""
        told = self._run_describe(work)
        self._outbox.settle_last()
        done = Done(digest=hashlib.sha256(told).hexdigest(), nbytes=len(told))
        return self._outbox.keep(work, done, told)

    def _run_describe(self, work: Work) -> bytes:
        return self._trainer.run(Describe(task=work.task, settings=_settings(work))).description

    def _check_card(self, work: Work) -> None:
        """Compares this peer's schema card with the run's, once per run, as it may load the data.

        Raises SchemaMismatch, which names the field.
        """
        if not work.card or self._matched_card == (work.run, work.card):
            return
        expected = schema_card.decode_card(work.card)
        found = schema_card.decode(self._run_describe(work))
        if not isinstance(found, schema_card.SchemaCard):
            raise SchemaMismatch("schema", "a model", "data without agreed preprocessing")
        if (difference := schema_card.first_difference(expected, found)) is not None:
            raise difference.as_error()
        self._matched_card = (work.run, work.card)

    def _run_work(self, work: Work, base: Path) -> Finished:
        update = self._outbox.update
        if (syncing := self._syncing) is not None:  # of the last reply
            self._syncing = None
            syncing.wait()
        self._outbox.settle_last()
        if work.kind != "evaluate":  # the update of the last reply is overwritten next
            self._outbox.clear()
            failpoint("agent.outbox.cleared")
        if work.kind == "init":
            settings = dict(work.settings)
            done = self._trainer.run(
                Init(task=work.task, settings=settings, seed=work.seed, out=str(update))
            )
        elif work.kind == "train":
            done = self._train(work, base, update)
        else:
            kept = self._outbox.own(work)
            done = self._trainer.run(
                Evaluate(
                    task=work.task,
                    settings=_settings(work),
                    base=str(base),
                    personal=str(kept.file) if kept else "",
                )
            )
        failpoint("agent.work.done")
        finished = self._outbox.keep(work, done, synced=self._keeps_state(work))
        failpoint("agent.outbox.written")
        if not done.digest:  # an evaluation: repeating it costs less than an fsync
            self._deliver(work, finished)
            return finished
        try:
            self._write_audit_entry(work, finished)
        finally:
            # Start the fsync after the short one of the audit log, which then does not wait. Start
            # it even if the audit log fails, as the reply is in the outbox anyway. The trainer's
            # checkpoint is obsolete once the whole reply is on disk.
            self._syncing = BackgroundSync(
                update,
                self._outbox.answer,
                then=self._observer.on_trained if work.kind == "train" else lambda: None,
            )
        self._send_update(finished)
        return finished

    def _keeps_state(self, work: Work) -> bool:
        """True if state that stays on this peer changes with this update."""
        if work.kind != "train":
            return False
        return registry.parse(work.codec).encoding is not None or self._outbox.own(work) is not None

    def _train(self, work: Work, base: Path, update: Path) -> Done:
        """Trains and writes the update in the run's codec."""
        codec = registry.parse(work.codec)
        kept = self._outbox.own(work)
        whole = codec.encoding is None
        trained = update if whole else self._outbox.trained
        training = Train(
            task=work.task,
            settings=_settings(work),
            base=str(base),
            out=str(trained),
            personal=str(kept.file) if kept else "",
            personal_out=str(kept.next) if kept else "",
        )
        try:
            done = self._trainer.run(training)
            if not whole:
                made = self._outbox.leftovers.encode(codec, work.run, trained, base, update)
                done = replace(done, digest=made.digest, nbytes=made.nbytes, tallies={})
        finally:
            if not whole:
                trained.unlink(missing_ok=True)
        if kept:
            fsync_files(update)  # before the state that stays here changes
            self._outbox.personal.stage(work.run, done.digest)
        return done

    def _deliver(self, work: Work, finished: Finished) -> None:
        """Writes the audit entry, then sends the update, if there is one."""
        self._write_audit_entry(work, finished)
        self._send_update(finished)

    def _write_audit_entry(self, work: Work, finished: Finished) -> None:
        self._observer.on_leaving(
            SIGNED_CLAIM.decode(finished.claim), work.task, finished.description
        )

    def _send_update(self, finished: Finished) -> None:
        """Uploads the update in the outbox, if the reply has one."""
        digest = "" if finished.description else SIGNED_CLAIM.decode(finished.claim).digest
        if digest:
            self._observer.on_sending()
            self._transport.send(digest, self._outbox.update)
            failpoint("agent.upload.done")


def _settings(work: Work) -> dict[str, str | int | float | bool]:
    """Returns the run's settings with seed and round added."""
    return {**work.settings, "seed": work.seed, "round": work.round}


def claim_text(reply: Message) -> str:
    """Returns the claim in a reply as JSON; empty for failures and replies of jobs."""
    if reply.has_error() or CLAIM not in reply.content:
        return ""
    return bytes(cast(ConfigRecord, reply.content[CLAIM])["claim"]).decode()  # type: ignore[arg-type]


def refusal_text(err: CommonweightError) -> str:
    """Returns the text of a failure for the coordinator. A task's own text may quote data."""
    if isinstance(err, TrainerFailed):
        if err.kind in SETTINGS_CODES:
            hint = f" ({err.hint})" if err.hint else ""
            return f"{err.kind}: {err.message}{hint}"[:300]
        told = err.kind in SHAREABLE_CODES or err.kind == OutOfMemory.code
        return f"{err.kind}: {err.message}"[:300] if told else f"the trainer: {err.kind}"
    return f"{err.code}: {err.message}"[:300]
