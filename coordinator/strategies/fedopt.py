"""FedAdam, FedYogi, FedAdagrad: adaptive optimisers at the server.

Reddi et al. 2021, arXiv 2003.00295. Each remembers two arrays for each weight: of the deltas, and
of their squares. FedAdam's bias correction follows the number of the round, which it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordinator.strategies.adapter import Arrays, Recipe

FIRST, SECOND = "first_moment", "second_moment"


class FedOpt(Recipe):
    def slots(self, made: Any) -> tuple[str, ...]:
        return (FIRST, SECOND)

    def put(self, made: Any, base: Arrays, state: Mapping[str, Arrays]) -> None:
        made.current_arrays = dict(base)
        made.m_t = dict(state[FIRST]) if state else None
        made.v_t = dict(state[SECOND]) if state else None

    def take(self, made: Any, names: list[str]) -> dict[str, Arrays]:
        return {FIRST: made.m_t, SECOND: made.v_t}
