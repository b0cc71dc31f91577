"""Homes: made private, stamped, locked, and refused with words when they cannot be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from protocols.errors import ExitCode, HomeError, HomeLocked, HomeTooNew, NotRunning
from protocols.local import homes


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COMMONWEIGHT_AGENT_HOME", str(tmp_path / "agent"))
    return tmp_path / "home"


def stamp(home: Path, content: bytes | dict[str, object]) -> None:
    home.mkdir(exist_ok=True)
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (home / "home.json").write_bytes(data)


def test_the_environment_says_where(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert homes.home_path("coordinator") == home
    assert homes.home_path("agent") == home.parent / "agent"
    monkeypatch.setenv("COMMONWEIGHT_HOME", "~/here")
    assert homes.home_path("coordinator") == Path.home() / "here"
    monkeypatch.delenv("COMMONWEIGHT_HOME")
    assert homes.home_path("coordinator").name == "coordinator"


def test_none_yet(home: Path) -> None:
    with pytest.raises(NotRunning, match="no coordinator") as caught:
        homes.open_home("coordinator")
    assert caught.value.exit_code is ExitCode.NOT_RUNNING
    assert "commonweight init" in caught.value.hint
    assert not home.exists()


def test_a_new_home_is_private_and_stays(home: Path) -> None:
    assert homes.open_home("coordinator", create=True) == home
    first = (home / "home.json").read_bytes()
    assert json.loads(first)["format"] == homes.FORMATS["coordinator"]
    assert homes.open_home("coordinator", create=True) == homes.open_home("coordinator") == home
    assert (home / "home.json").read_bytes() == first
    if os.name == "posix":
        assert home.stat().st_mode & 0o777 == 0o700


def test_an_older_format_opens(home: Path) -> None:
    stamp(home, {"format": homes.FORMATS["coordinator"] - 1, "kind": "coordinator"})
    assert homes.open_home("coordinator") == home


def test_the_home_of_another_program_is_named_as_such_also_with_a_newer_format(home: Path) -> None:
    stamp(home, {"format": homes.FORMATS["coordinator"] + 1, "kind": "agent"})
    with pytest.raises(HomeError, match="is the home of an agent") as caught:
        homes.open_home("coordinator")
    assert caught.value.hint == "set COMMONWEIGHT_HOME to the home of the coordinator"


def test_a_newer_format_is_refused_and_kept(home: Path) -> None:
    stamp(
        home,
        {"format": homes.FORMATS["coordinator"] + 1, "kind": "coordinator", "written_by": "9.9"},
    )
    before = (home / "home.json").read_bytes()
    with pytest.raises(HomeTooNew, match=r"9\.9") as caught:
        homes.open_home("coordinator", create=True)
    assert "update" in caught.value.hint
    assert (home / "home.json").read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00\x80",
        b"{",
        b"[]",
        b"{}",
        b"null",
        b"[" * 100_000,
        b'{"format": "x", "kind": "coordinator"}',
        b'{"format": null, "kind": "coordinator"}',
        b'{"format": Infinity, "kind": "coordinator"}',
        b'{"format": 1}',
    ],
    ids=lambda content: repr(content[:24]),
)
def test_a_damaged_stamp_is_said(home: Path, content: bytes) -> None:
    stamp(home, content)
    with pytest.raises(HomeError, match="damaged"):
        homes.open_home("coordinator")


def test_the_other_programs_home_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    homes.open_home("coordinator", create=True)
    monkeypatch.setenv("COMMONWEIGHT_AGENT_HOME", str(home))
    with pytest.raises(HomeError, match="home of a coordinator"):
        homes.open_home("agent", create=True)


def test_a_file_in_the_way_is_said(home: Path) -> None:
    home.write_text("not a folder")
    with pytest.raises(HomeError, match=str(home)):
        homes.open_home("coordinator", create=True)


@pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="for root every folder can be written"
)
def test_no_permission_is_said(home: Path) -> None:
    homes.open_home("coordinator", create=True)
    home.chmod(0o500)
    try:
        with pytest.raises(HomeError, match="permission"):
            homes.open_home("coordinator")
    finally:
        home.chmod(0o700)


_LOCK = """
import sys
from pathlib import Path
from protocols.local import homes
from protocols.errors import HomeLocked
try:
    homes.lock_home(Path(sys.argv[1]), "coordinator")
except HomeLocked:
    sys.exit(9)
"""


def test_one_program_works_in_a_home(home: Path) -> None:
    homes.open_home("coordinator", create=True)
    held = homes.lock_home(home, "coordinator")
    other = subprocess.run([sys.executable, "-c", _LOCK, str(home)], check=False)
    assert other.returncode == 9
    with pytest.raises(HomeLocked, match="another coordinator"):
        homes.lock_home(home, "coordinator")
    held.release()
    freed = subprocess.run([sys.executable, "-c", _LOCK, str(home)], check=False)
    assert freed.returncode == 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a folder where nothing can be made")
def test_a_folder_that_cannot_be_made_does_not_suggest_the_same_command_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COMMONWEIGHT_HOME", "/proc/foo")
    with pytest.raises(HomeError, match="cannot create the folder /proc/foo") as caught:
        homes.open_home("coordinator", create=True)
    assert caught.value.hint == "set COMMONWEIGHT_HOME to another folder"


def test_access_is_in_the_home_that_the_environment_names(
    home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    usual = tmp_path / "data" / "commonweight" / "operator"
    monkeypatch.delenv("COMMONWEIGHT_OPERATOR_HOME", raising=False)
    assert homes.home_path("operator") == home / "operator"
    monkeypatch.delenv("COMMONWEIGHT_HOME")
    monkeypatch.setattr(homes.platformdirs, "user_data_path", lambda _: usual.parent)
    usual.mkdir(parents=True)
    assert homes.home_path("operator") == usual
    # An older version has joined into the usual folder: it is used until there is a new access.
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(home))
    assert homes.home_path("operator") == usual
    made = homes.open_home("operator", create=True)
    assert made == homes.home_path("operator") == home / "operator"
    monkeypatch.setenv("COMMONWEIGHT_OPERATOR_HOME", str(tmp_path / "own"))
    assert homes.home_path("operator") == tmp_path / "own"
