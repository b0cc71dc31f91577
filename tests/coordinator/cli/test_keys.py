"""`commonweight keys` and `init --offline-ca` with wrong input: each names the next step."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from coordinator.cli.main import app
from coordinator.storage import settings
from protocols.errors import CommonweightError, ExitCode, UsageError

WORD = "correct horse battery"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a home, an offline CA's key, and files with passphrases."""
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    for name, text in (("word", WORD), ("other", WORD + " two"), ("short", "short")):
        (tmp_path / name).write_text(text + "\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    return tmp_path


def run(*words: str) -> None:
    """Run the command. Raises its error."""
    result = CliRunner().invoke(app, words)
    if isinstance(result.exception, Exception):
        raise result.exception
    assert result.exit_code == 0, result.output


def refused(*words: str) -> UsageError:
    with pytest.raises(UsageError) as caught:
        run(*words)
    assert caught.value.exit_code is ExitCode.USAGE
    assert caught.value.hint
    assert "[Errno" not in caught.value.message
    return caught.value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--offline-ca", "ca.key", "--passphrase-file", "none"), "No such file"),
        (("--offline-ca", "ca.key", "--passphrase-file", "binary"), "not text"),
        (("--offline-ca", "ca.key", "--passphrase-file", "short"), "12 characters"),
        (("--offline-ca", "word", "--passphrase-file", "word"), "exists already"),
        (("--offline-ca", "none/ca.key", "--passphrase-file", "word"), "cannot write"),
        (("--offline-ca", "home/ca.key", "--passphrase-file", "word"), "which a thief would copy"),
        (("--offline-ca", "ca.key"), "no terminal"),
        (("--passphrase-file", "word"), "kept offline"),
    ],
)
def test_no_ca_is_made_by_mistake(folder: Path, words: tuple[str, ...], message: str) -> None:
    assert message in refused("init", *words).message
    assert not (folder / "home" / "ca.pem").exists()


OFFLINE = ("--ca-key", "ca.key", "--passphrase-file", "word")
NEW = ("--offline-ca", "new.key", "--new-passphrase-file", "other")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("issuer",), "signs a new issuer"),
        (("issuer", "--ca-key", "none", "--passphrase-file", "word"), "No such file"),
        (("issuer", "--ca-key", "word", "--passphrase-file", "word"), "no encrypted key"),
        (("issuer", "--ca-key", "ca.key", "--passphrase-file", "other"), "this passphrase"),
        (("issuer", *OFFLINE, "--old-days", "3"), "--old-days is not for"),
        (("signing", "--ca-key", "ca.key"), "--ca-key is not for"),
        (("operator", "--offline-ca", "new.key"), "--offline-ca is not for"),
        (("ca",), "has to sign"),
        (("ca", *OFFLINE), "needs a file"),
        (("ca", *OFFLINE, "--offline-ca", "ca.key", "--new-passphrase-file", "word"), "exists"),
        (("ca", *OFFLINE, "--offline-ca", "new.key"), "passphrase of the new CA's key"),
        (("ca", *OFFLINE, *NEW, "--old-days", "nan"), "nan days"),
        (("ca", *OFFLINE, *NEW, "--old-days", "91"), "91 days"),
        (("ca", "--passphrase-file", "word"), "for the old CA's key"),
        (("ca", "--new-passphrase-file", "word"), "for the new CA's key"),
    ],
)
def test_no_key_is_replaced_by_mistake(folder: Path, words: tuple[str, ...], message: str) -> None:
    run("init", "--offline-ca", "ca.key", "--passphrase-file", "word")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert message in refused("keys", "rotate", *words).message
    changed = {path for path in folder.rglob("*") if path.is_file()} ^ before.keys()
    assert {path.name for path in changed} <= {"lock"}
    assert all(path.read_bytes() == data for path, data in before.items())


def test_a_ca_in_the_home_is_taken_offline(folder: Path) -> None:
    run("init")
    assert "keys rotate ca --offline-ca" in refused("init", "--offline-ca", "ca.key").hint
    assert "keys rotate ca --offline-ca" in refused("keys", "rotate", "issuer").hint
    assert "in this home" in refused("keys", "rotate", "ca", *OFFLINE).message
    fleet = settings.open_keys(folder / "home").fleet
    run("keys", "rotate", "ca", *NEW)
    after = settings.open_keys(folder / "home")
    assert (after.fleet, bool(after.issuer)) == (fleet, True)
    assert (folder / "new.key").exists()


def test_mosquitto_gets_a_folder_of_its_own(folder: Path) -> None:
    run("init")
    assert "choose a folder" in refused("mqtt", "mosquitto", "home").hint
    with pytest.raises(CommonweightError, match="cannot write into word: File exists"):
        run("mqtt", "mosquitto", "word")
