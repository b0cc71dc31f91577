"""Mutations: of bytes, and of the values in a message that is signed again afterwards."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

WEIRD: list[Any] = [
    None,
    True,
    -1,
    0,
    -80,
    10**12,
    2**63,
    2**64,
    10**30,
    1e308,
    -1e308,
    1.5,
    "",
    "x" * 5000,
    "\x00",
    "\x1b[31m",
    "\u202e",
    "../../x",
    "é" * 65,
    [],
    {},
    [[]],
    {"": {}},
    b"",
    b"\xff" * 100,
    [None] * 1000,
    {str(n): n for n in range(1000)},
]


def few(count: int) -> Any:
    """Settings for so many examples: no database, no shrinking of what takes long."""
    return settings(
        max_examples=count, database=None, suppress_health_check=list(HealthCheck), deadline=None
    )


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "double", "drop", "overwrite"]),
        st.integers(0, 1 << 16),
        st.binary(min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=4,
)


def mutated(data: bytes, changes: list[tuple[str, int, bytes]]) -> bytes:
    """Other bytes than `data`."""
    now = bytearray(data)
    for how, where, what in changes:
        at = where % (len(now) + 1)
        if how == "flip" and now:
            now[at % len(now)] ^= what[0] or 1
        elif how == "cut":
            del now[at:]
        elif how == "insert":
            now[at:at] = what
        elif how == "double":
            now[at:at] = now[at : at + 50]
        elif how == "drop":
            del now[at : at + what[0]]
        elif how == "overwrite":
            now[at : at + len(what)] = what
    return bytes(now) if bytes(now) != data else data + b"\0"


PLACES = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.sampled_from(WEIRD), st.booleans()),
    min_size=1,
    max_size=3,
)


def distorted(value: Any, places: list[tuple[int, Any, bool]]) -> Any:
    """Builtins with some of their values replaced by weird ones, or left out, or with one more."""
    value = copy.deepcopy(value)
    for where, weird, add in places:
        spots: list[tuple[Any, Any]] = []
        _walk(value, spots)
        if not spots:
            return value
        owner, key = spots[where % len(spots)]
        if add and isinstance(owner, dict):
            owner["more"] = copy.deepcopy(weird)
        elif weird is None and isinstance(owner, dict):
            owner.pop(key)
        else:
            owner[key] = copy.deepcopy(weird)
    return value


def _walk(value: Any, spots: list[tuple[Any, Any]]) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        spots.append((value, key))
        if isinstance(inner, dict | list) and len(inner) < 100:
            _walk(inner, spots)


def as_json(value: Any) -> bytes:
    return json.dumps(
        value, default=lambda raw: base64.b64encode(raw).decode(), ensure_ascii=False
    ).encode("utf-8", "surrogatepass")


def plain_of(value: msgspec.Struct) -> Any:
    """A message as what JSON knows."""
    return json.loads(msgspec.json.encode(value))
