"""Runs a generator ahead of its reader, in a thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import Generic, TypeVar

T = TypeVar("T")


class _End(Generic[T]):
    """The end of the generator, or its error."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(items: Generator[T, None, None], depth: int = 1) -> Generator[T, None, None]:
    """The same items in the same order, `depth` of them made ahead.

    An error of `items` is raised in place of its item. Closing this generator closes `items`.
    """
    ready: queue.Queue[T | _End[T]] = queue.Queue(depth)
    closed = threading.Event()

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                ready.put(item)
                if closed.is_set():
                    break
        except BaseException as err:  # raised in the reader
            error = err
        finally:
            items.close()
        ready.put(_End(error))

    worker = threading.Thread(target=work, name="ahead", daemon=True)
    worker.start()
    item: T | _End[T] | None = None
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        closed.set()
        while not isinstance(item, _End):  # the thread may wait for space in the queue
            item = ready.get()
        worker.join()
