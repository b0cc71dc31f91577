"""A strategy of one's own: `module:Class`, installed beside the coordinator.

The class is Flower's `Strategy` or a child of one. It is imported by name from what is installed
on the coordinator's machine, and only an operator names it: nothing of it comes over the wire. If
it leaves `aggregate_train` as it found it, it is fed like the class that it took it from. Else it
gets every reply whole, floating-point tensors under their names, in the order of the peers' names.

It survives a restart of the coordinator with what Flower's class keeps, and with the arrays that
its own `get_state() -> dict[str, array]` gives and `set_state(arrays)` takes, if it has these two.
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
    """Raises UnknownName, UsageError. `known`: the adapters of Flower's classes."""

    limits = MappingProxyType({})
    reads_weights = True

    def __init__(self, name: str, known: Mapping[str, StrategyAdapter]) -> None:
        super().__init__(name)
        self._class = _load_class(name)
        by_class = {adapter.flower: adapter for adapter in reversed(list(known.values()))}
        near = next(
            (c for c in self._class.__mro__ if c.__name__ in by_class and _is_flowers_own(c)), None
        )
        self._like = by_class[near.__name__] if near is not None else StrategyAdapter("Strategy")
        giver = next(c for c in self._class.__mro__ if "aggregate_train" in c.__dict__)
        if _is_flowers_own(giver):
            self.feed, self.memory_copies = self._like.feed, self._like.memory_copies
        else:
            self.feed, self.memory_copies = "models", 3.0
        self.defaults = self._like.defaults if near is not None else {}

    def flower_class(self) -> type[Strategy]:
        return self._class

    def required_metric(self, args: Any) -> str:
        return self._like.required_metric(args)

    def check_quorum(self, strategy: Any, quorum: int) -> None:
        self._like.check_quorum(strategy, quorum)

    def slots(self, strategy: Any) -> tuple[str, ...]:
        return self._like.slots(strategy)

    def load_state(self, strategy: Any, base: Arrays, state: Mapping[str, Arrays]) -> None:
        self._like.load_state(strategy, base, state)

    def dump_state(self, strategy: Any, names: list[str]) -> dict[str, Arrays]:
        return self._like.dump_state(strategy, names)

    def dump_extra(self, strategy: Any) -> Arrays | None:
        return dict(strategy.get_state()) if hasattr(strategy, "get_state") else None

    def load_extra(self, strategy: Any, arrays: Arrays) -> None:
        strategy.set_state({name: np.array(arrays[name]) for name in arrays})


def _load_class(name: str) -> type[Strategy]:
    from flwr.serverapp.strategy import Strategy

    module, _, attribute = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as err:  # importing it runs code that is not ours
        what = strip_controls(f"{type(err).__name__}: {err}"[:400])
        raise UnknownName(
            f"the strategy {name!r} cannot be loaded on the coordinator: {what}",
            "install its package into the coordinator's environment",
        ) from err
    if not (inspect.isclass(found) and issubclass(found, Strategy)):
        raise UsageError(f"{name} is no class that extends flwr.serverapp.strategy.Strategy")
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise UsageError(f"{name} lacks {missing}")
    if hasattr(found, "get_state") != hasattr(found, "set_state"):
        raise UsageError(f"{name} has only one of get_state and set_state")
    return found


def _is_flowers_own(cls: type[Any]) -> bool:
    """True for one of Flower's own classes."""
    return cls.__module__.startswith("flwr.")
