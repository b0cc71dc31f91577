"""FedAvgM: momentum at the server. Hsu, Qi and Brown 2019, arXiv 1909.06335.

With momentum, its state is one array as large as the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from coordinator.strategies.adapter import Arrays, StrategyAdapter

MOMENTUM = "momentum"


class FedAvgM(StrategyAdapter):
    #: Flower's own default, 0, is FedAvg; 0.9 is the paper's.
    defaults = MappingProxyType({"server_momentum": 0.9})

    def slots(self, strategy: Any) -> tuple[str, ...]:
        return (MOMENTUM,) if strategy.server_momentum > 0 else ()

    def load_state(self, strategy: Any, base: Arrays, state: Mapping[str, Arrays]) -> None:
        from flwr.app import Array, ArrayRecord

        strategy.current_arrays = ArrayRecord(
            {name: Array(np.asarray(base[name])) for name in base}
        )
        strategy.momentum_vector = [state[MOMENTUM][name] for name in base] if state else None

    def dump_state(self, strategy: Any, names: list[str]) -> dict[str, Arrays]:
        return {MOMENTUM: dict(zip(names, strategy.momentum_vector, strict=True))}
