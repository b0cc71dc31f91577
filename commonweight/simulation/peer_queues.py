"""Peers with a message, by the worker that has their data."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence


class PeerQueues:
    """A queue for each of the workers, on one event loop. `index_of`: the number of each peer."""

    def __init__(self, index_of: Mapping[str, int], workers: int) -> None:
        self._index_of = index_of
        self._queues: list[deque[str]] = [deque() for _ in range(workers)]
        self._has_some = asyncio.Event()

    def __len__(self) -> int:
        return sum(map(len, self._queues))

    def add(self, peers: Sequence[str]) -> None:
        for peer in peers:
            self._queues[self._index_of[peer] % len(self._queues)].append(peer)
        self._has_some.set()

    async def next(self, place: int, count: int) -> list[str]:
        """The next peers of the worker at this place, `count` or fewer: those whose data it may
        have, if there are any. Else the last one of the longest queue."""
        while not len(self):
            self._has_some.clear()
            await self._has_some.wait()
        if not (own := self._queues[place]):
            return [max(self._queues, key=len).pop()]
        # Not too many, so that all workers end at about the same time.
        count = max(1, min(count, len(own) // 2))
        return [own.popleft() for _ in range(count)]
