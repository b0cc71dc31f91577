"""Flower's strategies by name, unmodified.

The run decides who works and how long it waits, so every strategy samples all nodes that the Grid
offers. One aggregated reply stands for all: a weighted mean of updates is itself an update.
"""

from __future__ import annotations

from collections.abc import Mapping

from protocols.errors import UnknownName, UsageFault

_NAMES = {"fedavg": "FedAvg"}


def names() -> list[str]:
    return sorted(_NAMES)


def check(name: str, arguments: Mapping[str, object]) -> None:
    """Raise UnknownName or UsageFault unless `make` will work. Does not import Flower."""
    if name not in _NAMES:
        raise UnknownName(f"no strategy {name!r}", f"known: {', '.join(names())}")
    if arguments:
        raise UsageFault(f"{name} takes no arguments; given: {', '.join(sorted(arguments))}")


def make(name: str, arguments: Mapping[str, object]):  # type: ignore[no-untyped-def]
    """A new strategy object. Raises UnknownName, UsageFault."""
    from flwr.serverapp import strategy

    check(name, arguments)
    return getattr(strategy, _NAMES[name])(
        min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1, **arguments
    )
