"""The coordinator's settings and the making of its home."""

from __future__ import annotations

import os
import ssl
from pathlib import Path

import pytest

from coordinator.storage import settings
from protocols.enrollment import certificates, identity
from protocols.errors import ExitCode, HomeError, UnknownName, UsageError
from protocols.local.atomic_files import write_private
from protocols.local.settings_file import SETTINGS_FILE


@pytest.fixture
def home(coordinator_home: Path) -> Path:
    coordinator_home.mkdir()
    return coordinator_home


def test_the_order_is_flag_environment_file_default(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert settings.read().port == settings.PORT
    (home / SETTINGS_FILE).write_text("port = 1111\nhost = '10.0.0.1'\nnames = ['a', 'b']\n")
    assert settings.read().port == 1111
    monkeypatch.setenv("COMMONWEIGHT_PORT", "2222")
    assert settings.read().port == 2222
    chosen = settings.read(port=3333, host=None)
    assert (chosen.port, chosen.host, chosen.names) == (3333, "10.0.0.1", ["a", "b"])
    assert chosen.approve is False


def test_a_list_in_the_environment_is_json(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMMONWEIGHT_NAMES", '["host.lan", "10.0.0.2"]')
    assert settings.read().names == ["host.lan", "10.0.0.2"]


@pytest.mark.parametrize(("text", "value"), [("yes", True), ("OFF", False), ("1", True)])
def test_a_switch_in_the_environment_is_a_word(
    home: Path, monkeypatch: pytest.MonkeyPatch, text: str, value: bool
) -> None:
    (home / SETTINGS_FILE).write_text(f"approve = {str(not value).lower()}\n")
    monkeypatch.setenv("COMMONWEIGHT_APPROVE", text)
    assert settings.read().approve is value


@pytest.mark.parametrize(
    "wrong",
    ["port = 70000", "port = -1", "port = 'x'", "port = ", "names = 'a'", "colour = 'red'", "= 1"],
)
def test_a_wrong_file_is_a_usage_fault(home: Path, wrong: str) -> None:
    (home / SETTINGS_FILE).write_text(wrong)
    with pytest.raises(UsageError) as caught:
        settings.read()
    assert caught.value.exit_code is ExitCode.USAGE


def test_a_file_that_is_no_text_is_a_usage_fault(home: Path) -> None:
    (home / SETTINGS_FILE).write_bytes(b"host = '\xff\xfe'")
    with pytest.raises(UsageError, match=SETTINGS_FILE):
        settings.read()


@pytest.mark.parametrize(
    ("name", "value"),
    [("PORT", "x"), ("PORT", ""), ("PORT", "70000"), ("APPROVE", "perhaps"), ("NAMES", "a,b")],
)
def test_a_wrong_variable_is_a_usage_fault(
    home: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(f"COMMONWEIGHT_{name}", value)
    with pytest.raises(UsageError, match=name.lower()):
        settings.read()


def test_a_wrong_flag_is_a_usage_fault(home: Path) -> None:
    with pytest.raises(UsageError, match="port"):
        settings.read(port=70000)


# --- the home --------------------------------------------------------------------------------


def test_a_home_is_made_once(home: Path) -> None:
    made, new = settings.init(["host.lan"])
    assert (made, new) == (home, True)
    keys = settings.open_keys(home)
    assert settings.init(["host.lan"]) == (home, False)
    again = settings.open_keys(home)
    assert again.fleet == keys.fleet
    assert identity.public_bytes(again.operator_key) == identity.public_bytes(keys.operator_key)
    if os.name == "posix":
        private = [path for path in home.iterdir() if path.suffix in (".key", ".json", ".pem")]
        assert {path.stat().st_mode & 0o077 for path in private} == {0}


def test_names_are_kept_and_the_rest_of_the_file_with_them(home: Path) -> None:
    (home / SETTINGS_FILE).write_text("port = 1111\n")
    assert settings.add_names(home, ["host.lan"]) == ["host.lan"]
    assert settings.add_names(home, ["10.0.0.9", "host.lan"]) == ["host.lan", "10.0.0.9"]
    chosen = settings.read()
    assert (chosen.port, chosen.names) == (1111, ["host.lan", "10.0.0.9"])


@pytest.mark.parametrize(
    "name", ["not a host!", "", "a b", "host.lan:9092", "https://host", "-a", "300.1.1.1", "a" * 64]
)
def test_what_is_no_name_is_not_saved(home: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is neither a host name nor an address"):
        settings.add_names(home, ["good.lan", name])
    assert settings.read().names == []


@pytest.mark.parametrize("name", ["host", "fleet.example.org", "my_hub", "192.0.2.2", "fd00::1"])
def test_host_names_and_addresses_are_names(name: str) -> None:
    assert settings.check_name(name) == name


def test_a_new_name_leaves_the_old_ones_in_the_certificate_until_they_are_forgotten(
    home: Path,
) -> None:
    """Agents that know the coordinator by an old name must find it there."""
    settings.init(["192.0.2.2", "old.lan"])
    keys = settings.open_keys(home)
    settings.add_names(home, ["new.lan"])
    assert settings.certify(home, keys.ca_key, keys.ca_pem, ["new.lan"])
    assert {"192.0.2.2", "old.lan", "new.lan", "localhost"} <= names(home)
    assert not settings.certify(home, keys.ca_key, keys.ca_pem, ["new.lan"])
    assert settings.forget_names(home, ["192.0.2.2"]) == ["new.lan"]
    assert names(home) == {"localhost", "127.0.0.1", "::1", "old.lan", "new.lan"}
    assert settings.forget_names(home, ["new.lan"]) == []
    assert "new.lan" not in names(home)
    with pytest.raises(UnknownName, match=r"does not name 192\.0\.2\.2"):
        settings.forget_names(home, ["192.0.2.2"])


def test_the_certificate_has_a_bounded_number_of_old_names(home: Path) -> None:
    settings.init([f"10.0.1.{number}" for number in range(settings.MAX_CERTIFIED_NAMES)])
    keys = settings.open_keys(home)
    assert settings.certify(home, keys.ca_key, keys.ca_pem, ["10.0.2.1"])
    assert len(names(home)) == settings.MAX_CERTIFIED_NAMES
    assert "10.0.2.1" in names(home)


def test_without_keys_the_way_is_shown(home: Path) -> None:
    with pytest.raises(HomeError) as caught:
        settings.open_keys(home)
    assert "commonweight init" in caught.value.hint


@pytest.mark.parametrize("name", ["ca.pem", "ca.key", "coordinator.key", "operator.key"])
@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_a_damaged_home_is_said(home: Path, name: str, content: bytes | None) -> None:
    settings.init([])
    if content is None:
        (home / name).unlink()
    else:
        (home / name).write_bytes(content)
    with pytest.raises(HomeError):
        settings.open_keys(home)


def names(home: Path) -> set[str]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "server.pem", home / "server.key")  # they belong together
    return certificates.certificate_names((home / "server.pem").read_bytes())


def test_a_certificate_is_kept_while_it_is_good(home: Path) -> None:
    settings.init(["host.lan"])
    keys = settings.open_keys(home)
    assert {"localhost", "127.0.0.1", "::1", "host.lan"} == names(home)
    assert not settings.certify(home, keys.ca_key, keys.ca_pem, ["host.lan"])
    assert settings.certify(home, keys.ca_key, keys.ca_pem, ["host.lan", "10.0.0.7"])
    assert "10.0.0.7" in names(home)


@pytest.mark.parametrize("file", ["server.pem", "server.key"])
@pytest.mark.parametrize("how", ["missing", "junk", "another"])
def test_a_certificate_that_does_not_fit_its_key_is_made_anew(
    home: Path, file: str, how: str
) -> None:
    """A crash between the two files, or a half restored backup, must not keep it from starting."""
    settings.init([])
    keys = settings.open_keys(home)
    key, pem = certificates.new_server_certificate(keys.ca_key, keys.ca_pem, ["localhost"])
    if how == "missing":
        (home / file).unlink()
    elif how == "junk":
        (home / file).write_bytes(b"junk")
    elif file == "server.key":
        write_private(home / file, identity.private_pem(key))
    else:
        (home / file).write_bytes(pem)
    assert settings.certify(home, keys.ca_key, keys.ca_pem, [])
    assert "localhost" in names(home)


def test_a_name_that_no_certificate_can_hold(home: Path) -> None:
    settings.init([])
    keys = settings.open_keys(home)
    with pytest.raises(UsageError, match="münchen"):
        settings.certify(home, keys.ca_key, keys.ca_pem, ["münchen.lan"])
    assert "localhost" in names(home)


def test_where_others_reach_us() -> None:
    assert settings.reachable_names("10.0.0.1") == ["10.0.0.1"]
    found = settings.reachable_names("0.0.0.0")
    assert found
    assert not any(name.startswith("127.") for name in found[:-1])
