"""Worker processes, for the event loop of the coordinator's side."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from typing import Protocol

from commonweight.simulation.peer import Answer, Job, decode_answers, encode
from commonweight.simulation.plan import Plan
from commonweight.simulation.worker import HEADER
from protocols.errors import CommonweightError

log = logging.getLogger("commonweight")

#: Tries of a job whose worker is killed.
MAX_TRIES = 3


class WorkerKilled(CommonweightError, code="killed"):
    """A worker ended during its work, as by a lack of memory."""


class Worker(Protocol):
    """Answers some jobs at a time."""

    async def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        """The peers' replies, in the same order. Raises WorkerKilled."""
        ...

    async def close(self) -> None: ...


class ProcessWorker:
    """A process on this machine. It is started with the first job, and again after it has ended."""

    def __init__(self, plan: Plan) -> None:
        self._plan = encode(plan)
        self._process: Process | None = None

    @property
    def pid(self) -> int:
        """The process id; 0 if none runs."""
        return self._process.pid if self._process else 0

    async def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        for _ in range(MAX_TRIES):
            try:
                return decode_answers(await self._exchange(encode(jobs)))
            except (OSError, asyncio.IncompleteReadError):
                indices = ", ".join(str(job.index) for job in jobs)
                log.warning("a worker was killed in the work of peer %s", indices)
                await self.close()
        raise WorkerKilled(
            f"its worker was killed {MAX_TRIES} times", "fewer --workers need less memory"
        )

    async def _exchange(self, frame: bytes) -> bytes:
        process = self._process or await self._start()
        assert process.stdout is not None
        self._write(process, frame)
        size = HEADER.unpack(await process.stdout.readexactly(HEADER.size))[0]
        return await process.stdout.readexactly(size)

    async def _start(self) -> Process:
        threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = await asyncio.create_subprocess_exec(
            # -P: files in the current folder must not shadow modules.
            *(sys.executable, "-P", "-m", "commonweight.simulation.worker"),
            stdin=PIPE,
            stdout=PIPE,
            env={**os.environ, **threads},
        )
        self._write(self._process, self._plan)
        return self._process

    @staticmethod
    def _write(process: Process, frame: bytes) -> None:
        assert process.stdin is not None
        process.stdin.write(HEADER.pack(len(frame)) + frame)

    async def close(self) -> None:
        """End the process, also during work. Its peers continue from their folders."""
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                process.kill()
            await process.wait()
