"""The work of secure runs: a card in place of an update, then the steps of the sum.

What was trained or measured stays in `SecureFiles`. It leaves as the masked file alone, which is
uniformly random to all who do not have the other peers' masks. Every answer follows from the turn
on disk, so a request that is repeated gets the same bytes, also after a restart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from flwr.app import ConfigRecord, Message

from agent.clientapp.interfaces import Observer, PeerIdentity, Transport
from agent.clientapp.outbox import Finished
from agent.clientapp.secure_files import SecureFiles, key_of, key_of_turn, terms_of
from agent.clientapp.secure_turns import SecureTurns
from agent.home import secure_store
from agent.tasks.work import Done
from protocols.codecs import registry, sums
from protocols.errors import BadMessage, SecureRefused
from protocols.local.background_unlink import unlink
from protocols.local.disk_space import check_room
from protocols.local.failpoints import failpoint
from protocols.messages.work import MAX_MESSAGE_BYTES, SIGNED_CLAIM, OpenSum, SecureStep, Work
from protocols.model.weights_file import WeightsFile
from protocols.privacy import events
from protocols.privacy.events import SharedGaussian
from protocols.privacy.secagg import masked_file, messages, tails
from protocols.privacy.secagg.messages import (
    SIGNED_CARD,
    STEPS,
    AgreeRequest,
    Answer,
    MaskAnswer,
    MaskRequest,
    ReadyAnswer,
    ReadyRequest,
    ShareRequest,
)
from protocols.privacy.secagg.turn import Masking, Turn
from protocols.privacy.shared_noise import SharedNoise

REQUEST = "cw.request"
#: Of a masked file, beside the numbers.
_SPARE_BYTES = 1024 * 1024


class SecureWork:
    """This agent in secure runs. `open_turns` opens what it has answered; files are in `folder`.
    `check_consent` raises an error if the owner has taken back columns that were used.

    Methods raise SecureRefused, BadMessage, HomeError, DiskFull, OSError.
    """

    def __init__(
        self,
        me: PeerIdentity,
        folder: Path,
        open_turns: Callable[[], SecureTurns] | None,
        transport: Transport,
        observer: Observer,
        check_consent: Callable[[Work, tuple[str, ...]], None],
    ) -> None:
        self._check_consent = check_consent
        self._me, self._open_turns = me, open_turns
        self._transport, self._observer = transport, observer
        self._files = SecureFiles(folder)

    @cached_property
    def _turns(self) -> SecureTurns:
        if self._open_turns is None:
            raise SecureRefused("unable", "this agent takes part in no secure run", "update it")
        return self._open_turns()

    def resume(self) -> None:
        """After a restart: tell the observer if a sum waits for this peer's steps."""
        if self._files.awaits_step():
            self._observer.on_sum(True)

    def open_sum(self) -> OpenSum | None:
        """The sum that has this peer's card and still awaits its last step."""
        result = self._files.result()
        turn = self._turns.newest(result.run) if result is not None else None
        if turn is None or turn.told is not None:
            return None
        made = turn.ready
        if made.kind == "question":  # those have a record of their own
            return None
        return OpenSum(run=made.run, round=made.round, turn=made.turn, kind=made.kind)

    def end(self) -> None:
        """Delete the files and secrets of all sums."""
        self._turns.end_others()
        self._files.clear()
        self._observer.on_sum(False)

    # --- step ready ---

    def card(self, work: Work) -> Finished | None:
        """The reply with this turn's card; None if the work is still to be done.

        Raises SecureRefused if the turn is over, before anything is trained for it.
        """
        made = self._turns.card(self._ready_request(work))
        return self._ready_reply(work, made) if made is not None else None

    def end_others(self, run: str) -> None:
        """Delete what is here of another secure run: the coordinator works on one at a time."""
        result = self._files.result()
        if result is not None and result.run != run:
            self._turns.end_others(run)
            self._files.clear()

    def begin(self) -> Path:
        """Delete what is left of earlier turns; returns the file for the trained weights."""
        self._turns.end_others()
        self._files.clear()
        return self._files.trained

    def kept_result(self, work: Work, columns: tuple[str, ...]) -> Done | None:
        """The result of this work with these columns, if it was kept and no card promises it."""
        result = self._files.whole_result()
        if result is None or (result.key, result.columns) != (key_of(work), columns):
            return None
        return Done(
            digest=result.digest,
            num_examples=result.num_examples,
            metrics=result.metrics,
            tallies=result.tallies,
            privacy=result.privacy,
        )

    def keep(self, work: Work, done: Done, columns: tuple[str, ...]) -> Done:
        """Store the result of the work durably. Returns the part that is summed."""
        self._files.keep_result(work, done, columns)
        failpoint("agent.secure.kept")
        kept = self.kept_result(work, columns)
        assert kept is not None, "it was written just now"
        return kept

    def ready(self, work: Work, done: Done) -> Finished:
        """Promise a kept result with a card."""
        names = tails.names(done.metrics, done.tallies)
        noise = _shared_noise(done)
        made = self._turns.ready(self._ready_request(work), done.num_examples, names, noise)
        return self._ready_reply(work, made)

    def promised(self) -> str:
        """The digest of the newest trained weights that a card has promised; else empty."""
        result = self._files.result()
        if result is None or not result.digest:
            return ""
        return result.digest if self._turns.newest(result.run) is not None else ""

    def _ready_request(self, work: Work) -> ReadyRequest:
        if work.kind not in ("train", "evaluate"):
            raise BadMessage(f"work of the kind {work.kind} has no card")
        return ReadyRequest(
            fleet=self._me.fleet,
            run=work.run,
            round=work.round,
            turn=work.turn,
            kind=work.kind,
            base=work.base,
            task=work.task,
            terms=terms_of(work),
        )

    def _ready_reply(self, work: Work, made: ReadyAnswer) -> Finished:
        examples = SIGNED_CARD.decode(made.card.card).examples
        return self._reply(work, messages.encode(made), examples)

    # --- the steps after it ---

    def step(self, work: Work, step: SecureStep, message: Message) -> Finished:
        """Answer a step; the masked update is uploaded before this returns."""
        request = messages.decode_request(step, _request_bytes(work, message))
        turn = self._turn_of(work)
        key = secure_store.key_of(turn)
        answer: Answer
        match request:
            case ShareRequest():
                answer = self._turns.share(key, request, self._layout(turn, work))
            case MaskRequest():
                if (result := self._files.result()) is not None:
                    self._check_consent(work, result.columns)
                answer = self._turns.mask(key, request, lambda how: self._mask(turn, work, how))
            case AgreeRequest():
                answer = self._turns.agree(key, request)
                self._files.forget_result()
            case _:
                answer = self._turns.unmask(key, request)
                unlink(self._files.masked)  # the coordinator has it, as this peer has signed
        reply = self._reply(work, messages.encode(answer))
        self._observer.on_leaving(SIGNED_CLAIM.decode(reply.claim), work.task, reply.description)
        if isinstance(answer, MaskAnswer):
            self._observer.on_sending()
            self._transport.send(answer.digest, self._files.masked)
            failpoint("agent.upload.done")
        return reply

    def _turn_of(self, work: Work) -> Turn:
        turn = self._turns.newest(work.run)
        asked = (work.round, work.turn, work.base, work.task)
        if turn is None or asked != (
            *(turn.ready.round, turn.ready.turn, turn.ready.base, turn.ready.task),
        ):
            raise SecureRefused(
                "order",
                "this peer has made no card for this step, or a newer one",
                "ask the peer for a new turn; the coordinator does so automatically",
            )
        return turn

    def _layout(self, turn: Turn, work: Work) -> tuple[int, ...]:
        """The elements of each tensor of this peer's update; none for an evaluation."""
        if turn.ready.kind == "evaluate":
            return ()
        with WeightsFile(self._transport.fetch(work)) as base:
            is_sums = work.codec == messages.masked_codec(registry.SUMS)
            return masked_file.layout(sums.schema_of(base) if is_sums else base.schema)

    def _mask(self, turn: Turn, work: Work, masking: Masking) -> tuple[str, int]:
        """Write the masked file, unless it is there. Returns its digest and its bytes."""
        files = self._files
        if files.is_here(files.masked, turn.upload):
            return turn.upload, turn.upload_bytes
        result, plan = files.whole_result(), masking.cohort.plan
        if result is None or result.key != key_of_turn(turn.ready):
            raise SecureRefused(
                "lost",
                "the weights that this peer trained in this turn are no longer on its disk",
                "the run continues without this peer until the next turn",
            )
        most = max(card.examples for card in masking.cohort.cards.values())
        numbers = tails.values(
            plan.names,
            result.metrics,
            result.tallies,
            result.num_examples,
            most,
            len(masking.cohort.peers),
        )
        if not result.digest:
            return masked_file.write(masking, None, numbers, files.masked)
        check_room(files.masked.parent, sum(plan.sizes) * plan.ring // 8 + _SPARE_BYTES)
        with (
            WeightsFile(files.trained) as trained,
            WeightsFile(self._transport.fetch(work)) as base,
        ):
            written = masked_file.write(masking, (trained, base), numbers, files.masked)
        failpoint("agent.secure.masked")
        return written

    def _reply(self, work: Work, data: bytes, examples: int = 0) -> Finished:
        """The signed reply with these bytes; the kept one if it has the same."""
        key = key_of(work)
        if (kept := self._files.reply(key)) is not None and kept.description == data:
            self._observer.on_sum(work.kind != STEPS[-1])
            return kept
        claim, signature = self._me.sign_claim(
            work,
            digest=hashlib.sha256(data).hexdigest(),
            nbytes=len(data),
            codec=work.codec,
            num_examples=examples,
        )
        reply = Finished(key=key, claim=claim, signature=signature, description=data)
        self._files.keep_reply(reply)
        self._observer.on_sum(work.kind != STEPS[-1])
        return reply


def _request_bytes(work: Work, message: Message) -> bytes:
    """The request of a step, which the signed work names by its digest. Raises BadMessage."""
    data = message.content.config_records.get(REQUEST, ConfigRecord()).get("request")
    if not isinstance(data, bytes) or len(data) > MAX_MESSAGE_BYTES:
        raise BadMessage(f"a step {work.kind} without a request")
    if hashlib.sha256(data).hexdigest() != work.request:
        raise BadMessage(f"the request of the step {work.kind} is not the one that was signed")
    return data


def _shared_noise(done: Done) -> SharedNoise | None:
    """This update's part of the noise that peers share; None if it has no noise, or its own."""
    added = events.decode(done.privacy) if done.privacy else ()
    shared = [one for one in added if isinstance(one, SharedGaussian)]
    if len(shared) > 1:
        raise SecureRefused("noise", "an update with shared noise of several steps is in no sum")
    return SharedNoise.of(shared[0]) if shared else None
