"""Krum and MultiKrum: select the updates that are nearest to their neighbors.

Blanchard et al. 2017, arXiv 1703.02757. Distances are between whole models, so all updates are in
memory at once.
"""

from __future__ import annotations

from typing import Any

from coordinator.strategies.adapter import StrategyAdapter, require_quorum
from protocols.errors import CannotBeMet


class Krum(StrategyAdapter):
    feed = "models"
    weighs_peers = False  # it selects one update
    memory_copies = 3.1  # message, flat vectors, and those doubled for the products

    def check_quorum(self, strategy: Any, quorum: int) -> None:
        bad = strategy.num_malicious_nodes
        require_quorum(f"{self.flower} against {bad} malicious peers", 2 * bad + 3, quorum)


class MultiKrum(Krum):
    weighs_peers = True

    def check_quorum(self, strategy: Any, quorum: int) -> None:
        super().check_quorum(strategy, quorum)
        honest = quorum - strategy.num_malicious_nodes
        if strategy.num_nodes_to_select > honest:
            raise CannotBeMet(
                f"num_nodes_to_select={strategy.num_nodes_to_select} of {quorum} updates takes in "
                f"malicious ones: {honest} are honest",
                f"--strategy-arg num_nodes_to_select={honest} or fewer",
            )
