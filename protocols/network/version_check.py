"""Checks that two versions are at most one minor version apart. Pure.

So you can upgrade a fleet machine by machine, the coordinator first or last.
"""

from __future__ import annotations

import re
from functools import lru_cache

from protocols import VERSION
from protocols.errors import VersionSkew

_NUMBERS = re.compile(r"(\d+)\.(\d+)(?:\.|\Z|[a-z])")


@lru_cache(64)  # asked several times for each peer in a round
def are_compatible(one: str, other: str) -> bool:
    """True if these versions work together, or if one of them is unknown."""
    a, b = _NUMBERS.match(one), _NUMBERS.match(other)
    if a is None or b is None or "0.0.0" in (one, other):  # a source tree that was never installed
        return True
    return a[1] == b[1] and abs(int(a[2]) - int(b[2])) <= 1


def check_compatible(theirs: str, who: str, ours: str = VERSION) -> None:
    """Raise VersionSkew if `who`, of version `theirs`, does not work with this program."""
    if not are_compatible(ours, theirs):
        raise VersionSkew(
            f"{who} runs commonweight {theirs}, this is {ours}: more than one minor version apart",
            "update the older one: pip install --upgrade commonweight",
        )
