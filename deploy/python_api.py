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
from coordinator.api.routes import fleet, jobs, runs, tickets  # noqa: E402
from coordinator.jobs import model_refs, output  # noqa: E402
from coordinator.jobs.input import prepare  # noqa: E402
from coordinator.remote import analysis  # noqa: E402
from coordinator.remote.api_client import Remote  # noqa: E402
from coordinator.storage.job_events import JobSpec  # noqa: E402
from coordinator.storage.run_events import RunSpec  # noqa: E402
from coordinator.strategies import custom  # noqa: E402
from protocols import errors  # noqa: E402


class Section(NamedTuple):
    """A heading, the text below it, and the classes and functions to show."""

    heading: str
    text: str
    shown: tuple[Any, ...]


SECTIONS = (
    Section(
        "Tasks of your own",
        "[Tasks of your own](tasks.md) explains how a task is written. It imports none of these "
        "classes: they say which methods it may have.",
        (
            *(agent.tasks.Task, agent.tasks.TrainOutcome, agent.tasks.EvalOutcome),
            *(agent.tasks.Resumable, agent.tasks.HasMetadata, agent.tasks.CountsExamples),
            *(agent.tasks.Predicting, agent.tasks.Exporting, agent.tasks.ProvidesStatistics),
            *(agent.tasks.KnowsRows, agent.tasks.WatchesEpochs, agent.tasks.SupportsScaffold),
            agent.tasks.KeepsOptimizerState,
        ),
    ),
    Section("Strategies of your own", (custom.__doc__ or "").partition("\n\n")[2], ()),
    Section(
        "The coordinator from Python",
        "[Jobs](jobs.md#from-python) has a complete program. Open the home first: "
        '`Remote(homes.open_home("coordinator"))`, with `homes` of `protocols.local`.',
        (
            *(Remote, RunSpec, JobSpec, prepare, model_refs.resolve),
            *(output.merge, output.scores_of, output.matrices, analysis.ask),
        ),
    ),
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
        "`Remote` does; bodies are JSON. An error is `{code, message, hint}`. "
        "`commonweight audit` shows who has read what.\n"
    )
    yield "| method | path | who may call it | read, as the audit has it |\n|---|---|---|---|"
    for route in (*fleet.ROUTES, *runs.ROUTES, *jobs.ROUTES, *tickets.ROUTES):
        who = "operators and observers" if route.or_observer else "operators"
        yield f"| {route.method} | `{route.path}` | {who} | {route.reads} |"


def _class(shown: type) -> Iterator[str]:
    yield f"\n### `{shown.__module__}.{shown.__name__}`\n\n{_doc(shown)}"
    fields = {} if shown is Remote else getattr(shown, "__annotations__", {})
    if fields:
        yield "\n```python"
        yield from (f"{name}: {_type(hint)}" for name, hint in fields.items())
        yield "```"
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
    yield f"\n### `{shown.__module__}.{shown.__name__}`\n"
    yield f"```python\n{_signature(shown.__name__, shown)}\n```\n\n{_doc(shown)}"


def _signature(name: str, function: Any) -> str:
    """`def name(argument: type) -> type`, without `self`; types as the source has them."""
    signature = inspect.signature(function)
    kept = [value for key, value in signature.parameters.items() if key != "self"]
    text = str(signature.replace(parameters=kept)).replace("'", "")
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
