"""Crash reports say where, and nothing of what was in hand."""

from __future__ import annotations

import json
from pathlib import Path

from protocols.errors import UsageError
from protocols.local import crash_reports

SECRET = "row 17: alice@example.org"


def fall(over: str) -> None:
    try:
        int(over)
    except ValueError as err:
        raise KeyError(over) from err


def test_a_report_holds_no_data(tmp_path: Path) -> None:
    try:
        fall(SECRET)
    except KeyError as err:
        crash_reports.save(tmp_path, err)
    (report,) = crash_reports.list_reports(tmp_path)
    text = report.read_text()
    assert "alice" not in text
    assert str(tmp_path) not in text
    assert report.stat().st_mode & 0o077 == 0
    told = json.loads(text)
    assert [error["kind"] for error in told["errors"]] == ["KeyError", "ValueError"]
    assert told["errors"][0]["steps"][-1].endswith(" fall")
    assert "KeyError in local/test_crash_reports.py:" in crash_reports.format_report(report)


def test_the_last_few_are_kept_and_what_was_expected_is_none(tmp_path: Path) -> None:
    crash_reports.save(tmp_path, UsageError("no"))
    crash_reports.save(tmp_path, KeyboardInterrupt())
    assert crash_reports.list_reports(tmp_path) == []
    for number in range(crash_reports.MAX_REPORTS + 3):
        crash_reports.save(tmp_path, ValueError(number))
    assert len(crash_reports.list_reports(tmp_path)) == crash_reports.MAX_REPORTS
    crash_reports.list_reports(tmp_path)[0].write_text("{")
    assert "damaged" in crash_reports.format_report(crash_reports.list_reports(tmp_path)[0])
    crash_reports.save(tmp_path / "gone", ValueError())  # never a second fall
