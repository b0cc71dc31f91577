"""Background tasks for the duration of a block. If one fails, all end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

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
            log.error("%s failed", task.get_name(), exc_info=err)
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
