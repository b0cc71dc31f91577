"""How many examples a step can take: found by trying, where a step ran out of memory. Pure."""

from __future__ import annotations

from collections.abc import Callable

from protocols.errors import OutOfMemory


def is_out_of_memory(err: BaseException) -> bool:
    """True also for the frameworks' own errors, told by name and text: neither is imported."""
    return (
        isinstance(err, MemoryError)
        or type(err).__name__ in ("OutOfMemoryError", "ResourceExhaustedError")
        or (isinstance(err, RuntimeError) and "memory" in str(err) and "alloc" in str(err))
    )


def run_or_suggest_batch_size(step: Callable[[int], float], batch_size: int) -> float:
    """`step(batch_size)`; where that runs out of memory, raises OutOfMemory with what would do.

    `step(n)` makes a step of the first n examples of a batch. The largest half of a half … that
    goes is told; the weights are spoilt then, and the work is over.
    """
    try:
        return step(batch_size)
    except Exception as err:
        if not is_out_of_memory(err):
            raise
    # Out of the handler, which holds all that the failed step had.
    fits = batch_size // 2
    while fits:
        try:
            step(fits)
            break
        except Exception as err:
            if not is_out_of_memory(err):
                raise
        fits //= 2
    raise OutOfMemory(batch_size, fits)
