"""DiLoCo: few exchanges. Many local steps of AdamW, Nesterov's momentum on their mean change.

Douillard et al. 2023, arXiv 2311.08105. Flower has no such strategy, so the server's half is a
class of ours (`nesterov`), which remembers one array for each weight. The peers' optimisers go on
from round to round, and stay at home (`agent.trainer.personalization`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from coordinator.storage.run_events import Setting
from coordinator.strategies.adapter import Arrays, StrategyAdapter
from protocols.model import personalization

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

MOMENTUM = "momentum"


class DiLoCo(StrategyAdapter):
    trainer_arguments = MappingProxyType({"keep_optimiser": True})

    def flower_class(self) -> type[Strategy]:
        from coordinator.strategies.diloco_server import DiLoCo as Strategy

        return Strategy

    def slots(self, strategy: Any) -> tuple[str, ...]:
        return (MOMENTUM,)

    def load_state(self, strategy: Any, base: Arrays, state: Mapping[str, Arrays]) -> None:
        strategy.base = base
        strategy.momentum = state.get(MOMENTUM, {})

    def dump_state(self, strategy: Any, names: list[str]) -> dict[str, Arrays]:
        return {MOMENTUM: strategy.momentum}

    def trainer_settings(self, args: Mapping[str, Setting]) -> dict[str, Setting]:
        keeps = self.arguments(args)["keep_optimiser"]
        return {personalization.KEEP_OPTIMIZER: True} if keeps else {}
