"""FedProx: a proximal term holds local training near the round's first weights.

Li et al. 2020, arXiv 1812.06127. At the server it is FedAvg. Flower's class puts `proximal-mu` into
the work's config; like every number that a strategy puts there it reaches the task as a setting
(`proximal_mu`), and the task adds the term: one that knows no such setting refuses the work.
"""

from __future__ import annotations

from types import MappingProxyType

from coordinator.strategies.adapter import StrategyAdapter


class FedProx(StrategyAdapter):
    #: Flower's own default, 0, is FedAvg: whoever asks for FedProx wants the term.
    defaults = MappingProxyType({"proximal_mu": 0.01})
