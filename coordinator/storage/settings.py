"""The coordinator's settings and its home: flag, then environment, then file, then default."""

from __future__ import annotations

import contextlib
import secrets
import socket
import ssl
import tomllib
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import psutil
import tomli_w
from pydantic import Field, StringConstraints, ValidationError
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

from protocols.enrollment import identity
from protocols.enrollment.identity import SigningKey
from protocols.errors import BadMessage, HomeError, UsageError
from protocols.local import homes
from protocols.local.atomic_files import write_private

SETTINGS_FILE = "settings.toml"
#: Says where the running coordinator answers.
UP_FILE = "up.json"
PORT = 9092


class Settings(BaseSettings):
    """What can be set for `commonweight up`. Environment: `COMMONWEIGHT_PORT` and so on.

    `host` and `port`: where agents connect. `mqtt_port` 0 means the port after. `mqtt_url`: a
    broker of your own instead of the embedded one. `names`: host names and addresses under which
    agents reach this machine, if they are not those found. `public_addresses`: host:port, or
    host:port/path, by which they reach it through something that stands before it, a proxy or a
    router. `approve`: new peers wait for `peers approve`. `announce`: say in this network where the
    coordinator is. `metrics_port`: Prometheus finds /metrics there, on loopback; 0 is off.
    """

    model_config = SettingsConfigDict(env_prefix="COMMONWEIGHT_", extra="forbid")

    host: str = "0.0.0.0"
    port: int = Field(PORT, ge=0, le=65535)
    mqtt_port: int = Field(0, ge=0, le=65535)
    mqtt_url: str = ""
    mqtt_ca: str = ""
    names: list[str] = []
    public_addresses: list[
        Annotated[str, StringConstraints(pattern=r"^[^/]+:\d{1,5}(/[\w./-]*)?$")]
    ] = []
    approve: bool = False
    metrics_port: int = Field(0, ge=0, le=65535)
    announce: bool = False

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = TomlConfigSettingsSource(
            settings_cls, homes.home_path("coordinator") / SETTINGS_FILE
        )
        return (init_settings, env_settings, file)


def read(**flags: Any) -> Settings:
    """The settings with these flags on top (None: not given). Raises UsageError."""
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as err:
        first = err.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UsageError(f"setting {where!r}: {first['msg']}") from err
    except SettingsError as err:  # a list in the environment is written as JSON
        raise UsageError(f'{err}: write a list as JSON, such as ["a", "b"]') from err
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise UsageError(
            f"cannot read {homes.home_path('coordinator') / SETTINGS_FILE}: {err}"
        ) from err


class MqttLogin(msgspec.Struct, frozen=True):
    """The fleet's login for the embedded broker; `removed` peers had been sent away by then."""

    user: str
    password: str
    removed: int = 0


class Keys(NamedTuple):
    """The keys and certificates in a coordinator's home."""

    fleet: str
    ca_pem: bytes
    ca_key: SigningKey
    sign_key: SigningKey
    operator_key: SigningKey
    login: MqttLogin


def init(names: list[str]) -> tuple[Path, bool]:
    """Make a coordinator's home: CA, keys, TLS certificate. (home, True if it is new)."""
    home = homes.open_home("coordinator", create=True)
    if (home / "ca.pem").exists():
        return home, False
    ca_key, ca_pem = identity.new_ca(socket.gethostname())
    write_private(home / "ca.key", identity.private_pem(ca_key))
    write_private(home / "coordinator.key", identity.private_pem(identity.new_signing_key()))
    write_private(home / "operator.key", identity.private_pem(identity.new_signing_key()))
    new_login(home, 0)
    # Last: its presence says that the home is whole.
    write_private(home / "ca.pem", ca_pem)
    certify(home, ca_key, ca_pem, names)
    return home, True


def save_names(home: Path, names: list[str]) -> None:
    """Write the names under which agents reach this machine into the file: `up` certifies them."""
    try:
        values = tomllib.loads((home / SETTINGS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        values = {}
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise UsageError(f"cannot read {home / SETTINGS_FILE}: {err}") from err
    write_private(home / SETTINGS_FILE, tomli_w.dumps(values | {"names": names}).encode())


def new_login(home: Path, removed: int) -> MqttLogin:
    """A new MQTT password: a peer that was removed knows the last one."""
    login = MqttLogin("fleet", secrets.token_urlsafe(24), removed)
    write_private(home / "mqtt.json", msgspec.json.encode(login))
    return login


def open_keys(home: Path) -> Keys:
    """The keys in the home. Raises HomeError."""
    if not (home / "ca.pem").exists():
        raise HomeError(f"{home} has no CA", "make one: commonweight init")
    try:
        ca_pem = (home / "ca.pem").read_bytes()
        login = msgspec.json.decode((home / "mqtt.json").read_bytes(), type=MqttLogin)
        fleet = identity.ca_fingerprint(ca_pem).hex()[:16]
    except (OSError, msgspec.DecodeError, BadMessage) as err:
        raise HomeError(f"the home {home} is damaged: {err}", "restore it from a backup") from err
    return Keys(
        fleet=fleet,
        ca_pem=ca_pem,
        ca_key=identity.load_signing_key(home / "ca.key"),
        sign_key=identity.load_signing_key(home / "coordinator.key"),
        operator_key=identity.load_signing_key(home / "operator.key"),
        login=login,
    )


def certify(home: Path, ca_key: SigningKey, ca_pem: bytes, names: list[str]) -> bool:
    """Make or renew the TLS certificate; False if it is good for all of `names` for a month."""
    certificate = home / "server.pem"
    wanted = {"localhost", "127.0.0.1", "::1", *names}
    # A pair that does not fit (a crash between the two files) is made anew like one that is old.
    with contextlib.suppress(OSError, ValueError):
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, home / "server.key")
        pem = certificate.read_bytes()
        if wanted <= identity.certificate_names(pem) and identity.days_left(pem) > 30:
            return False
    try:
        key, pem = identity.new_server_certificate(ca_key, ca_pem, sorted(wanted))
    except ValueError as err:
        raise UsageError(f"no certificate can be made for {', '.join(names)}: {err}") from err
    write_private(home / "server.key", identity.private_pem(key))
    write_private(certificate, pem)
    return True


def reachable_names(host: str) -> list[str]:
    """Names and addresses under which others can reach a server that listens on `host`."""
    if host not in ("0.0.0.0", "::", ""):
        return [host]
    found: list[str] = []
    later: list[str] = []
    for addresses in psutil.net_if_addrs().values():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                found.append(address.address)
            # Not loopback, and not those that hold on one link only.
            elif address.family == socket.AF_INET6 and not address.address.startswith(
                ("::1", "fe80")
            ):
                later.append(address.address)
    if host == "::":
        found += later
    with contextlib.suppress(OSError):
        found.append(socket.gethostname())
    return found or ["127.0.0.1"]
