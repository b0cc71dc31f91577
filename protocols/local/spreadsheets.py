"""Text of peers in CSV files: a spreadsheet must not run it as a formula. Pure."""

from __future__ import annotations

#: What starts a formula, also in full width, which East Asian versions read alike.
_STARTS = ("=", "+", "-", "@", "\N{FULLWIDTH EQUALS SIGN}", "\N{FULLWIDTH PLUS SIGN}",
           "\N{FULLWIDTH HYPHEN-MINUS}", "\N{FULLWIDTH COMMERCIAL AT}")  # fmt: skip


def escape_formula(value: object) -> object:
    """A text that a spreadsheet could run, after a `'`; any other value as it is.

    Blanks before it count too, because spreadsheets skip some. A number in a text runs nothing.
    """
    if not isinstance(value, str):
        return value
    # `csv` leaves a lone carriage return without quotes, and a new row would start after it.
    text = value.replace("\r", "\n")
    if not text.lstrip().startswith(_STARTS) and not text.startswith(("\t", "\n")):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
