"""A worker of a simulation in a thread of the test, where it starts at once."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from commonweight.simulation import peer
from commonweight.simulation.peer import Answer, Job
from commonweight.simulation.plan import Plan


class ThreadWorker:
    """Answers in a thread of this process."""

    def __init__(self, plan: Plan) -> None:
        self._worker = peer.Worker(plan)

    async def answer(self, jobs: Sequence[Job]) -> list[Answer]:
        return await asyncio.to_thread(lambda: list(map(self._worker.work, jobs)))

    async def close(self) -> None:
        """The thread ends with its work."""
