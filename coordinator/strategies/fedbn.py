"""FedBN: peers keep their normalization layers. Li et al. 2021, arXiv 2102.07623.

At the server it is FedAvg over the other tensors. Each peer has layers that fit its own features.
It reports metrics of the model with its own layers (`personal_accuracy`), and with the initial
layers that a new peer would have (`accuracy`).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from coordinator.storage.run_spec import Setting
from coordinator.strategies.adapter import StrategyAdapter
from protocols.model import personalization


class FedBN(StrategyAdapter):
    #: Names of tensors, as patterns: such as "norm*,*.bn.*".
    trainer_arguments = MappingProxyType({"layers": "*norm*"})

    def trainer_settings(self, args: Mapping[str, Setting]) -> dict[str, Setting]:
        return {personalization.PERSONAL_LAYERS: self.arguments(args)["layers"]}
