"""Times of events as text, in the local time zone or in a given one."""

from __future__ import annotations

from datetime import datetime, tzinfo


def format_time(at: float, zone: tzinfo | None) -> str:
    """`14:03:22`."""
    return _format(at, zone, "%H:%M:%S") or "--:--:--"


def format_date(at: float, zone: tzinfo | None) -> str:
    """`2026-11-23 14:03:22`."""
    return _format(at, zone, "%Y-%m-%d %H:%M:%S") or "unknown"


def _format(at: float, zone: tzinfo | None, form: str) -> str:
    try:
        return datetime.fromtimestamp(at, zone).strftime(form)
    except (ValueError, OverflowError, OSError):
        return ""
