"""Finds a batch size that fits into memory after a step ran out of it. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from protocols.errors import OutOfMemory

Loss = TypeVar("Loss")


def is_out_of_memory(err: BaseException) -> bool:
    """Also recognizes the errors of PyTorch and TensorFlow, by name and text, without importing
    either."""
    return (
        isinstance(err, MemoryError)
        or type(err).__name__ in ("OutOfMemoryError", "ResourceExhaustedError")
        or (isinstance(err, RuntimeError) and "memory" in str(err) and "alloc" in str(err))
    )


def run_or_suggest_batch_size(step: Callable[[int], Loss], batch_size: int) -> Loss:
    """Run `step(batch_size)`, a step of the first n examples of a batch.

    If that runs out of memory, halves the size until a step fits, and raises OutOfMemory with that
    size. The weights are invalid then.
    """
    size = batch_size
    while size:
        try:
            loss = step(size)
        except Exception as err:
            if not is_out_of_memory(err):
                raise
        else:
            if size == batch_size:
                return loss
            break
        # Outside of the handler, whose traceback keeps the memory of the failed step.
        size //= 2
    raise OutOfMemory(batch_size, size)
