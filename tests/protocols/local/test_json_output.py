"""The JSON contract and the error tree: codes, exit codes, hints."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

from protocols import errors
from protocols.errors import CommonweightError, ExitCode, TicketMalformed
from protocols.local import json_output

TREE = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, CommonweightError)
]


def test_ok_carries_the_data_in_one_line() -> None:
    line = json_output.ok({"path": Path("/x"), "text": "a\nb", "number": float("nan")})
    assert "\n" not in line
    assert json.loads(line) == {
        "schema_version": 1,
        "status": "ok",
        "data": {"path": "/x", "text": "a\nb", "number": None},
    }


def test_an_error_carries_code_message_and_hint() -> None:
    line = json_output.error(TicketMalformed("what", "do this"))
    assert json.loads(line) == {
        "schema_version": 1,
        "status": "error",
        "error": {"code": "ticket_malformed", "message": "what", "hint": "do this"},
    }


def test_an_error_in_words() -> None:
    assert (
        json_output.format_error(TicketMalformed("what", "do this"))
        == "error: what\n  try: do this"
    )
    assert json_output.format_error(CommonweightError("what")) == "error: what"


def test_every_error_has_a_code_of_its_own_and_inherits_its_exit_code() -> None:
    assert len({kind.code for kind in TREE}) == len(TREE)
    for kind in TREE:
        parent = kind.__mro__[1]
        if parent not in (CommonweightError, Exception):
            assert kind.exit_code is parent.exit_code  # type: ignore[attr-defined]
    assert {int(code) for code in ExitCode} == {0, 1, 2, 3, 4, 5, 6, 130}


def test_the_tree_at_the_top_is_the_tree() -> None:
    drawn = re.findall(r"^[│ ]*[├└]── (\w+)", errors.__doc__ or "", re.MULTILINE)
    assert sorted(drawn) == sorted(k.__name__ for k in TREE if k is not CommonweightError)
