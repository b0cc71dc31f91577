"""Custom strategies: `module:Class`, installed in the coordinator's environment.

The class is Flower's `Strategy` or a subclass. It is imported by name from packages on the
coordinator's machine, and only an operator can name it: no code arrives over the network. If it
does not override `aggregate_train`, it receives updates like its parent class. Otherwise it gets
every reply whole, with floating-point tensors under their names, sorted by the peers' ids.

After a restart of the coordinator, it has the state of Flower's class, and the arrays from its own
`get_state() -> dict[str, array]`, passed to `set_state(arrays)`, if it has these two methods.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from coordinator.strategies.adapter import Arrays, StrategyAdapter
from protocols.errors import UnknownName, UsageError
from protocols.messages.envelope import strip_controls

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy


class CustomStrategy(StrategyAdapter):
    """The adapter of a custom class. `known`: those of Flower's. Raises UnknownName, UsageError."""

    limits = MappingProxyType({})
    reads_weights = True

    def __init__(self, name: str, known: Mapping[str, StrategyAdapter]) -> None:
        super().__init__(name)
        self._class = _load_class(name)
        by_class = {adapter.flower: adapter for adapter in reversed(list(known.values()))}
        parents = [c for c in self._class.__mro__ if c.__name__ in by_class and _is_flowers_own(c)]
        self._parent = by_class[parents[0].__name__] if parents else StrategyAdapter("Strategy")
        definer = next(c for c in self._class.__mro__ if "aggregate_train" in c.__dict__)
        if _is_flowers_own(definer):
            self.feed, self.memory_copies = self._parent.feed, self._parent.memory_copies
        else:
            self.feed, self.memory_copies = "models", 3.0
        self.defaults = self._parent.defaults

    def flower_class(self) -> type[Strategy]:
        return self._class

    def required_metric(self, args: Any) -> str:
        return self._parent.required_metric(args)

    def check_quorum(self, strategy: Any, quorum: int) -> None:
        self._parent.check_quorum(strategy, quorum)

    def slots(self, strategy: Any) -> tuple[str, ...]:
        return self._parent.slots(strategy)

    def load_state(self, strategy: Any, base: Arrays, state: Mapping[str, Arrays]) -> None:
        self._parent.load_state(strategy, base, state)

    def dump_state(self, strategy: Any, names: list[str]) -> dict[str, Arrays]:
        return self._parent.dump_state(strategy, names)

    def dump_extra(self, strategy: Any) -> Arrays | None:
        return dict(strategy.get_state()) if hasattr(strategy, "get_state") else None

    def load_extra(self, strategy: Any, arrays: Arrays) -> None:
        strategy.set_state({name: np.array(arrays[name]) for name in arrays})


def _load_class(name: str) -> type[Strategy]:
    from flwr.serverapp.strategy import Strategy

    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as err:  # importing runs the code of the package
        reason = strip_controls(f"{type(err).__name__}: {err}"[:400])
        raise UnknownName(
            f"the strategy {name!r} cannot be loaded on the coordinator: {reason}",
            "install its package in the coordinator's environment",
        ) from err
    if not (inspect.isclass(found) and issubclass(found, Strategy)):
        raise UsageError(f"{name} is not a class that extends flwr.serverapp.strategy.Strategy")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise UsageError(f"{name} lacks {missing}")
    if hasattr(found, "get_state") != hasattr(found, "set_state"):
        raise UsageError(f"{name} has only one of get_state and set_state")
    return found


def _is_flowers_own(cls: type[Any]) -> bool:
    """True for one of Flower's own classes."""
    return cls.__module__.startswith("flwr.")
