"""FedProx: a proximal term keeps local training near the round's base.

Li et al. 2020, arXiv 1812.06127. At the server it is FedAvg. Flower's class puts `proximal-mu` into
the config of the work. Like every number there, it reaches the task as a setting (`proximal_mu`),
and the task adds the term. A task without this setting refuses the work.
"""

from __future__ import annotations

from types import MappingProxyType

from coordinator.strategies.adapter import StrategyAdapter


class FedProx(StrategyAdapter):
    #: Flower's own default, 0, would be FedAvg.
    defaults = MappingProxyType({"proximal_mu": 0.01})
