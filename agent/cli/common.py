"""What the commands share: output, options and the parsing of arguments."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from protocols.errors import HomeLocked, UsageError
from protocols.local import homes
from protocols.local.cli_entry import print_json as print_json
from protocols.local.cli_entry import print_line as print_line
from protocols.local.cli_entry import print_result as print_result
from protocols.local.cli_entry import print_text as print_text
from protocols.local.cli_entry import printable

Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON to stdout.")]
Part = Annotated[
    str | None,
    typer.Option(hidden=True, help="i/n: use this part of a shared data set, from 0/n."),
]
Split = Annotated[
    str | None,
    typer.Option(hidden=True, help="How it is split: iid, or shards: two labels a peer."),
]


def print_data(data: Any, lines: Iterable[str], *, json: bool) -> None:
    """Print `data` as JSON, or `lines` for a person, to stdout."""
    if json:
        print_json(data)
    else:
        sys.stdout.writelines(f"{printable(line)}\n" for line in lines)


def format_duration(seconds: float) -> str:
    """`2 h`, `90 min` or `2.5 s`: the largest unit of which it is a whole number."""
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit and seconds % unit == 0:
            return f"{seconds // unit:.0f} {name}"
    return f"{seconds:g} s"


def parse_pair(text: str, example: str = "lr=0.1") -> tuple[str, str]:
    """Split `key=value`. Raises UsageError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{text!r} is not key=value", f"for example {example}")
    return key, value


def parse_part(text: str | None) -> dict[str, int | None]:
    """The settings in `i/n`: part i of n. Raises UsageError."""
    if not text:
        return {"part": None, "parts": None}
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or int(match[1]) >= int(match[2]):
        raise UsageError(f"{text!r} is not a part: write i/n, i from 0 to n-1, for example 0/4")
    return {"part": int(match[1]), "parts": int(match[2])}


def is_running(home: Path) -> bool:
    """True if an agent runs in this home."""
    try:
        homes.lock_home(home, "agent").release()
    except HomeLocked:
        return True
    return False
