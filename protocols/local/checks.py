"""The checks of the `doctor` commands: how they run, and their results as text and data. Pure.

    ✓ tls: the chain verifies, 364 days left
    ✗ clock: 12 s ahead of the coordinator
        fix: set the clock by the network (NTP)
    – flower: skipped

A check that passed may still have a fix: advice about something that is no fault yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from msgspec import Struct

from protocols.errors import CommonweightError
from protocols.messages.envelope import strip_controls

_MARKS = {True: "✓", False: "✗", None: "–"}


class Check(Struct, frozen=True):
    """The result of a check; `ok` is None if it was skipped. `fix`: what to do next."""

    name: str
    ok: bool | None
    detail: str = ""
    fix: str = ""


class Advice(NamedTuple):
    """The result of a check that passed, with something to do."""

    detail: str
    fix: str


class Skipped(NamedTuple):
    """The result of a check that does not apply yet, with something to do."""

    detail: str
    fix: str


#: Checks one thing and returns what it found. Raises CommonweightError for a fault; its hint is
#: the fix.
CheckFunction = Callable[[], str | Advice | Skipped]


class CheckStep(NamedTuple):
    """A check to run, unless one that it `needs` did not pass."""

    name: str
    run: CheckFunction
    needs: tuple[str, ...] = ()


def run_checks(steps: Iterable[CheckStep]) -> Iterator[Check]:
    """Run the checks in order, and yield each result at once."""
    passed: set[str] = set()
    for step in steps:
        runnable = passed.issuperset(step.needs)
        check = _run(step) if runnable else Check(step.name, None, "skipped")
        if check.ok:
            passed.add(check.name)
        yield check


def _run(step: CheckStep) -> Check:
    try:
        found = step.run()
    except CommonweightError as err:
        return Check(step.name, False, err.message, err.hint)
    except Exception as err:  # a check with a bug must not stop the others
        return Check(step.name, False, f"could not be checked: {type(err).__name__}: {err}")
    if isinstance(found, Skipped):
        return Check(step.name, None, *found)
    return Check(step.name, True, *(found if isinstance(found, Advice) else (found,)))


def format_check(check: Check) -> str:
    """The check as text: one line, and one more for its fix."""
    line = f"{_MARKS[check.ok]} {check.name}: {strip_controls(check.detail)}"
    return line + (f"\n    fix: {strip_controls(check.fix)}" if check.fix else "")


def count_failed(checks: Iterable[Check]) -> int:
    return sum(check.ok is False for check in checks)
