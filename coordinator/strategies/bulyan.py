"""Bulyan: selects updates by Krum, then averages the values near the median.

El Mhamdi et al. 2018, arXiv 1802.07927.
"""

from __future__ import annotations

from typing import Any

from coordinator.strategies.adapter import StrategyAdapter, require_quorum


class Bulyan(StrategyAdapter):
    feed = "models"
    weighs_peers = False
    takes_sparse = False
    memory_copies = 3.1

    def check_quorum(self, strategy: Any, quorum: int) -> None:
        bad = strategy.num_malicious_nodes
        require_quorum(f"Bulyan against {bad} malicious peers", 4 * bad + 3, quorum)
