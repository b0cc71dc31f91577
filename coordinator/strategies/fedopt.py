"""FedAdam, FedYogi, FedAdagrad: adaptive optimizers at the server.

Reddi et al. 2021, arXiv 2003.00295. The state is two arrays as large as the model: moments of the
changes and of their squares. FedAdam's bias correction depends on the number of the round.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coordinator.strategies.adapter import Arrays, StrategyAdapter

FIRST, SECOND = "first_moment", "second_moment"


class FedOpt(StrategyAdapter):
    def slots(self, strategy: Any) -> tuple[str, ...]:
        return (FIRST, SECOND)

    def load_state(self, strategy: Any, base: Arrays, state: Mapping[str, Arrays]) -> None:
        strategy.current_arrays = dict(base)
        strategy.m_t = dict(state[FIRST]) if state else None
        strategy.v_t = dict(state[SECOND]) if state else None

    def dump_state(self, strategy: Any, names: list[str]) -> dict[str, Arrays]:
        return {FIRST: strategy.m_t, SECOND: strategy.v_t}
