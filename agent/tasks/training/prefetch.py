"""Reads batches ahead of training on a graphics card, and moves them there."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

K = TypeVar("K")
T = TypeVar("T")

#: Batches in memory beside the one in use.
AHEAD = 2


def read_ahead(read: Callable[[K], T], keys: Iterable[K], ahead: int) -> Generator[T]:
    """`read` of each key, in their order. A thread reads at most `ahead` of them before they are
    asked for; its errors are raised in their place. Closing the iterator ends the thread."""
    waiting = deque[Future[T]]()
    thread = ThreadPoolExecutor(1, "prefetch")
    try:
        for key in keys:
            waiting.append(thread.submit(read, key))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        thread.shutdown(cancel_futures=True)


def read_to(read: Callable[[K], Any], keys: Iterable[K], device: torch.device) -> Generator[Any]:
    """Batches on the device. `read` makes those of a key on the CPU; for a graphics card a thread
    does so ahead, in pinned memory, so it must not use random numbers."""
    if device.type != "cuda":
        yield from (to_device(read(key), device) for key in keys)
        return

    def read_pinned(key: K) -> Any:
        with torch.cuda.device(device):
            return _map(lambda leaf: leaf.pin_memory() if leaf.is_cpu else leaf, read(key))

    with closing(read_ahead(read_pinned, keys, AHEAD)) as batches:
        for batch in batches:
            yield to_device(batch, device)


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on the device; from pinned memory without waiting."""
    return _map(lambda leaf: leaf.to(device, non_blocking=device.type == "cuda"), batch)


def _map(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    return tree_map(lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, batch)
