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
from coordinator.strategies.adapter import Arrays, Recipe
from protocols.model import personalization

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

MOMENTUM = "momentum"


class DiLoCo(Recipe):
    for_trainers = MappingProxyType({"keep_optimiser": True})

    def flower_class(self) -> type[Strategy]:
        from coordinator.strategies.diloco_server import DiLoCo as Strategy

        return Strategy

    def slots(self, made: Any) -> tuple[str, ...]:
        return (MOMENTUM,)

    def put(self, made: Any, base: Arrays, state: Mapping[str, Arrays]) -> None:
        made.base = base
        made.momentum = state.get(MOMENTUM, {})

    def take(self, made: Any, names: list[str]) -> dict[str, Arrays]:
        return {MOMENTUM: made.momentum}

    def trainer_settings(self, given: Mapping[str, Setting]) -> dict[str, Setting]:
        keeps = self.arguments(given)["keep_optimiser"]
        return {personalization.KEEP_OPTIMISER: True} if keeps else {}
