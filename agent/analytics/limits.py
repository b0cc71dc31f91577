"""What an owner lets others ask. Pure."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class QueryLimits(Struct, frozen=True, kw_only=True):
    """`columns` are patterns; `operations` names, or * for all.

    `mode`: nothing, after a look at each question, or all that the limits allow. `epsilon`: what
    all answers together may cost in privacy; 0: they carry noise only on wish.
    """

    mode: Literal["off", "ask", "on"] = "off"
    epsilon: float = 0.0
    min_rows: int = 10
    columns: tuple[str, ...] = ("*",)
    operations: tuple[str, ...] = ("*",)
    extremes: bool = False
