"""HTML for notebooks. Every cell is escaped, as names and reasons come from other machines."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape


def table(titles: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """A table with these titles."""
    body = "".join(_row("td", row) for row in rows)
    return f"<table><thead>{_row('th', titles)}</thead><tbody>{body}</tbody></table>"


def _row(tag: str, cells: Iterable[object]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
