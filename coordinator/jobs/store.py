"""What jobs keep on disk: the rows of their units and long answers, each named by its digest.

    GET /cw/v1/inputs/{digest}       the rows of a unit                    (an enrolled peer)
    PUT /cw/v1/answers/{digest}      an answer's bytes, into the spool     (an enrolled peer)

`transport.weights` serves these routes. The folders are apart from those of runs, because the end
of a round empties a run's spool.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Set
from io import BytesIO
from pathlib import Path

from coordinator.jobs.state import Unit
from coordinator.storage.job_events import Given, JobSpec
from coordinator.storage.weight_store import WeightStore
from protocols.errors import BadMessage
from protocols.messages.jobs import INLINE_MAX_BYTES, Scatter

#: One answer: the result of some seconds of work.
MAX_ANSWER_BYTES = 256 * 1024 * 1024
_MAX_LINE_BYTES = 1 << 20
#: Rows are written shortly before their job starts. Unreferenced files are deleted after this time.
_STRAY_S = 3600.0


class JobStore(WeightStore):
    """Inputs and answers of jobs, and the partial answers that are uploaded now."""

    suffix = ".bytes"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        super().__init__(folder)

    def write_input(self, spec: JobSpec, unit: Unit) -> Scatter:
        """Write the rows of a unit to a file that peers can fetch; the message that names it.

        Raises BadMessage if the job's input is no longer on disk.
        """
        blocks = spec.blocks[unit.first : unit.stop]
        start = sum(block.nbytes for block in spec.blocks[: unit.first])
        nbytes = sum(block.nbytes for block in blocks)
        try:
            with self.version_path(spec.input).open("rb") as file:
                file.seek(start)
                data = file.read(nbytes)
        except OSError as err:
            raise BadMessage(f"the job's input cannot be read: {err.strerror}") from err
        if len(data) != nbytes:
            raise BadMessage("the job's input was cut short on disk")
        digest = hashlib.sha256(data).hexdigest()
        # Not synced: each attempt writes the file again, also after a power cut.
        temporary = self.version_path(digest).with_suffix(".tmp")
        temporary.write_bytes(data)
        temporary.replace(self.version_path(digest))
        return Scatter(
            input=digest,
            sizes=tuple(block.nbytes for block in blocks),
            rows=tuple(block.rows for block in blocks),
            suffix=spec.suffix,
        )

    def save_answer(self, peer: str, given: Given) -> None:
        """Keep an uploaded answer. Raises BadMessage if it is missing or has another size."""
        if given.body or not given.nbytes:
            return
        # It can be there from before a restart, or from another peer with the same answer.
        if self.has(given.digest):
            self.uploads.drop(peer, given.digest)
            return
        update = self.uploads.path(peer, given.digest)
        try:
            size = update.stat().st_size
        except OSError as err:
            raise BadMessage("the answer's bytes were never uploaded") from err
        if size != given.nbytes or size <= INLINE_MAX_BYTES:
            raise BadMessage(f"the answer has {size} bytes, and was said to have {given.nbytes}")
        self.promote_upload(peer, given.digest)
        self.mark_recorded(given.digest)

    def read_answer(self, given: Given) -> bytes:
        """An answer's bytes. Raises OSError."""
        if given.body or not given.nbytes:
            return given.body
        return self.version_path(given.digest).read_bytes()

    def lines(self, given: Given) -> Iterator[bytes]:
        """The lines of an answer, without holding it in memory. Raises OSError.

        A line above the size limit comes in parts.
        """
        inline = given.body or not given.nbytes
        with BytesIO(given.body) if inline else self.version_path(given.digest).open("rb") as file:
            while line := file.readline(_MAX_LINE_BYTES):
                yield line

    def sweep(self, wanted: Set[str]) -> None:
        """Delete old files that no job references."""
        for path in self.folder.iterdir():
            if path.name.removesuffix(self.suffix) not in wanted:
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _STRAY_S:
                        path.unlink()
