"""An encrypted file is decrypted completely with its passphrase, or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from coordinator.admin import encryption
from coordinator.cli.main import app
from coordinator.storage import settings
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.errors import HomeError, Refused, UsageError

PIECE = encryption._PIECE_BYTES
QUICK = 4  # of scrypt's n: no attacker here


@pytest.mark.parametrize("size", [0, 1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
def test_decryption_gives_the_original(tmp_path: Path, size: int) -> None:
    plain, out, back = (tmp_path / name for name in ("plain", "out", "back"))
    plain.write_bytes(bytes(range(251)) * (size // 251 + 1))
    with plain.open("r+b") as file:
        file.truncate(size)
    encryption.seal(plain, out, "correct horse", log_n=QUICK)
    assert encryption.is_sealed(out)
    assert not encryption.is_sealed(plain)
    assert out.stat().st_mode & 0o077 == 0
    encryption.unseal(out, back, "correct horse")
    assert back.read_bytes() == plain.read_bytes()
    assert back.stat().st_mode & 0o077 == 0


@pytest.fixture(scope="module")
def two_pieces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sealed")
    (folder / "plain").write_bytes(b"k" * (2 * PIECE))
    encryption.seal(folder / "plain", folder / "out", "word", log_n=QUICK)
    return folder / "out"


def opens(data: bytes, folder: Path, passphrase: str = "word") -> None:
    (folder / "changed").write_bytes(data)
    (folder / "back").unlink(missing_ok=True)
    encryption.unseal(folder / "changed", folder / "back", passphrase)


def test_a_wrong_passphrase_is_refused(two_pieces: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="the passphrase is wrong"):
        opens(two_pieces.read_bytes(), tmp_path, "sword")


@given(
    where=st.integers(len(encryption.MAGIC) + 1, encryption._HEAD_BYTES + 2 * PIECE),
    bit=st.integers(0, 7),
)
def test_a_changed_bit_is_found(
    two_pieces: Path, tmp_path_factory: pytest.TempPathFactory, where: int, bit: int
) -> None:
    data = bytearray(two_pieces.read_bytes())
    data[where] ^= 1 << bit
    with pytest.raises(Refused):
        opens(bytes(data), tmp_path_factory.getbasetemp())


def test_pieces_cannot_be_omitted_or_moved(two_pieces: Path, tmp_path: Path) -> None:
    data = two_pieces.read_bytes()
    head, one = data[: encryption._HEAD_BYTES], PIECE + 16
    first, second = data[encryption._HEAD_BYTES :][:one], data[encryption._HEAD_BYTES + one :]
    for changed in (head + first, head + second, head + second + first, head, data[:-1]):
        with pytest.raises(Refused):
            opens(changed, tmp_path)
    with pytest.raises(HomeError):
        opens(head[:-1], tmp_path)
    with pytest.raises(HomeError, match="too much memory"):
        opens(encryption.MAGIC + b"\x40" + head[len(encryption.MAGIC) + 1 :], tmp_path)


def test_no_file_is_overwritten(two_pieces: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        encryption.seal(two_pieces, two_pieces, "word", log_n=QUICK)
    with pytest.raises(UsageError, match="empty passphrase"):
        encryption.seal(two_pieces, tmp_path / "new", "", log_n=QUICK)


def test_an_encrypted_backup_restores_a_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the two commands; the passphrase is not in them."""
    home, words, file = tmp_path / "home", tmp_path / "words", tmp_path / "fleet.backup"
    words.write_text("correct horse\n")
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(home))
    keys = settings.init([])[0] / "ca.key"
    SqliteLedger(home / "ledger.db").close()
    ask = CliRunner().invoke
    given = ["--passphrase-file", str(words)]
    assert ask(app, ["backup", str(file), *given]).exit_code == 0
    assert keys.read_bytes() not in file.read_bytes()
    was = keys.read_bytes()
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "other"))
    assert isinstance(ask(app, ["restore", str(file)]).exception, UsageError), "no terminal"
    assert ask(app, ["restore", str(file), *given]).exit_code == 0
    assert (tmp_path / "other" / "ca.key").read_bytes() == was
    words.write_text("another\n")
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(tmp_path / "third"))
    assert isinstance(ask(app, ["restore", str(file), *given]).exception, Refused)
    assert not (tmp_path / "third").exists()
