"""DiLoCo: many local steps of AdamW, then Nesterov momentum on the mean change. Few rounds.

Douillard et al. 2023, arXiv 2311.08105. Flower lacks this strategy, so the server's part is our own
class (`diloco_server`), with one state array as large as the model. The peers keep their optimizer
state from round to round and never send it (`agent.trainer.personalization`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from coordinator.storage.run_spec import Setting
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
