"""Errors of the operating system as errors that say what could not be done."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from protocols.errors import CommonweightError


@contextmanager
def os_errors_as(kind: type[CommonweightError], what: str, hint: str = "") -> Iterator[None]:
    """Raise an OSError of the body as an error of this kind: `what` failed, and the reason."""
    try:
        yield
    except OSError as err:
        raise kind(f"{what}: {err.strerror or err}", hint) from err
