"""Background tasks for the duration of a block. If one fails, all end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

from protocols.errors import CommonweightError

log = logging.getLogger("commonweight.hub")


@asynccontextmanager
async def supervised(
    work: Mapping[str, Coroutine[Any, Any, None]], stop: Callable[[], None]
) -> AsyncIterator[None]:
    """Run the named `work`. If a part fails, `stop()` is called and the block raises its error."""
    tasks = [asyncio.create_task(part, name=name) for name, part in work.items()]
    failure: list[BaseException] = []

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (err := task.exception()) is not None:
            is_known = isinstance(err, CommonweightError)
            log.error("%s failed: %s", task.get_name(), err, exc_info=None if is_known else err)
            failure.append(err)
            stop()

    for task in tasks:
        task.add_done_callback(ended)
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if failure:
        raise failure[0]
