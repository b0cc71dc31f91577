"""The files of the secure turn that this agent takes part in, and its last reply.

There is one turn at a time, because the coordinator works on one run at a time. What was trained
stays here until it is masked, and no claim names it.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from agent.clientapp.outbox import Finished
from agent.tasks.work import Done
from protocols.local.atomic_files import fsync_files, read_json, write_private
from protocols.local.background_unlink import unlink
from protocols.messages.envelope import Metrics, Tallies
from protocols.messages.work import Work
from protocols.model.weights import file_digest
from protocols.privacy.secagg.messages import STEPS, ReadyRequest

#: How many metrics and tallies of a training are summed: see `TailNames`.
_MAX_METRICS, _MAX_TALLIES = 32, 8


def key_of(work: Work) -> str:
    """Names the request that a reply or a result is for."""
    what = work.request or terms_of(work)
    return f"{work.run} {work.round} {work.kind} {work.base} {work.turn} {what}"


def key_of_turn(made: ReadyRequest) -> str:
    """The key of the work that this turn's card promises."""
    return f"{made.run} {made.round} {made.kind} {made.base} {made.turn} {made.terms}"


def terms_of(work: Work) -> str:
    """The digest of the request that all peers of a sum get, as in `ReadyRequest`."""
    asked = (work.task, work.seed, sorted(work.settings.items()))
    return hashlib.sha256(msgspec.json.encode(asked)).hexdigest()


class Result(Struct, frozen=True, kw_only=True):
    """What a turn sums: the metrics, and the digest of the trained weights ("" for none).

    `key` names the turn. `columns`: patterns of those that the task could use. `privacy`: what it
    costs (`Done.privacy`).
    """

    run: str
    key: str
    digest: str
    num_examples: int
    metrics: Metrics
    tallies: Tallies
    privacy: str = ""
    columns: tuple[str, ...] = ()


class SecureFiles:
    """The files in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.trained = folder / "trained.safetensors"
        self.masked = folder / "masked.safetensors"
        self._result, self._reply = folder / "result", folder / "reply"
        #: Digests of files that were written or checked by this process.
        self._verified: set[str] = set()

    def clear(self) -> None:
        """Delete what is left of another turn, before its files are overwritten."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (self._reply, self._result):
            path.unlink(missing_ok=True)
        for path in (self.masked, self.trained):
            unlink(path)
        self._verified.clear()

    def keep_result(self, work: Work, done: Done, columns: tuple[str, ...]) -> Result:
        """Make the trained weights and the metrics durable, before a card promises them."""
        result = Result(
            run=work.run,
            key=key_of(work),
            digest=done.digest,
            num_examples=done.num_examples,
            metrics=dict(sorted(done.metrics.items())[:_MAX_METRICS]),
            tallies=dict(sorted(done.tallies.items())[:_MAX_TALLIES]),
            privacy=done.privacy,
            columns=columns,
        )
        write_private(self._result, msgspec.msgpack.encode(result), synced=False)
        fsync_files(self.trained, self._result)
        self._verified.add(done.digest)
        return result

    def forget_result(self) -> None:
        """Delete the trained weights and the metrics once they are masked and count.

        Which weights a card has promised is still known, as `SecureWork.promised` needs it.
        """
        unlink(self.trained)
        if (result := self.result()) is not None and result.key:
            kept = replace(result, key="", num_examples=0, metrics={}, tallies={}, privacy="")
            write_private(self._result, msgspec.msgpack.encode(kept), synced=False)

    def result(self) -> Result | None:
        """The result that is here, or None."""
        try:
            return msgspec.msgpack.decode(self._result.read_bytes(), type=Result)
        except (OSError, msgspec.DecodeError):
            return None

    def whole_result(self) -> Result | None:
        """The result, if its trained weights are here, too, and are not damaged."""
        result = self.result()
        if result is None or not result.digest or self.is_here(self.trained, result.digest):
            return result
        return None

    def is_here(self, path: Path, digest: str) -> bool:
        """True if the file has this digest. A file from before a restart is read for that."""
        try:
            if not digest or not path.exists():
                return False
            if digest not in self._verified and file_digest(path) != digest:
                return False
        except OSError:
            return False
        self._verified.add(digest)
        return True

    def awaits_step(self) -> bool:
        """True if the last reply is not that to the last step of its sum."""
        last = self._last()
        return last is not None and f" {STEPS[-1]} " not in last.key

    def reply(self, key: str) -> Finished | None:
        """The last reply, if it has this key."""
        last = self._last()
        return last if last is not None and last.key == key else None

    def _last(self) -> Finished | None:
        return read_json(self._reply, Finished)

    def keep_reply(self, reply: Finished) -> None:
        """Keep a reply. It needs no fsync: the turn on disk gives the same answer again."""
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_private(self._reply, msgspec.json.encode(reply), synced=False)
