"""q-FedAvg: peers with a high loss count more. Li et al. 2020, arXiv 1905.10497.

The loss is the training loss reported with an update. An update without it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from coordinator.storage.run_spec import Setting
from coordinator.strategies.adapter import Arrays, StrategyAdapter


class QFedAvg(StrategyAdapter):
    feed = "models"
    weighs_peers = False
    weighs_by_metric = True
    defaults = MappingProxyType({"train_loss_key": "loss"})
    memory_copies = 1.1

    def load_state(self, strategy: Any, base: Arrays, state: Mapping[str, Arrays]) -> None:
        from coordinator.transport.flower_records import InMemoryRecord

        strategy.current_arrays = InMemoryRecord(base)

    def required_metric(self, args: Mapping[str, Setting]) -> str:
        return str({**self.defaults, **args}["train_loss_key"])
