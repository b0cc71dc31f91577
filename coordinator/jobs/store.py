"""The lane of jobs: what units are about goes to peers, and long answers come back, by digest.

    GET /cw/v1/inputs/{digest}       the rows of a unit                    (an enrolled peer)
    PUT /cw/v1/answers/{digest}      an answer's bytes, into the spool     (an enrolled peer)

It has the rules of the weight lane, and folders of its own: the end of a run's round empties that
one's spool.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Set
from io import BytesIO
from pathlib import Path

from coordinator.fleet.auth import Auth
from coordinator.jobs.state import Unit
from coordinator.storage.job_events import Given, JobSpec
from coordinator.transport.weights import Lane
from protocols.errors import BadMessage
from protocols.messages.jobs import ANSWER_PATH, INLINE_BYTES, INPUT_PATH, Scatter

#: Of one answer: a unit is some seconds of work.
_LIMIT_BYTES = 256 * 1024 * 1024
_MOST_LINE_BYTES = 1 << 20
#: A job's rows are here for a moment before the job is; what is here for longer is nobody's.
_STRAY_S = 3600.0


class JobLane(Lane):
    """What jobs keep on disk, all of it named by its digest."""

    suffix = ".bytes"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        super().__init__(folder)
        self.limit_bytes = _LIMIT_BYTES

    def routes(self, auth: Auth) -> list[tuple[str, str, Callable[..., object]]]:
        """(method, path, endpoint) of the lane."""
        return self._both_ways(auth, INPUT_PATH, ANSWER_PATH)

    def cut(self, spec: JobSpec, unit: Unit) -> Scatter:
        """Put the rows of a unit where peers can fetch them; the question about them.

        Raises BadMessage when the job's input is not on disk any more.
        """
        blocks = spec.blocks[unit.first : unit.stop]
        start = sum(block.nbytes for block in spec.blocks[: unit.first])
        nbytes = sum(block.nbytes for block in blocks)
        try:
            with self.version(spec.input).open("rb") as file:
                file.seek(start)
                data = file.read(nbytes)
        except OSError as err:
            raise BadMessage(f"the job's input cannot be read: {err.strerror}") from err
        if len(data) != nbytes:
            raise BadMessage("the job's input was cut short on disk")
        digest = hashlib.sha256(data).hexdigest()
        # Written anew each time, and not synced: what a power cut has left of it is overwritten.
        temporary = self.version(digest).with_suffix(".tmp")
        temporary.write_bytes(data)
        temporary.replace(self.version(digest))
        return Scatter(
            input=digest,
            sizes=tuple(block.nbytes for block in blocks),
            rows=tuple(block.rows for block in blocks),
            suffix=spec.suffix,
        )

    def keep(self, peer: str, given: Given) -> None:
        """Keep an answer that was uploaded. Raises BadMessage if it was not, or is longer."""
        if given.body or not given.nbytes:
            return
        if self.has(given.digest):  # of a life before, or of another peer that gave the same
            self.drop_update(peer, given.digest)
            return
        update = self.update(peer, given.digest)
        try:
            size = update.stat().st_size
        except OSError as err:
            raise BadMessage("the answer's bytes were never uploaded") from err
        if size != given.nbytes or size <= INLINE_BYTES:
            raise BadMessage(f"the answer has {size} bytes, and was said to have {given.nbytes}")
        self.adopt(peer, given.digest)

    def read(self, given: Given) -> bytes:
        """An answer's bytes. Raises OSError."""
        if given.body or not given.nbytes:
            return given.body
        return self.version(given.digest).read_bytes()

    def lines(self, given: Given) -> Iterator[bytes]:
        """The lines of an answer, without holding it in memory. Raises OSError.

        One that is longer than any should be comes in parts.
        """
        inline = given.body or not given.nbytes
        with BytesIO(given.body) if inline else self.version(given.digest).open("rb") as file:
            while line := file.readline(_MOST_LINE_BYTES):
                yield line

    def sweep(self, wanted: Set[str]) -> None:
        """Drop what no job wants, if it has been here for a while."""
        for path in self._versions.iterdir():
            if path.name.removesuffix(self.suffix) not in wanted:
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _STRAY_S:
                        path.unlink()
