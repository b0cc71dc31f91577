"""Work ahead: an iterator that runs in a thread of its own while its reader does something else."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import Generic, TypeVar

T = TypeVar("T")


class _End(Generic[T]):
    """The iterator has come to its end, or to an error."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def prefetch(items: Generator[T, None, None], depth: int = 1) -> Generator[T, None, None]:
    """The same items in the same order, `depth` of them made before they are asked for.

    An error of `items` is raised where its item would have come. A reader that gives up closes
    `items` and waits for that.
    """
    made: queue.Queue[T | _End[T]] = queue.Queue(depth)
    given_up = threading.Event()

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                made.put(item)
                if given_up.is_set():
                    break
        except BaseException as err:  # told to the reader, whatever it is
            error = err
        finally:
            items.close()
        made.put(_End(error))

    worker = threading.Thread(target=work, name="ahead", daemon=True)
    worker.start()
    item: T | _End[T] | None = None
    try:
        while not isinstance(item := made.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        given_up.set()
        while not isinstance(item, _End):  # it may stand before a full queue
            item = made.get()
        worker.join()
