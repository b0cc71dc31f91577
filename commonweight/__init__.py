"""The Python API of commonweight: `import commonweight as cw`.

    fleet = cw.connect()
    run = fleet.train("tabular", target="outcome", rounds=20)
    for r in run.rounds():
        print(r.number, r.metrics)

    class Gait(cw.TorchTask): ...  # a task of your own: docs/tasks.md

The names in `__all__` are public and follow semantic versioning. They are imported when they are
used, so that `import commonweight` alone takes little. It may import `agent`, `coordinator` and
`protocols`; none of them imports it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agent.tasks.images.pictures import pictures
    from agent.tasks.training.keras_task import KerasTask
    from agent.tasks.training.module_task import TorchTask
    from agent.tasks.training.sklearn_task import SklearnTask
    from commonweight.fleet import Fleet, Peer, connect, join
    from commonweight.jobs import Analysis, Measurement, Score
    from commonweight.run import Round, Run
    from commonweight.simulation.simulate import simulate
    from protocols import VERSION as __version__
    from protocols import errors

__all__ = [
    "Analysis",
    "Fleet",
    "KerasTask",
    "Measurement",
    "Peer",
    "Round",
    "Run",
    "Score",
    "SklearnTask",
    "TorchTask",
    "__version__",
    "connect",
    "errors",
    "join",
    "pictures",
    "simulate",
]

#: Where each public name is, as "module" or "module:name".
_PLACES = {
    "Analysis": "commonweight.jobs:Analysis",
    "Fleet": "commonweight.fleet:Fleet",
    "KerasTask": "agent.tasks.training.keras_task:KerasTask",
    "Measurement": "commonweight.jobs:Measurement",
    "Peer": "commonweight.fleet:Peer",
    "Round": "commonweight.run:Round",
    "Run": "commonweight.run:Run",
    "Score": "commonweight.jobs:Score",
    "SklearnTask": "agent.tasks.training.sklearn_task:SklearnTask",
    "TorchTask": "agent.tasks.training.module_task:TorchTask",
    "__version__": "protocols:VERSION",
    "connect": "commonweight.fleet:connect",
    "errors": "protocols.errors",
    "join": "commonweight.fleet:join",
    "pictures": "agent.tasks.images.pictures:pictures",
    "simulate": "commonweight.simulation.simulate:simulate",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    found = import_module(module)
    value = globals()[name] = getattr(found, attribute) if attribute else found
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
