"""Units of jobs on the agent: a signed request in, a signed answer out, each done once.

One handler per type does the work (`agent.clientapp.inference_jobs`, `agent.analytics`). A finished
answer stays in the outbox under the unit's key, so a repeated request after a lost connection or a
crash costs nothing. Blocking, for the work thread.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec
from flwr.app import ConfigRecord, Message, RecordDict
from msgspec import Struct

from agent.clientapp.interfaces import PeerIdentity, signed_payload
from protocols.errors import BadMessage, Refused
from protocols.local.atomic_files import write_private
from protocols.local.failpoints import failpoint, note
from protocols.local.safe_paths import path_in
from protocols.messages import jobs
from protocols.messages.fleet_names import FleetNames
from protocols.messages.jobs import INLINE_MAX_BYTES, Answer, Unit, UnitQuestion
from protocols.messages.work import Work
from protocols.model.weights import file_digest

ANSWER = "cw.answer"
#: The number of newest answers that are stored for repeated requests.
MAX_STORED = 8


class Result(NamedTuple):
    """The bytes of an answer, or a file with them, and the number of rows.

    The receiver may move the file.
    """

    body: bytes | Path
    rows: int


#: Does one unit. Its errors are reported to the coordinator like those of updates.
Handler = Callable[[Unit], Result]


class _StoredAnswer(Struct, frozen=True, kw_only=True):
    """An answer in the outbox. The bytes of a long one are in a file beside it."""

    answer: bytes
    signature: bytes
    body: bytes = b""


class Jobs:
    """Answers messages of type `query.infer` and `query.analyze`.

    `send(digest, path)` uploads. `check(unit)` raises an error if the owner does not allow now what
    an earlier request was answered. `on_work(work | None)` is called when work begins and ends,
    `on_leaving(unit, answer, body)` before an answer is sent; the body of a long one is empty.
    """

    def __init__(
        self,
        me: PeerIdentity,
        outbox: Path,
        *,
        send: Callable[[str, Path], None],
        handlers: Mapping[type[UnitQuestion], Handler],
        check: Callable[[Unit], None] = lambda unit: None,
        on_work: Callable[[Work | None], None] = lambda work: None,
        on_leaving: Callable[[Unit, Answer, bytes], None] = lambda unit, answer, body: None,
    ) -> None:
        self._me, self._fleet_names = me, FleetNames(me.fleet)
        self._outbox, self._send, self._handlers = outbox, send, handlers
        self._check, self._on_work, self._on_leaving = check, on_work, on_leaving
        outbox.mkdir(mode=0o700, parents=True, exist_ok=True)

    def answer(self, message: Message) -> RecordDict:
        """Returns the content of the reply. Raises CommonweightError."""
        payload, signature = signed_payload(message, "unit", "unit")
        unit = jobs.read_unit(payload, signature, self._me.is_coordinators)
        self._fleet_names.check("coordinator", unit.fleet)
        key = jobs.idempotency_key(payload)
        note("unit", job=unit.job, unit=unit.unit, key=key)
        self._on_work(Work(run=unit.job, round=unit.unit, kind="evaluate", task=unit.task))
        try:
            stored = self._load(key)
            if stored is not None:
                self._check(unit)
            else:
                handler = self._handlers.get(type(unit.question))
                if handler is None:
                    raise Refused(
                        f"this agent does not support {type(unit.question).__name__.lower()}"
                    )
                result = handler(unit)
                failpoint("agent.unit.done")
                stored = self._store(key, result)
                failpoint("agent.unit.kept")
                note("did", job=unit.job, unit=unit.unit, key=key)
            answer = jobs.SIGNED_ANSWER.decode(stored.answer)
            self._on_leaving(unit, answer, stored.body)
            if self._file(key).exists():
                self._send(answer.digest, self._file(key))
                failpoint("agent.unit.sent")
        finally:
            self._on_work(None)
        return RecordDict({ANSWER: ConfigRecord(msgspec.structs.asdict(stored))})

    # --- the outbox ---

    def _file(self, key: str) -> Path:
        return path_in(self._outbox, key, ".bytes")

    def _load(self, key: str) -> _StoredAnswer | None:
        """Returns the answer in the outbox if it is complete."""
        try:
            data = (self._outbox / f"{key}.json").read_bytes()
            stored = msgspec.json.decode(data, type=_StoredAnswer)
            answer = jobs.SIGNED_ANSWER.decode(stored.answer)
            if answer.nbytes > INLINE_MAX_BYTES and file_digest(self._file(key)) != answer.digest:
                return None
        except (OSError, msgspec.DecodeError, BadMessage):
            return None
        return stored

    def _store(self, key: str, result: Result) -> _StoredAnswer:
        """Signs an answer and stores it in the outbox."""
        inline, file = b"", self._file(key)
        if isinstance(result.body, Path):
            result.body.replace(file)
        else:
            write_private(file, result.body, synced=len(result.body) > INLINE_MAX_BYTES)
        digest, nbytes = file_digest(file), file.stat().st_size
        if nbytes <= INLINE_MAX_BYTES:
            inline = file.read_bytes()
            file.unlink()
        answer = jobs.Answer(
            key=key,
            peer=self._me.peer,
            digest=digest,
            nbytes=nbytes,
            rows=result.rows,
            nonce=secrets.token_hex(12),
            fleet=self._me.fleet,
        )
        payload, signature = jobs.SIGNED_ANSWER.seal(answer, self._me.sign)
        stored = _StoredAnswer(answer=payload, signature=signature, body=inline)
        write_private(self._outbox / f"{key}.json", msgspec.json.encode(stored))
        by_age = sorted(self._outbox.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for old in by_age[:-MAX_STORED]:
            self._file(old.stem).unlink(missing_ok=True)
            old.unlink()
        return stored
