"""The files of jobs: the rows of their units and long answers, each named by its digest.

    GET /cw/v1/inputs/{digest}       the rows of a unit                    (an enrolled peer)
    PUT /cw/v1/answers/{digest}      an answer's bytes, into the spool     (an enrolled peer)

`transport.weights` serves these routes. The folder is apart from that of runs, because a run's
spool is emptied at the end of each round.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Set
from io import BytesIO
from pathlib import Path

from coordinator.jobs.state import Job, Unit
from coordinator.storage.job_events import AnswerInfo, JobSpec
from coordinator.storage.weight_store import WeightStore
from protocols.errors import BadMessage
from protocols.local.os_errors import os_errors_as
from protocols.messages.jobs import INLINE_MAX_BYTES, Scatter

#: One answer is the result of a few seconds of work.
MAX_ANSWER_BYTES = 256 * 1024 * 1024
#: Of the answer to a unit of rows: its column names, and each row.
MAX_TABLE_HEAD_BYTES, MAX_ANSWER_BYTES_PER_ROW = 1 << 20, 1 << 16
#: Of the answer to a query, whose cells are bounded.
MAX_ANALYSIS_BYTES = 16 << 20
_MAX_LINE_BYTES = 1 << 20
#: The CLI writes rows shortly before their job starts: younger unreferenced files stay.
_STRAY_S = 3600.0


def max_upload_bytes(job: Job, unit: Unit) -> int:
    """The size of the largest answer to this unit that may come as an upload; 0 for none."""
    match job.spec.kind:
        case "scatter":
            most = MAX_TABLE_HEAD_BYTES + job.rows(unit) * MAX_ANSWER_BYTES_PER_ROW
            return min(most, MAX_ANSWER_BYTES)
        case "private":  # scores are in the message
            return 0
        case "analyze":
            return MAX_ANALYSIS_BYTES


class JobStore(WeightStore):
    """Inputs and answers of jobs, and the uploads in progress."""

    suffix = ".bytes"

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        super().__init__(folder)

    def write_input(self, spec: JobSpec, unit: Unit) -> Scatter:
        """Write the rows of a unit to a file that peers can download; return the message for them.

        Raises BadMessage if the job's input is no longer on disk.
        """
        blocks = spec.blocks[unit.first : unit.stop]
        start = sum(block.nbytes for block in spec.blocks[: unit.first])
        nbytes = sum(block.nbytes for block in blocks)
        failed = os_errors_as(BadMessage, "the job's input cannot be read")
        with failed, self.version_path(spec.input).open("rb") as file:
            file.seek(start)
            data = file.read(nbytes)
        if len(data) != nbytes:
            raise BadMessage("the job's input was cut short on disk")
        digest = hashlib.sha256(data).hexdigest()
        # Without fsync: after a power cut the file is written again.
        temporary = self.version_path(digest).with_suffix(".tmp")
        temporary.write_bytes(data)
        temporary.replace(self.version_path(digest))
        return Scatter(
            input=digest,
            sizes=tuple(block.nbytes for block in blocks),
            rows=tuple(block.rows for block in blocks),
            suffix=spec.suffix,
        )

    def save_answer(self, peer: str, answer: AnswerInfo) -> None:
        """Store an uploaded answer. Raises BadMessage if it is missing or has another size."""
        if answer.body or not answer.nbytes:
            return
        # It may be stored since before a restart, or from another peer with the same answer.
        if self.has(answer.digest):
            self.uploads.drop(peer, answer.digest)
            return
        upload = self.uploads.path(peer, answer.digest)
        try:
            size = upload.stat().st_size
        except OSError as err:
            raise BadMessage("the answer's bytes were not uploaded") from err
        if size != answer.nbytes or size <= INLINE_MAX_BYTES:
            raise BadMessage(f"the answer has {size} bytes instead of {answer.nbytes}")
        try:
            self.promote_upload(peer, answer.digest)
        except FileNotFoundError as err:
            raise BadMessage("the peer has replaced the answer's bytes") from err
        self.mark_recorded(answer.digest)

    def read_answer(self, answer: AnswerInfo) -> bytes:
        """The bytes of an answer. Raises OSError."""
        if answer.body or not answer.nbytes:
            return answer.body
        return self.version_path(answer.digest).read_bytes()

    def lines(self, answer: AnswerInfo) -> Iterator[bytes]:
        """The lines of an answer, read one at a time. Raises OSError.

        A line above the size limit is split.
        """
        inline = answer.body or not answer.nbytes
        with (
            BytesIO(answer.body) if inline else self.version_path(answer.digest).open("rb") as file
        ):
            while line := file.readline(_MAX_LINE_BYTES):
                yield line

    def sweep(self, wanted: Set[str]) -> None:
        """Delete old files that no job references."""
        for path in self.folder.iterdir():
            if path.name.removesuffix(self.suffix) not in wanted:
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _STRAY_S:
                        path.unlink()
