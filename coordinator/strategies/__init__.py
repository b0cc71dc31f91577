"""Lists the available strategies and their requirements. Flower's classes stay unmodified.

The run decides who works and how long it waits, so a strategy samples among the nodes that the Grid
offers. `runner` passes a round's updates to its `aggregate_train`.
"""

from __future__ import annotations

from coordinator.strategies.adapter import StrategyAdapter
from coordinator.strategies.bulyan import Bulyan
from coordinator.strategies.custom import CustomStrategy
from coordinator.strategies.diloco import DiLoCo
from coordinator.strategies.fedavgm import FedAvgM
from coordinator.strategies.fedbn import FedBN
from coordinator.strategies.fedopt import FedOpt
from coordinator.strategies.fedprox import FedProx
from coordinator.strategies.krum import Krum, MultiKrum
from coordinator.strategies.median import FedMedian, FedTrimmedAvg
from coordinator.strategies.qfedavg import QFedAvg
from coordinator.strategies.scaffold import Scaffold
from coordinator.strategies.svd import NAME as SVD
from coordinator.strategies.svd import Svd
from coordinator.strategies.trees import NAME as TREES
from coordinator.strategies.trees import Trees
from protocols.errors import UnknownName

_ADAPTERS: dict[str, StrategyAdapter] = {
    "fedavg": StrategyAdapter("FedAvg"),
    "fedprox": FedProx("FedProx"),
    "diloco": DiLoCo("DiLoCo"),
    "fedavgm": FedAvgM("FedAvgM"),
    "fedadam": FedOpt("FedAdam"),
    "fedyogi": FedOpt("FedYogi"),
    "fedadagrad": FedOpt("FedAdagrad"),
    "fedmedian": FedMedian("FedMedian"),
    "fedtrimmedavg": FedTrimmedAvg("FedTrimmedAvg"),
    "krum": Krum("Krum"),
    "multikrum": MultiKrum("MultiKrum"),
    "bulyan": Bulyan("Bulyan"),
    "qfedavg": QFedAvg("QFedAvg"),
    "fedbn": FedBN("FedAvg"),
    "scaffold": Scaffold("Scaffold"),
}
#: Of a model and not for `--strategy`.
_OF_MODELS: dict[str, StrategyAdapter] = {SVD: Svd("FedAvg"), TREES: Trees("FedAvg")}


def names() -> list[str]:
    return sorted(_ADAPTERS)


def find(name: str) -> StrategyAdapter:
    """The adapter of a strategy by name or `module:Class`. Raises UnknownName, UsageError."""
    if ":" in name:
        return CustomStrategy(name, _ADAPTERS)
    if name in _OF_MODELS:
        return _OF_MODELS[name]
    if name not in _ADAPTERS:
        known = f"known: {', '.join(names())}; or module:Class"
        if name.startswith("fedxgb"):
            known += "; fedxgb merges trees, which are not tensors of one schema"
        raise UnknownName(f"no strategy {name!r}", known)
    return _ADAPTERS[name]
