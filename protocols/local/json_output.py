"""The output format of `--json`: `{"schema_version": 1, "status": …}`. Pure."""

from __future__ import annotations

import json
from typing import Any

import msgspec

from protocols.errors import CommonweightError

SCHEMA_VERSION = 1


def ok(data: Any) -> str:
    """One line of JSON with `data`."""
    return _line({"schema_version": SCHEMA_VERSION, "status": "ok", "data": data})


def error(err: CommonweightError) -> str:
    """One line of JSON with an error's code, message and hint."""
    body = {"code": err.code, "message": err.message, "hint": err.hint}
    return _line({"schema_version": SCHEMA_VERSION, "status": "error", "error": body})


def _line(value: Any) -> str:
    text = msgspec.json.encode(value, enc_hook=str).decode()
    return text if text.isprintable() else "".join(map(_escaped, text))


def _escaped(letter: str) -> str:
    """A letter as JSON spells it: a terminal would obey some that JSON need not escape."""
    return letter if letter.isprintable() else json.dumps(letter)[1:-1]


def format_error(err: CommonweightError) -> str:
    """The error as text: what happened and why, then what to do next."""
    return f"error: {err.message}" + (f"\n  try: {err.hint}" if err.hint else "")
