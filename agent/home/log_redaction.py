"""Removes traces, paths, secrets and data from log lines, before an operator sees them.

Only lines of commonweight's own loggers pass. Everything in them that could be a path, a key, a
ticket or quoted text is replaced, as an error may quote the data that caused it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from protocols.messages.envelope import LogLine, strip_controls

_OURS = "commonweight"
_MAX_TAIL_BYTES = 256 * 1024
_REDACTIONS = (
    # Quoted text: repr() of a path, a value or a line of data.
    (re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`"), "‹…›"),
    # A URL keeps only its scheme, as it may contain a login.
    (re.compile(r"\b([a-z][a-z0-9+.-]*)://\S+", re.IGNORECASE), r"\1://‹…›"),
    # Paths: relative ones, and those from the root, the home or a drive.
    (
        re.compile(r"(?:~|\.{1,2}|[A-Za-z]:)?[/\\][^\s:,;)]+|\b[\w.-]+(?:[/\\][\w.-]+){1,}"),
        "‹path›",
    ),
    (re.compile(r"\bcw1[.-]\S+"), "‹ticket›"),
    # Long runs of letters and digits: keys, digests, tokens.
    (re.compile(r"\b[A-Za-z0-9+/_=-]{24,}"), "‹…›"),
    # Numbers in brackets and lists: rows of data.
    (re.compile(r"\[[^\]]*\]|\{[^}]*\}|\((?:\s*-?\d[\d.eE+-]*\s*,?){2,}\)"), "‹…›"),
)


def tail(path: Path) -> list[str]:
    """The last whole lines of the log file, at most `_MAX_TAIL_BYTES`; none without a file."""
    try:
        with path.open("rb") as log:
            log.seek(0, os.SEEK_END)
            start = max(0, log.tell() - _MAX_TAIL_BYTES)
            log.seek(start)
            lines = log.read().decode(errors="replace").split("\n")
    except OSError:
        return []
    return lines[1:] if start else lines


def redact(lines: Iterable[str], max_lines: int) -> list[LogLine]:
    """The last `max_lines` of these JSON lines that may be shown, oldest first."""
    redacted = [line for text in lines if (line := _redact_line(text)) is not None]
    return redacted[-max_lines:]


def _redact_line(text: str) -> LogLine | None:
    try:
        record: dict[str, Any] = json.loads(text)
        name, level, at = str(record["name"]), str(record["level"]), float(record["at"])
        message = str(record["message"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    if name.partition(".")[0] != _OURS:
        return None
    if level == "critical":
        level = "error"
    if level not in ("debug", "info", "warning", "error"):
        return None
    return LogLine(at=at, level=level, text=redact_message(message))  # type: ignore[arg-type]


def redact_message(message: str) -> str:
    """The first line of a message without paths, quoted text, secrets or rows of numbers."""
    line = message.partition("\n")[0]
    for pattern, replacement in _REDACTIONS:
        line = pattern.sub(replacement, line)
    return strip_controls(line)
