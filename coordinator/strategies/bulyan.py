"""Bulyan: Krum's choice, then a mean of what lies near the median.

El Mhamdi et al. 2018, arXiv 1802.07927.
"""

from __future__ import annotations

from typing import Any

from coordinator.storage.run_events import RunSpec
from coordinator.strategies.adapter import Recipe, least
from coordinator.strategies.median import refuse_sparse


class Bulyan(Recipe):
    feed = "models"
    weighs_peers = False
    copies = 3.1

    def check(self, spec: RunSpec) -> None:
        super().check(spec)
        refuse_sparse(spec)

    def check_quorum(self, made: Any, quorum: int) -> None:
        bad = made.num_malicious_nodes
        least(f"Bulyan against {bad} malicious peers", 4 * bad + 3, quorum)
