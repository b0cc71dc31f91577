"""Checks: made in order, skipped after what they need, and told the same way everywhere."""

from __future__ import annotations

import json

import click
import pytest

from protocols.errors import CommonweightError, ExitCode
from protocols.local import cli_entry
from protocols.local.checks import (
    Advice,
    Check,
    CheckStep,
    count_failed,
    format_check,
    run_checks,
)


def bad() -> str:
    raise CommonweightError("the door is shut", "open it")


def broken() -> str:
    raise ValueError("oh")


def test_a_check_is_skipped_when_one_that_it_needs_did_not_pass() -> None:
    calls: list[str] = []

    def noted(name: str) -> str:
        calls.append(name)
        return "fine"

    steps = [
        CheckStep("a", lambda: noted("a")),
        CheckStep("b", bad, ("a",)),
        CheckStep("c", lambda: noted("c"), ("a", "b")),
        CheckStep("d", lambda: noted("d"), ("c",)),
        CheckStep("e", lambda: Advice(noted("e"), "better"), ("a",)),
        CheckStep("f", lambda: noted("f"), ("e",)),
        CheckStep("g", broken),
        CheckStep("h", lambda: noted("h"), ("g",)),
    ]
    made = list(run_checks(steps))
    assert made == [
        Check("a", True, "fine"),
        Check("b", False, "the door is shut", "open it"),
        Check("c", None, "skipped"),
        Check("d", None, "skipped"),
        Check("e", True, "fine", "better"),
        Check("f", True, "fine"),
        Check("g", False, "could not be checked: ValueError: oh"),
        Check("h", None, "skipped"),
    ]
    assert calls == ["a", "e", "f"]
    assert count_failed(made) == 2


def test_each_check_is_given_as_soon_as_it_is_made() -> None:
    calls: list[str] = []
    steps = [CheckStep(name, lambda name=name: calls.append(name) or name) for name in "abc"]  # type: ignore[misc]
    making = run_checks(steps)
    next(making)
    assert calls == ["a"]


def test_lines_for_a_person() -> None:
    assert format_check(Check("tls", True, "364 days left")) == "✓ tls: 364 days left"
    assert format_check(Check("tcp", False, "no answer", "start it")) == (
        "✗ tcp: no answer\n    fix: start it"
    )
    assert format_check(Check("mqtt", None, "skipped")) == "– mqtt: skipped"
    assert (
        format_check(Check("disk", True, "3 GB", "make room")) == "✓ disk: 3 GB\n    fix: make room"
    )
    assert "\x1b" not in format_check(Check("dns", False, "\x1b[2J", "\x1b[31m"))


def test_the_same_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    made = [Check("a", True, "fine"), Check("b", None, "skipped"), Check("c", False, "no", "do")]
    with pytest.raises(click.exceptions.Exit) as ended:
        cli_entry.print_checks(made, json=True)
    assert ended.value.exit_code == ExitCode.FAULTS_FOUND
    assert json.loads(capsys.readouterr().out)["data"] == {
        "faults": 1,
        "checks": [
            {"name": "a", "ok": True, "detail": "fine", "fix": ""},
            {"name": "b", "ok": None, "detail": "skipped", "fix": ""},
            {"name": "c", "ok": False, "detail": "no", "fix": "do"},
        ],
    }
