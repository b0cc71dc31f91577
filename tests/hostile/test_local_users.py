"""Another account of the machine, which may write to a folder that the owner writes to."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from protocols.local.atomic_files import write_private

pytestmark = [
    pytest.mark.attack("20.secrets"),
    pytest.mark.skipif(os.name != "posix", reason="links of POSIX systems"),
]


def _planted(folder: Path, name: str) -> Path:
    """The temporary file that this process will use: its name can be guessed."""
    return folder / f".{name}.{os.getpid()}.tmp"


def test_a_link_that_waits_for_a_file_is_not_followed(tmp_path: Path) -> None:
    """Attack: put a link where a temporary file will be, to have another file overwritten."""
    other = tmp_path / "important"
    other.write_text("stays")
    _planted(tmp_path, "heads.json").symlink_to(other)
    write_private(tmp_path / "heads.json", b"new")
    assert other.read_text() == "stays"
    assert (tmp_path / "heads.json").read_bytes() == b"new"
    assert not (tmp_path / "heads.json").is_symlink()


def test_a_file_that_waits_for_a_secret_does_not_get_it(tmp_path: Path) -> None:
    """Attack: make a temporary file before its owner does, which all can read, and keep it open."""
    planted = _planted(tmp_path, "key")
    planted.touch(mode=0o666)
    planted.chmod(0o666)
    with planted.open() as kept:
        write_private(tmp_path / "key", b"secret")
        assert kept.read() == ""
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
