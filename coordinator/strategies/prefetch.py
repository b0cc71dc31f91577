"""Runs a generator ahead of its reader, in a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

T = TypeVar("T")

_END = object()


def prefetch(items: Generator[T, None, None], depth: int = 2) -> Generator[T, None, None]:
    """The same items in the same order, up to `depth` of them made ahead.

    An error of `items` is raised in place of its item. Closing this generator closes `items`.
    """
    with closing(items), ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        ready = deque(thread.submit(next, items, _END) for _ in range(depth))
        try:
            while (item := ready.popleft().result()) is not _END:
                ready.append(thread.submit(next, items, _END))
                yield item  # type: ignore[misc]
        finally:
            for future in ready:
                future.cancel()
