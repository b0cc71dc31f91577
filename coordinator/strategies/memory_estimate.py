"""Estimates the memory of strategies that need all updates at once, before a round starts."""

from __future__ import annotations

import os

import psutil

from coordinator.storage.run_events import RunSpec
from coordinator.strategies.adapter import StrategyAdapter
from coordinator.strategies.state import state_schema
from protocols.errors import CannotBeMet
from protocols.model.weights import Schema

#: A round that needs more than this multiple of the free memory would end in swapping or a kill.
_MAX_OVERCOMMIT = 1.5
_MB = 1_000_000


def check_memory(
    adapter: StrategyAdapter, spec: RunSpec, schema: Schema, peers: int
) -> tuple[int, str]:
    """The bytes that a round of `peers` needs, and a warning. Both are empty for most strategies.

    Raises CannotBeMet if even the quorum needs far more than the free memory.
    """
    model_bytes = sum(tensor.nbytes for tensor in state_schema(schema).values())
    needed, least = (adapter.memory_bytes(number, model_bytes) for number in (peers, spec.quorum))
    if not needed:
        return 0, ""
    free, kind = _memory_bytes()
    one = sum(tensor.nbytes for tensor in schema.values())
    if least > _MAX_OVERCOMMIT * free:
        raise CannotBeMet(
            f"{spec.strategy} needs all updates in memory at once: {_mb(least)} for a quorum of "
            f"{spec.quorum} with a model of {_mb(one)}; {_mb(free)} are {kind}",
            "use fedmedian or fedtrimmedavg, which need less memory, or a smaller quorum",
        )
    return needed, (
        f"{spec.strategy} needs all updates in memory at once: about {_mb(needed)} for {peers} "
        f"peers with a model of {_mb(one)}; {_mb(free)} are {kind}"
    )


def _memory_bytes() -> tuple[int, str]:
    """Free memory; where a service unit hides /proc/meminfo (ProcSubset=pid), all memory."""
    try:
        return psutil.virtual_memory().available, "free"
    except OSError:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "installed"


def _mb(size_bytes: float) -> str:
    return f"{size_bytes / _MB:,.0f} MB" if size_bytes >= _MB else f"{size_bytes / 1000:,.1f} kB"
