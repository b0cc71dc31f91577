"""Packages that only some installations have: the extras of `pip install`. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from protocols.errors import MissingPackage

#: Packages whose modules have another name.
_PACKAGES = {"PIL": "pillow"}


@contextmanager
def needs_extra(extra: str, purpose: str, alternative: str = "") -> Iterator[None]:
    """Context manager: a failed import in the block raises MissingPackage, with its extra."""
    try:
        yield
    except ImportError as err:
        install = f"pip install 'commonweight[{extra}]'"
        hint = f"{install}, or {alternative}" if alternative else install
        package = _PACKAGES.get(str(err.name), str(err.name))
        raise MissingPackage(purpose, package, hint) from err
