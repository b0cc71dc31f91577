"""The docs' page on Python and HTTP, from the code: signatures, docstrings, routes."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any, ForwardRef, NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import agent.tasks  # noqa: E402
import commonweight as cw  # noqa: E402
from agent.tasks import capabilities  # noqa: E402
from coordinator.api.routes import fleet, jobs, runs, tickets  # noqa: E402
from coordinator.strategies import custom  # noqa: E402
from protocols import errors  # noqa: E402


class Section(NamedTuple):
    """A heading, the text below it, and the classes and functions to show."""

    heading: str
    text: str
    shown: tuple[Any, ...]


SECTIONS = (
    Section(
        "The package commonweight",
        "[Python API](api.md) is a tour. These names follow semantic versioning.",
        (
            *(cw.connect, cw.join, cw.Fleet, cw.Run, cw.Round, cw.Peer),
            *(cw.Measurement, cw.Score, cw.Analysis),
        ),
    ),
    Section(
        "Tasks of your own",
        "[Tasks of your own](tasks.md) explains how a task is written. It imports none of these "
        "classes: they say which methods it may have.",
        (
            *(agent.tasks.Task, agent.tasks.TrainOutcome, agent.tasks.EvalOutcome),
            *(capabilities.Resumable, capabilities.HasMetadata, capabilities.CountsExamples),
            *(capabilities.Predicting, capabilities.Exporting, capabilities.ProvidesStatistics),
            *(capabilities.KnowsRows, capabilities.WatchesEpochs, capabilities.SupportsScaffold),
            capabilities.KeepsOptimizerState,
        ),
    ),
    Section("Strategies of your own", (custom.__doc__ or "").partition("\n\n")[2], ()),
)


def page() -> Iterator[str]:
    """The page's lines."""
    yield "# Python and HTTP"
    yield "\nThis page is made from the code. Nothing on it is stable before version 1."
    for section in SECTIONS:
        yield f"\n## {section.heading}\n\n{_text(section.text)}"
        for shown in section.shown:
            yield from _class(shown) if inspect.isclass(shown) else _function(shown)
    yield "\n## Errors\n\n```text\n" + (errors.__doc__ or "").partition("\n\n")[2] + "```"
    yield (
        "\n## HTTP endpoints for operators\n\nRequests are signed with the operator's key, as "
        "`coordinator/remote/api_client.py` does; bodies are JSON. An error is "
        "`{code, message, hint}`. `commonweight admin audit` shows who has read what.\n"
    )
    yield "| method | path | who may call it | read, as the audit has it |\n|---|---|---|---|"
    for route in (*fleet.ROUTES, *runs.ROUTES, *jobs.ROUTES, *tickets.ROUTES):
        who = "operators and observers" if route.or_observer else "operators"
        yield f"| {route.method} | `{route.path}` | {who} | {route.reads} |"


def _class(shown: type) -> Iterator[str]:
    yield f"\n### `{_place(shown)}`\n\n{_doc(shown)}"
    fields = getattr(shown, "__annotations__", {})
    if fields:
        yield "\n```python"
        yield from (f"{name}: {_type(hint)}" for name, hint in fields.items())
        yield "```"
    for name, found in vars(shown).items():
        if isinstance(found, property) and found.fget and not name.startswith("_"):
            hint = found.fget.__annotations__["return"]
            yield f"\n```python\n{name}: {_type(hint)}\n```\n\n{_doc(found.fget)}"
    methods = {
        name: method
        for name, method in vars(shown).items()
        if isinstance(method, FunctionType) and not name.startswith("_")
        # `typing.Protocol` and `NamedTuple` add methods of their own
        if method.__module__ == shown.__module__
    }
    for name, method in methods.items():
        yield f"\n```python\n{_signature(name, method)}\n```"
        if doc := _doc(method):
            yield f"\n{doc}"


def _function(shown: Any) -> Iterator[str]:
    yield f"\n### `{_place(shown)}`\n"
    yield f"```python\n{_signature(shown.__name__, shown)}\n```\n\n{_doc(shown)}"


def _place(shown: Any) -> str:
    """Where a program finds it."""
    module = "commonweight" if shown.__name__ in cw.__all__ else shown.__module__
    return f"{module}.{shown.__name__}"


def _signature(name: str, function: Any) -> str:
    """`def name(argument: type) -> type`, without `self`; types as the source has them."""
    signature = inspect.signature(function)
    kept = [value for key, value in signature.parameters.items() if key != "self"]
    text = re.sub(r"(: |-> )'([^']*)'", r"\1\2", str(signature.replace(parameters=kept)))
    return f"def {name}{text}"


def _type(hint: Any) -> str:
    if isinstance(hint, ForwardRef):  # as a NamedTuple has it
        hint = hint.__forward_arg__
    text = hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint))
    found = re.fullmatch(r"Annotated\[(.*), *Meta\(.*\)\]", text)
    return found[1] if found else text


def _doc(shown: Any) -> str:
    return _text(inspect.cleandoc(shown.__dict__.get("__doc__") or shown.__doc__ or ""))


def _text(text: str) -> str:
    return text.strip().replace("<", "&lt;")
