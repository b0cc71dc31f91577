"""Which parts of a log may leave the machine."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from agent.home import log_redaction
from protocols.messages.envelope import LogLine, LogResponse


def line(message: str, name: str = "commonweight.agent", level: str = "info") -> str:
    return json.dumps({"at": 5.0, "level": level, "name": name, "message": message, "trace": "T"})


def test_private_parts_are_removed() -> None:
    for message, gone in (
        ("cannot write the status file: [Errno 28] No space: '/home/zoe/x.json'", "zoe"),
        ("cannot read /home/zoe/data/scans.csv", "scans"),
        ("cannot read C:\\Users\\zoe\\scan.csv", "zoe"),
        ("no file ~/private/scan.csv here", "scan"),
        ("no file data/scan.csv here", "scan"),
        ("could not convert string to float: 'Ann Smith, 1961, HIV+'", "Smith"),
        ('bad value "Smith"', "Smith"),
        ("a row [1.5, 2.5, 3.5] has no label", "2.5"),
        ("a row (1.5, 2.5, 3.5) has no label", "2.5"),
        ("joined with cw1.abcdefgh", "abcdefgh"),
        ("broker mqtts://fleet:secret@host:9093 is down", "secret"),
        ("token abcdefghijklmnopqrstuvwxyz0123456789", "abcdefghij"),
        ("first line\nSmith, 1961", "Smith"),
    ):
        (told,) = log_redaction.redact([line(message)], 10)
        assert gone not in told.text
    plain = "lost the coordinator: it answered 412"
    assert log_redaction.redact([line(plain)], 10) == [LogLine(at=5.0, level="info", text=plain)]


def test_only_the_last_lines_of_our_own_loggers_pass() -> None:
    lines = [line(f"n{n}") for n in range(9)]
    lines += [line("x", name="mytask"), "no json", "[]", "{}", line("y", level="odd")]
    assert [told.text for told in log_redaction.redact(lines, 3)] == ["n6", "n7", "n8"]


def test_a_long_log_is_read_from_its_end(tmp_path: Path) -> None:
    path = tmp_path / "agent.log"
    assert log_redaction.tail(path) == []
    path.write_text("".join(f"{line(f'n{n}')}\n" for n in range(20_000)))
    lines = log_redaction.tail(path)
    assert sum(map(len, lines)) < 300_000
    assert log_redaction.redact(lines, 1)[0].text == "n19999"


@given(st.text())
def test_any_message_can_be_encoded_and_decoded(message: str) -> None:
    import msgspec

    told = LogResponse(request_id="a", lines=log_redaction.redact([line(message)], 5))
    assert msgspec.json.decode(msgspec.json.encode(told), type=LogResponse) == told
