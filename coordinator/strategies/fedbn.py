"""FedBN: normalisation layers stay at home. Li et al. 2021, arXiv 2102.07623.

At the server it is FedAvg over the other tensors. Each peer has layers of its own, that fit its own
features; it also tells how well the model does with them (`personal_accuracy`), beside how it does
with the first ones, as a newcomer would have it (`accuracy`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from coordinator.storage.run_events import Setting
from coordinator.strategies.adapter import StrategyAdapter
from protocols.model import personalization


class FedBN(StrategyAdapter):
    #: Names of tensors, as patterns: such as "norm*,*.bn.*".
    trainer_arguments = MappingProxyType({"layers": "*norm*"})

    def trainer_settings(self, args: Mapping[str, Setting]) -> dict[str, Setting]:
        return {personalization.PERSONAL_LAYERS: self.arguments(args)["layers"]}
