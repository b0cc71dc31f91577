"""SCAFFOLD: control variates correct the drift of local steps on heterogeneous data.

Karimireddy et al. 2020, arXiv 1910.06378. Versions hold c beside the model
(`protocols.model.personalization`), updates c + (c_i⁺ - c_i), and the trainer does the client's
half (`agent.trainer.personalization`). Flower lacks this strategy, so the server's half is our own
class (`scaffold_server`).

With option 3 an update contains the weights only, as many bytes as FedAvg's. c_i⁺ of option 2
follows from the weights and from the learning rate times the number of steps, which the peer
reports. So c moves by what arrived, even if the codec is lossy.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from coordinator.storage.run_spec import Setting
from coordinator.strategies.adapter import LIMITS, Arrays, StrategyAdapter
from protocols.messages.envelope import Metrics
from protocols.model import personalization
from protocols.model.bfloat16 import difference
from protocols.model.weights import DTYPES, Array, Part, WeightReader

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy


#: Bound of the elements of a control variate, which is float32 or wider.
_MAX_CONTROL = float(np.finfo(np.float32).max)


class Scaffold(StrategyAdapter):
    #: c_i⁺ is the gradient at the base (1), or the mean gradient of the local steps: sent (2) or
    #: derived by the coordinator (3).
    trainer_arguments = MappingProxyType({"option": 2})
    limits = MappingProxyType({**LIMITS, "option": (lambda value: value in (1, 2, 3), "1, 2 or 3")})
    needs_base = True

    def flower_class(self) -> type[Strategy]:
        from coordinator.strategies.scaffold_server import Scaffold as Strategy

        return Strategy

    def load_state(self, strategy: Any, base: Arrays, state: Mapping[str, Arrays]) -> None:
        strategy.base = base

    def required_metric(self, args: Mapping[str, Setting]) -> str:
        return personalization.LR_TIMES_STEPS if self.arguments(args)["option"] == 3 else ""

    def update_error(self, args: Mapping[str, Setting], metrics: Metrics, norm: float) -> str:
        path = metrics.get(personalization.LR_TIMES_STEPS) if self.required_metric(args) else None
        if path and not norm / path <= _MAX_CONTROL:
            metric = personalization.LR_TIMES_STEPS
            return f"a {metric} of {path:g} for a change of {norm:g} makes infinities"
        return ""

    def transform_update(
        self,
        args: Mapping[str, Setting],
        update: WeightReader,
        base: WeightReader,
        metrics: Metrics,
    ) -> WeightReader:
        if self.arguments(args)["option"] != 3:
            return update
        return UpdateWithControls(update, base, metrics[personalization.LR_TIMES_STEPS] or 0.0)

    def trainer_settings(self, args: Mapping[str, Setting]) -> dict[str, Setting]:
        return {personalization.SCAFFOLD: self.arguments(args)["option"]}


class UpdateWithControls:
    """An update with its control variates: c + (c_i⁺ - c_i) = (x - y) / (learning rate · steps).

    A peer without a step leaves c unchanged.
    """

    def __init__(self, update: WeightReader, base: WeightReader, path: float) -> None:
        self.schema = base.schema
        self._update, self._base, self._path = update, base, path

    def read(self, part: Part) -> Array:
        """The elements of a part, flat, in the tensor's dtype."""
        if not personalization.is_derived(part.name):
            return self._update.read(part)
        if not self._path:
            return self._base.read(part)
        of = part._replace(name=part.name.removeprefix(personalization.DERIVED_PREFIX))
        x, y = self._base.read(of), self._update.read(of)
        moved = difference(x, y, self.schema[of.name].dtype) / self._path
        return moved.astype(DTYPES[self.schema[part.name].dtype])
