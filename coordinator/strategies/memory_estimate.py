"""What a strategy that needs all updates at once takes of the machine's memory, said beforehand."""

from __future__ import annotations

import psutil

from coordinator.storage.run_events import RunSpec
from coordinator.strategies.adapter import StrategyAdapter
from coordinator.strategies.state import state_schema
from protocols.errors import CannotBeMet
from protocols.model.weights import Schema

#: A round is not begun if it takes so many times what is free: it would end in swapping or a kill.
_MAX_OVERCOMMIT = 1.5
_MB = 1_000_000


def needed_bytes(adapter: StrategyAdapter, schema: Schema, peers: int) -> int:
    """What closing a round takes with so many updates; 0 if it does not grow with them."""
    model_bytes = sum(spec.nbytes for spec in state_schema(schema).values())
    return adapter.memory_bytes(peers, model_bytes)


def check_memory(
    adapter: StrategyAdapter, spec: RunSpec, schema: Schema, peers: int
) -> tuple[int, str]:
    """The bytes that a round of `peers` takes, and a warning: both empty for most strategies.

    Raises CannotBeMet if even the quorum takes far more than is free.
    """
    needed, least = (needed_bytes(adapter, schema, n) for n in (peers, spec.quorum))
    if not needed:
        return 0, ""
    free = psutil.virtual_memory().available
    one = sum(tensor.nbytes for tensor in schema.values())
    if least > _MAX_OVERCOMMIT * free:
        raise CannotBeMet(
            f"{spec.strategy} holds all updates in memory at once: {_mb(least)} for a quorum of "
            f"{spec.quorum} with a model of {_mb(one)}; {_mb(free)} are free",
            "fedmedian or fedtrimmedavg need no more memory for more peers; or a smaller quorum",
        )
    return needed, (
        f"{spec.strategy} holds all updates in memory at once: about {_mb(needed)} for {peers} "
        f"peers with a model of {_mb(one)}; {_mb(free)} are free"
    )


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / _MB:,.0f} MB" if size_bytes >= _MB else f"{size_bytes / 1000:,.1f} kB"
