"""What a doctor found: checks in the order of their making, as lines and as data. Pure.

    ✓ tls: the chain verifies, 364 days left
    ✗ clock: 12 s ahead of the coordinator
        fix: set the clock by the network (NTP)
    – flower: skipped

A check that passed may still carry a fix: something that could be better and is no fault yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from msgspec import Struct

from protocols.errors import CommonweightError
from protocols.messages.envelope import strip_controls

_MARKS = {True: "✓", False: "✗", None: "–"}


class Check(Struct, frozen=True):
    """One finding; `ok` is None for a check that could not be made. `fix` is what to do next."""

    name: str
    ok: bool | None
    detail: str = ""
    fix: str = ""


class Advice(NamedTuple):
    """What a look gives that found nothing wrong but something to do."""

    detail: str
    fix: str


#: Looks at one thing and says what it saw. A fault is a CommonweightError: its hint is the fix.
CheckFunction = Callable[[], str | Advice]


class CheckStep(NamedTuple):
    """A check to be made, unless one of those it `needs` did not pass."""

    name: str
    run: CheckFunction
    needs: tuple[str, ...] = ()


def run_checks(steps: Iterable[CheckStep]) -> Iterator[Check]:
    """Make these checks one after the other, each given as soon as it is made."""
    passed: set[str] = set()
    for step in steps:
        check = _skipped(step) if not passed.issuperset(step.needs) else _run(step)
        if check.ok:
            passed.add(check.name)
        yield check


def _skipped(step: CheckStep) -> Check:
    return Check(step.name, None, "skipped")


def _run(step: CheckStep) -> Check:
    try:
        saw = step.run()
    except CommonweightError as err:
        return Check(step.name, False, err.message, err.hint)
    except Exception as err:  # a check that breaks is a finding: the others are made all the same
        return Check(step.name, False, f"could not be checked: {type(err).__name__}: {err}")
    return Check(step.name, True, *(saw if isinstance(saw, Advice) else (saw,)))


def format_check(check: Check) -> str:
    """The check for a person: one line, and one more for its fix."""
    line = f"{_MARKS[check.ok]} {check.name}: {strip_controls(check.detail)}"
    return line + (f"\n    fix: {strip_controls(check.fix)}" if check.fix else "")


def count_failed(checks: Iterable[Check]) -> int:
    return sum(check.ok is False for check in checks)


def to_json(checks: Iterable[Check]) -> dict[str, Any]:
    """What `--json` tells: the checks, and how many of them are faults."""
    made = list(checks)
    return {"faults": count_failed(made), "checks": made}
