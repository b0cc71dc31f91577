"""Units of jobs on the agent: a signed request in, a signed answer out, each done once.

One handler per type does the work (`agent.clientapp.inference_jobs`, `agent.analytics`). A finished
answer stays in the outbox under the unit's key, so a repeated request after a lost connection or a
crash costs nothing. Blocking, for the work thread.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
from flwr.app import ConfigRecord, Message, RecordDict
from msgspec import Struct

from agent.clientapp.interfaces import PeerIdentity
from protocols.errors import BadMessage, Refused
from protocols.failpoints import failpoint, note
from protocols.local.atomic_files import replacing
from protocols.messages import jobs
from protocols.messages.jobs import INLINE_MAX_BYTES, Answer, Unit, UnitQuestion
from protocols.messages.work import Work
from protocols.model.weights import file_digest

ANSWER = "cw.answer"
#: The number of newest answers kept for repeated requests.
KEPT = 8


class Result(NamedTuple):
    """The bytes of an answer, or a file with them, and the number of rows.

    The receiver may move the file.
    """

    body: bytes | Path
    rows: int


#: Does one unit. Its errors are reported to the coordinator like those of updates.
Handler = Callable[[Unit], Result]


class _Kept(Struct, frozen=True, kw_only=True):
    """An answer in the outbox. The bytes of a long one are in a file beside it."""

    answer: bytes
    signature: bytes
    body: bytes = b""


class Jobs:
    """Answers messages of type `query.infer` and `query.analyze`.

    `send(digest, path)` uploads. `on_work(work | None)` is called when work begins and ends,
    `on_leaving(unit, answer, body)` before an answer is sent; the body of a long one is empty.
    """

    def __init__(
        self,
        me: PeerIdentity,
        outbox: Path,
        *,
        send: Callable[[str, Path], None],
        handlers: Mapping[type[UnitQuestion], Handler],
        on_work: Callable[[Work | None], None] = lambda work: None,
        on_leaving: Callable[[Unit, Answer, bytes], None] = lambda unit, answer, body: None,
    ) -> None:
        self._me = me
        self._outbox, self._send, self._handlers = outbox, send, handlers
        self._on_work, self._on_leaving = on_work, on_leaving
        outbox.mkdir(mode=0o700, parents=True, exist_ok=True)

    def answer(self, message: Message) -> RecordDict:
        """Returns the content of the reply. Raises CommonweightError."""
        unit, key = self._read(message)
        note("unit", job=unit.job, unit=unit.unit, key=key)
        self._on_work(Work(run=unit.job, round=unit.unit, kind="evaluate", task=unit.task))
        try:
            kept = self._last(key)
            if kept is None:
                handler = self._handlers.get(type(unit.question))
                if handler is None:
                    raise Refused(
                        f"this agent does not support {type(unit.question).__name__.lower()}"
                    )
                result = handler(unit)
                failpoint("agent.unit.done")
                kept = self._keep(key, result)
                failpoint("agent.unit.kept")
                note("did", job=unit.job, unit=unit.unit, key=key)
            answer = jobs.SIGNED_ANSWER.decode(kept.answer)
            self._on_leaving(unit, answer, kept.body)
            if self._file(key).exists():
                self._send(answer.digest, self._file(key))
                failpoint("agent.unit.sent")
        finally:
            self._on_work(None)
        record = ConfigRecord(
            {"answer": kept.answer, "signature": kept.signature, "body": kept.body}
        )
        return RecordDict({ANSWER: record})

    def _read(self, message: Message) -> tuple[Unit, str]:
        """Returns the unit and its key. Raises BadMessage."""
        config = message.content.config_records.get("unit", ConfigRecord())
        payload, signature = config.get("unit"), config.get("signature")
        if not isinstance(payload, bytes) or not isinstance(signature, bytes):
            raise BadMessage("a message without a signed unit")
        unit = jobs.read_unit(payload, signature, self._me.is_coordinators)
        return unit, jobs.idempotency_key(payload)

    # --- the outbox ---

    def _file(self, key: str) -> Path:
        return self._outbox / f"{key}.bytes"

    def _last(self, key: str) -> _Kept | None:
        """Returns the answer in the outbox if it is complete."""
        try:
            kept = msgspec.json.decode((self._outbox / f"{key}.json").read_bytes(), type=_Kept)
            answer = jobs.SIGNED_ANSWER.decode(kept.answer)
            if answer.nbytes > INLINE_MAX_BYTES and file_digest(self._file(key)) != answer.digest:
                return None
        except (OSError, msgspec.DecodeError, BadMessage):
            return None
        return kept

    def _keep(self, key: str, result: Result) -> _Kept:
        """Signs an answer and stores it in the outbox."""
        body = result.body
        if isinstance(body, Path) and body.stat().st_size <= INLINE_MAX_BYTES:
            path, body = body, body.read_bytes()
            path.unlink()
        if isinstance(body, bytes) and len(body) > INLINE_MAX_BYTES:
            with replacing(self._file(key)) as file:
                file.write(body)
            digest, nbytes, inline = hashlib.sha256(body).hexdigest(), len(body), b""
        elif isinstance(body, bytes):
            digest, nbytes, inline = hashlib.sha256(body).hexdigest(), len(body), body
        else:
            digest, nbytes, inline = file_digest(body), body.stat().st_size, b""
            body.replace(self._file(key))
        answer = jobs.Answer(
            key=key,
            peer=self._me.peer,
            digest=digest,
            nbytes=nbytes,
            rows=result.rows,
            nonce=secrets.token_hex(12),
        )
        payload, signature = jobs.SIGNED_ANSWER.seal(answer, self._me.sign)
        kept = _Kept(answer=payload, signature=signature, body=inline)
        with replacing(self._outbox / f"{key}.json") as file:
            file.write(msgspec.json.encode(kept))
        self._drop_old()
        return kept

    def _drop_old(self) -> None:
        heads = sorted(self._outbox.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for head in heads[:-KEPT]:
            self._file(head.stem).unlink(missing_ok=True)
            head.unlink()
