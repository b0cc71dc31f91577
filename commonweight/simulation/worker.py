"""A worker's process, `python -m commonweight.simulation.worker`: a plan, then jobs, over stdin.

Each frame is its length in 4 bytes, most significant first, and msgpack.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import signal
import struct
import sys
from collections.abc import Iterator
from typing import IO

from protocols.local import programs

HEADER = struct.Struct(">I")
#: Set in workers, so that the import of a task's file that simulates starts no simulation.
VARIABLE = "COMMONWEIGHT_SIMULATION_WORKER"
#: Different texts of peers that a worker prints.
MAX_SAID = 20


def prepare() -> None:
    """Make this process a worker."""
    os.environ[VARIABLE] = "1"
    # The files of a simulated peer need not survive a power cut.
    os.fsync = os.fdatasync = lambda fd: None


def main() -> None:
    """Answer jobs until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the parent closes stdin
    jobs, out = programs.take_pipes()
    prepare()

    from commonweight.simulation.peer import Answer, Worker, decode_jobs, decode_plan, encode

    worker, said = Worker(decode_plan(_read(jobs))), set[str]()
    is_frozen = False
    while frame := _read(jobs):
        answers = list[Answer]()
        for job in decode_jobs(frame):
            with _saying_once(said):
                answers.append(worker.work(job))
        told = encode(answers)
        if not is_frozen:  # modules stay, so that no collection looks at them again
            gc.freeze()
            is_frozen = True
        out.write(HEADER.pack(len(told)) + told)
        out.flush()


@contextlib.contextmanager
def _saying_once(said: set[str]) -> Iterator[None]:
    """Print what the work of a peer writes to stderr, such as the trace of an error, unless that of
    an earlier one wrote the same."""
    text = io.StringIO()
    try:
        with contextlib.redirect_stderr(text):
            yield
    finally:
        written = text.getvalue()
        if written not in said and len(said) < MAX_SAID:
            said.add(written)
            sys.stderr.write(written)


def _read(source: IO[bytes]) -> bytes:
    """The next frame; empty at the end."""
    head = source.read(HEADER.size)
    return source.read(*HEADER.unpack(head)) if len(head) == HEADER.size else b""


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # threads of torch and gRPC may hang a normal exit
