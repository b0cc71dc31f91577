"""SCAFFOLD: control variates correct what local steps on unlike data lead astray.

Karimireddy et al. 2020, arXiv 1910.06378. Versions hold c beside the model (`protocols.schemes`),
updates c + (c_i⁺ - c_i), and the trainer does the client's half (`agent.personal`); Flower has no
such strategy, so the server's half is a class of ours: `control_variates`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from coordinator.facts import Setting
from coordinator.strategies.recipe import LIMITS, Arrays, Recipe
from protocols import schemes

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy


class Scaffold(Recipe):
    #: c_i⁺ as the gradient at the version (1), or as the mean of those on the way (2).
    for_trainers = MappingProxyType({"option": 2})
    limits = MappingProxyType({**LIMITS, "option": (lambda value: value in (1, 2), "1 or 2")})
    needs_base = True

    def flower_class(self) -> type[Strategy]:
        from coordinator.strategies.control_variates import Scaffold as Strategy

        return Strategy

    def put(self, made: Any, base: Arrays, state: Mapping[str, Arrays]) -> None:
        made.base = base

    def trainer_settings(self, given: Mapping[str, Setting]) -> dict[str, Setting]:
        return {schemes.SCAFFOLD: self.arguments(given)["option"]}
