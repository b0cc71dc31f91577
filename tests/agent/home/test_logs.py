"""Reading the log across rotation: every line once and in order."""

from __future__ import annotations

import json
import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.home import logs


@given(pieces=st.lists(st.integers(0, 12), max_size=12))
def test_no_line_is_lost_or_repeated(
    pieces: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """At most three rotations between two reads, as many as there are rotated files."""
    home = tmp_path_factory.mktemp("home")
    writing = RotatingFileHandler(home / logs.FILE, "a", 200, logs.ROTATED_FILES)
    log, seen, written = logs.LogReader(home), [], 0
    for piece in pieces:
        for _ in range(piece):
            text = f"{written:03} {'x' * 40}"  # four to a file
            writing.emit(logging.LogRecord("n", 20, "", 0, text, None, None))
            written += 1
        seen += [int(line[:3]) for line in log.new_lines()]
    writing.close()
    assert seen == list(range(written))


def test_the_first_read_includes_rotated_files(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"{logs.FILE}.{number}").write_text(f"old {number}\n")
    (tmp_path / logs.FILE).write_text("new\n")
    log = logs.LogReader(tmp_path)
    assert log.new_lines() == ["old 3", "old 2", "old 1", "new"]
    assert log.new_lines() == []


def test_incomplete_lines_wait_and_invalid_bytes_are_replaced(tmp_path: Path) -> None:
    log = logs.LogReader(tmp_path)
    assert log.new_lines() == []
    with (tmp_path / logs.FILE).open("ab") as file:
        file.write(b"one\ntw")
        file.flush()
        assert log.new_lines() == ["one"]
        file.write("o\u2028\n\xff".encode("latin-1", "replace"))
        file.flush()
        assert log.new_lines() == ["two?"]
        file.write(b"\n\xe2\x80\xa8 \xf0\n")
        file.flush()
        assert log.new_lines() == ["\ufffd", "\u2028 \ufffd"]


def test_format_line() -> None:
    record = logging.LogRecord("n", logging.WARNING, "", 0, "a \x1b[2J b", None, None)
    words = logs.format_line(logs.JsonFormatter().format(record))
    assert words[10] == " "
    assert words[19:] == " warning: a ·[2J b"
    try:
        raise ValueError("oh")
    except ValueError as err:
        record.exc_info = (ValueError, err, err.__traceback__)
    lines = logs.format_line(logs.JsonFormatter().format(record)).splitlines()
    assert lines[1] == "    Traceback (most recent call last):"
    assert lines[-1] == "    ValueError: oh"


@pytest.mark.parametrize(
    "line", ["", "plain", "[1]", '{"at":1e999}', '{"at":"x"}', "[" * 100_000, '{"at":NaN}']
)
def test_foreign_lines_are_shown_unchanged(line: str) -> None:
    assert logs.format_line(line) == line


def test_any_level_and_message_are_shown() -> None:
    line = json.dumps({"at": 0, "level": 3, "message": None, "trace": 5})
    assert logs.format_line(line).endswith(" 3: None\n    5")
