"""What queries an owner allows. Pure."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class QueryLimits(Struct, frozen=True, kw_only=True):
    """`columns` are patterns; `operations` are names, or * for all.

    `mode`: no queries, queries that the owner approves one by one, or all within the limits.
    `epsilon`: the privacy budget of all answers together; 0: noise only if the query asks for it.
    """

    mode: Literal["off", "ask", "on"] = "off"
    epsilon: float = 0.0
    min_rows: int = 10
    columns: tuple[str, ...] = ("*",)
    operations: tuple[str, ...] = ("*",)
    extremes: bool = False
