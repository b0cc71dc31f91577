"""The two files between commands and the agent: atomic, private, and robust when damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.home import status_files
from agent.home.status_files import OwnerRequest, Status


def a_status() -> Status:
    return Status(pid=1, at=2.0, since=1.0, peer="P", name="box", version="0", state="idle")


def test_the_status_is_read_back(tmp_path: Path) -> None:
    assert status_files.read_status(tmp_path) is None
    for state in ("idle", "training"):
        status = a_status()
        status.state = state
        status_files.write_status(tmp_path, status)
    assert status_files.read_status(tmp_path) == status


def test_the_request_survives_the_agent(tmp_path: Path) -> None:
    assert status_files.read_request(tmp_path) == OwnerRequest()
    for wish in (
        OwnerRequest(want="pause", until=12.5),
        OwnerRequest(want="finish"),
        OwnerRequest(),
    ):
        status_files.write_request(tmp_path, wish)
        assert status_files.read_request(tmp_path) == wish
    if os.name == "posix":
        assert (tmp_path / status_files.REQUEST_FILE).stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[]", b"{", b'{"want":"dance"}', b'{"want":1}', b"[" * 100_000]
)
def test_a_damaged_file_reads_as_missing(tmp_path: Path, content: bytes) -> None:
    for name in (status_files.STATUS_FILE, status_files.REQUEST_FILE):
        (tmp_path / name).write_bytes(content)
    assert status_files.read_status(tmp_path) is None
    assert status_files.read_request(tmp_path) == OwnerRequest()


def test_unknown_fields_of_a_newer_version_are_ignored(tmp_path: Path) -> None:
    (tmp_path / status_files.REQUEST_FILE).write_bytes(
        b'{"want":"pause","until":0.0,"mood":"good"}'
    )
    assert status_files.read_request(tmp_path) == OwnerRequest(want="pause")
