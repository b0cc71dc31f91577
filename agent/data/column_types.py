"""Interprets the values of a column: missing, number, boolean, date or text. Pure pyarrow."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from protocols.tables.statistics import ColumnKind

#: Texts for a missing value, in any case and with spaces around.
MISSING = (
    *("", "na", "n/a", "n.a.", "nan", "nat", "null", "none", "<na>", "-", "--", ".", "?"),
    *("#n/a", "#na", "#div/0!", "#value!", "#ref!", "#name?", "#num!", "#null!"),
)
#: What `messages.Text` does not take, as RE2 writes it.
_CONTROL_CHARACTERS = (
    r"[\x00-\x1f\x7f\x{80}-\x{9f}\x{200e}\x{200f}\x{202a}-\x{202e}\x{2066}-\x{2069}]"
)
_MAX_CHARACTERS = 400
#: Numbers and dates that are not read as such, as RE2 writes them: 1.234,5 or 31.3.2024 14:05.
_COMMA_NUMBER = r"^[+-]?(\d*|\d{1,3}([., '\x{a0}\x{2009}\x{202f}\x{2019}]\d{3})+)([.,]\d+)?$"
_LOCAL_DATE = (
    r"^(\d{1,2}[./-]\d{1,2}[./-]\d{2,4}|\d{4}[./]\d{1,2}[./]\d{1,2})"
    r"([ T,]+\d{1,2}:\d{2}(:\d{2})?)?$"
)
_DAY_US = 86_400_000_000.0

Floats = npt.NDArray[np.float64]
_MISSING = pa.array(MISSING)
_TRUTH = pa.array(["true", "false"])


class PossibleKinds(NamedTuple):
    """The kinds that fit all values of a column. `some`: there is at least one value.

    `comma`, `local_date`: all values could be numbers or dates in another format.
    """

    some: bool = False
    number: bool = True
    boolean: bool = True
    date: bool = True
    comma: bool = True
    local_date: bool = True

    def merge(self, other: PossibleKinds) -> PossibleKinds:
        return PossibleKinds(
            self.some or other.some,
            self.number and other.number,
            self.boolean and other.boolean,
            self.date and other.date,
            self.comma and other.comma,
            self.local_date and other.local_date,
        )

    @property
    def kind(self) -> ColumnKind:
        if not self.some:
            return "empty"
        if self.number:
            return "number"
        return "boolean" if self.boolean else "date" if self.date else "text"

    @property
    def written(self) -> str:
        """What the values of a text look like: a key of `statistics.LOOKS_LIKE`, or empty."""
        if self.kind != "text":
            return ""
        return "comma" if self.comma else "local date" if self.local_date else ""


def possible_kinds(column: pa.Array) -> PossibleKinds:
    """The kinds that fit all values of one batch."""
    column, fixed = _plain(column)
    column = column.drop_null()
    if not len(column):
        return PossibleKinds()
    if fixed is not None:
        return PossibleKinds(
            some=True,
            number=fixed == "number",
            boolean=fixed == "boolean",
            date=fixed == "date",
            comma=fixed == "number",
            local_date=fixed == "date",
        )
    is_number, is_date = _cast(column, pa.float64()) is not None, _dates(column) is not None
    return PossibleKinds(
        some=True,
        number=is_number,
        boolean=bool(pc.all(pc.is_in(pc.utf8_lower(column), value_set=_TRUTH)).as_py()),
        date=is_date,
        comma=is_number or _all_match(column, _COMMA_NUMBER),
        local_date=is_date or _all_match(column, _LOCAL_DATE),
    )


def is_text(column: pa.Array) -> bool:
    """True if the values come as texts, as those of a CSV file do."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def num_values(column: pa.Array) -> int:
    """How many rows of a batch have a value."""
    column, _ = _plain(column)
    return len(column) - int(column.null_count)


def _all_match(column: pa.Array, pattern: str) -> bool:
    return bool(pc.all(pc.match_substring_regex(column, pattern)).as_py())


def numbers(column: pa.Array, kind: ColumnKind) -> Floats:
    """The values as float64[n]: NaN where missing or not finite; a date in days since 1970."""
    column, _ = _plain(column)
    if kind == "boolean" and pa.types.is_string(column.type):
        column = pc.equal(pc.utf8_lower(column), "true")
    elif kind == "date":
        dates = column if pa.types.is_timestamp(column.type) else _dates(column)
        found = _floats(dates.cast(pa.int64()) if dates is not None else column)
        return found / _DAY_US
    elif pa.types.is_string(column.type):
        lower = pc.utf8_lower(column)
        # A boolean in a column of numbers is 0 or 1, as at peers with boolean columns.
        for word, number in (("true", "1"), ("false", "0")):
            column = pc.if_else(pc.equal(lower, word), number, column)
    return _floats(column)


def texts(column: pa.Array) -> pa.StringArray:
    """The values as trimmed text; null where missing. An integer has no decimal point.

    Categories and groups travel as `Text` of `protocols.messages.envelope`, so control characters
    become spaces and long texts are truncated.
    """
    column, fixed = _plain(column)
    if fixed == "boolean":
        return column.cast(pa.int8()).cast(pa.string())
    if pa.types.is_floating(column.type):
        whole = pc.and_(pc.equal(pc.floor(column), column), pc.less(pc.abs(column), 2.0**53))
        number = pc.if_else(whole, column, 0.0).cast(pa.int64())
        return pc.if_else(whole, number.cast(pa.string()), column.cast(pa.string()))
    plain = pc.replace_substring_regex(column.cast(pa.string()), _CONTROL_CHARACTERS, " ")
    return pc.utf8_slice_codeunits(plain, 0, _MAX_CHARACTERS)


def whole_texts(values: Floats) -> pa.StringArray:
    """Whole numbers as text, null for NaN."""
    missing = np.isnan(values)
    return pa.array(np.where(missing, 0, values).astype(np.int64), mask=missing).cast(pa.string())


def _plain(column: pa.Array) -> tuple[pa.Array, ColumnKind | None]:
    """Trimmed text with null for missing values; or values with the kind of their type."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    kind = column.type
    if pa.types.is_dictionary(kind):
        column, kind = column.dictionary_decode(), kind.value_type
    if pa.types.is_boolean(kind):
        return column, "boolean"
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return column.cast(pa.float64(), safe=False), "number"
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return column.cast(pa.timestamp("us"), safe=False), "date"
    if pa.types.is_null(kind):
        return column.cast(pa.string()), None
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return column.cast(pa.string()), "text"  # such as times of day; nested values raise
    text = pc.utf8_trim_whitespace(column.cast(pa.string()))
    missing = pc.is_in(pc.utf8_lower(text), value_set=_MISSING)
    return pc.if_else(missing, None, text), None


def _floats(column: pa.Array) -> Floats:
    column = column.cast(pa.float64(), safe=False)
    found = np.array(column.to_numpy(zero_copy_only=False), np.float64)
    found[~np.isfinite(found)] = np.nan
    return found


def _dates(column: pa.Array) -> pa.Array | None:
    """ISO 8601 dates and times; those with a time zone are converted to UTC."""
    found = _cast(column, pa.timestamp("us"))
    if found is None and (zoned := _cast(column, pa.timestamp("us", tz="UTC"))) is not None:
        found = zoned.cast(pa.timestamp("us"))
    return found


def _cast(column: pa.Array, to: pa.DataType) -> pa.Array | None:
    try:
        return column.cast(to)
    except pa.ArrowInvalid:
        return None
