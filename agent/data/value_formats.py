"""Numbers and dates as people write them, in the format that the owner has named by an example.

format        also read as such
1.234,5       1234,5   1 234,5   1'234,5   12,5 %   € 3,20
1,234.5       1234.5   1 234.5   1'234.5   12.5%    $3.20
31.12.2024    31/12/2024   31-12-2024   31.12.2024 14:05
12/31/2024    12-31-2024   12/31/2024 14:05:59
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from agent.data import column_types
from agent.data.settings import Format

#: Spaces and apostrophes between groups of digits, signs of percent and currencies, as RE2 writes
#: them. A percent stays what it is: 12 % is 12.
_DROPPED = r"[\s\x{a0}\x{2009}\x{202f}'\x{2019}%$\x{20ac}\x{a3}\x{a5}]"
_SEPARATORS: dict[Format, tuple[str, str]] = {"1.234,5": (".", ","), "1,234.5": (",", ".")}
_DAYS: dict[Format, str] = {"31.12.2024": "%d.%m.%Y", "12/31/2024": "%m.%d.%Y"}
_HAS_YEAR = r"^\d{1,2}[./-]\d{1,2}[./-]\d{4}\b"
_TIMES = ("", " %H:%M", " %H:%M:%S")


def to_plain(column: pa.Array, form: Format) -> pa.Array:
    """The texts of a column as 1234.5 and 2024-12-31; what is written otherwise stays as it is."""
    if not column_types.is_text(column):
        return column
    texts = column_types.texts(column)
    return _plain_numbers(texts, form) if form in _SEPARATORS else _plain_dates(texts, form)


def _plain_numbers(texts: pa.StringArray, form: Format) -> pa.StringArray:
    group, point = _SEPARATORS[form]
    bare = pc.replace_substring_regex(texts, _DROPPED, "")
    grouped = rf"^[+-]?\d{{1,3}}(\{group}\d{{3}})+(\{point}\d+)?$"
    whole = rf"^[+-]?\d*(\{point}\d+)?([eE][+-]?\d+)?$"
    without = pc.replace_substring(bare, group, "")
    is_grouped, is_whole = (pc.match_substring_regex(bare, p) for p in (grouped, whole))
    found = pc.if_else(is_grouped, without, bare)
    found = pc.replace_substring(found, point, ".")
    return pc.if_else(pc.or_(is_grouped, is_whole), found, texts)


def _plain_dates(texts: pa.StringArray, form: Format) -> pa.StringArray:
    dated = pc.if_else(pc.match_substring_regex(texts, _HAS_YEAR), texts, None)
    # The first two separators are in the first ten characters, and no other sign of these is.
    dotted = pc.replace_substring_regex(dated, r"[/-]", ".", max_replacements=2)
    dotted = pc.replace_substring_regex(dotted, r"(\d)[T, ]+(\d)", r"\1 \2")
    read = [
        pc.strptime(dotted, format=_DAYS[form] + time, unit="s", error_is_null=True)
        for time in _TIMES
    ]
    return pc.coalesce(*(one.cast(pa.string()) for one in read), texts)
