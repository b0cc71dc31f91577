"""The coordinator's settings (flag, then environment, then file, then default) and its home."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
import ssl
from collections.abc import Callable, Sequence, Set
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
import psutil
import tomli_w
from msgspec import Meta

from coordinator.storage import ca_files
from coordinator.storage.ca_files import CA_FILE, CA_KEY_FILE, ISSUER_FILE, CaFiles
from protocols.enrollment import ca_chain, certificates, identity
from protocols.enrollment.identity import SigningKey
from protocols.enrollment.joining import Chain
from protocols.errors import BadMessage, HomeError, UnknownName, UsageError
from protocols.local import homes, settings_file
from protocols.local.atomic_files import write_private
from protocols.local.settings_file import SETTINGS_FILE
from protocols.network.addresses import CoordinatorAddress

#: Has the address of the running coordinator.
UP_FILE = "up.json"
PORT = 9092
#: With old names that are kept. A machine that moves gets new addresses for years.
MAX_CERTIFIED_NAMES = 64
_LABEL = "[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
#: Words for true and false in the environment, besides true, false, 1 and 0.
_WORDS = {
    **dict.fromkeys(("yes", "y", "on", "t"), True),
    **dict.fromkeys(("no", "n", "off", "f"), False),
}

Port = Annotated[int, Meta(ge=0, le=65535)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Settings of `commonweight up`. Environment: `COMMONWEIGHT_PORT` and so on.

    `host` and `port`: where agents connect. `mqtt_port`: 0 means `port` + 1. `mqtt_url`: an
    external broker instead of the embedded one. `mqtt_mosquitto`: a folder of
    `commonweight admin mosquitto` instead, for a Mosquitto on this machine. `names`: host names and
    addresses by which agents reach this machine, instead of those detected. `public_addresses`:
    host:port or host:port/path of a proxy or router in front of this machine, of its replicas, and
    of the place where it will be next. Agents learn them, and try them all. `approve`: new peers
    wait for `peers approve`. `announce`: announce the coordinator in the local network.
    `metrics_port`: serves /metrics for Prometheus; 0 is off. `metrics_host`: the address for it. It
    has no TLS and no key, so all who reach the address can read it. `ledger`: the PostgreSQL
    database of the ledger, in place of a file of the home, without a password (`ledger_place`).
    `versions`: keeps the versions in this object store, too (`object_store`). `download_port`: a
    replica that waits sends versions on this port; 0 is off. `download_addresses`: host:port of all
    replicas for that. Agents learn them.
    """

    host: str = "0.0.0.0"
    port: Port = PORT
    mqtt_port: Port = 0
    mqtt_url: str = ""
    mqtt_ca: str = ""
    mqtt_mosquitto: str = ""
    names: list[str] = []
    public_addresses: list[CoordinatorAddress] = []
    approve: bool = False
    metrics_port: Port = 0
    metrics_host: str = "127.0.0.1"
    announce: bool = False
    ledger: str = ""
    versions: str = ""
    download_port: Port = 0
    download_addresses: list[CoordinatorAddress] = []


def read(**flags: Any) -> Settings:
    """Read the settings; `flags` that are not None win. Raises UsageError."""
    home = homes.home_path("coordinator")
    values = settings_file.read_file(home)
    values |= settings_file.read_environment(Settings, "COMMONWEIGHT_", _parse_variable)
    values |= {name: value for name, value in flags.items() if value is not None}
    chosen = settings_file.validate(values, Settings, f"correct {home / SETTINGS_FILE}")
    if chosen.mqtt_url and chosen.mqtt_mosquitto:
        raise UsageError(
            "mqtt_url and mqtt_mosquitto name two brokers",
            f"leave one out, on the command line or in {home / SETTINGS_FILE}",
        )
    return chosen


def _parse_variable(name: str, text: str) -> Any:
    """The value of an environment variable. Raises UsageError."""
    default = getattr(Settings(), name)
    if isinstance(default, bool):
        return _WORDS.get(text.lower(), text)
    if not isinstance(default, list):
        return text
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as err:
        raise UsageError(f'{name}: {err}: write a list as JSON, such as ["a", "b"]') from err


class Keys(NamedTuple):
    """The keys and certificates in a coordinator's home.

    If the CA's key is offline, `ca_key` is the key of an issuer, and `issuer` its certificate.
    `chain`: the transitions from the CA that gave the fleet its id to this one.
    """

    fleet: str
    ca_pem: bytes
    ca_key: SigningKey
    sign_key: SigningKey
    operator_key: SigningKey
    issuer: bytes = b""
    chain: Chain = ()


def init(
    names: list[str],
    keep_offline: Callable[[SigningKey], None] | None = None,
    at: Path | None = None,
) -> tuple[Path, bool]:
    """Create a coordinator's home: CA, keys, TLS certificate. Returns (home, True if new).

    `keep_offline` stores the CA's key elsewhere; an issuer in the home then signs in its place.
    `at`: another home than the usual one.
    """
    home = homes.open_home("coordinator", create=True, at=at)
    if (home / CA_FILE).exists():
        return home, False
    is_offline, issuer = keep_offline is not None, b""
    ca_key, ca_pem = certificates.new_ca(socket.gethostname(), with_issuers=is_offline)
    if keep_offline is not None:
        keep_offline(ca_key)
        ca_key, issuer = write_issuer(home, ca_key, ca_pem)
    else:
        (home / ISSUER_FILE).unlink(missing_ok=True)  # of an `init` that did not end
        write_private(home / CA_KEY_FILE, identity.private_pem(ca_key))
    write_private(home / "coordinator.key", identity.private_pem(identity.new_signing_key()))
    write_private(home / "operator.key", identity.private_pem(identity.new_signing_key()))
    # Last: its presence marks a complete home.
    write_private(home / CA_FILE, ca_pem)
    certify(home, ca_key, ca_pem, names, issuer)
    return home, True


def write_issuer(home: Path, ca_key: SigningKey, ca_pem: bytes) -> tuple[SigningKey, bytes]:
    """Store a new issuer in the home, certificate and key in one file. Returns both."""
    key, issuer = certificates.new_issuer(ca_key, ca_pem)
    write_private(home / ISSUER_FILE, issuer + identity.private_pem(key))
    return key, issuer


def _open_signer(home: Path, files: CaFiles) -> tuple[SigningKey, bytes]:
    """The key that signs in this home, and the issuer's certificate, empty if it is the CA's key.

    Raises HomeError, BadMessage.
    """
    if not files.is_offline:
        return identity.parse_signing_key(files.signer, home / CA_KEY_FILE), b""
    end = b"-----END CERTIFICATE-----\n"
    issuer = files.signer[: files.signer.find(end) + len(end)]
    key = identity.parse_signing_key(files.signer, home / ISSUER_FILE)
    if certificates.signer_public(files.ca_pem, issuer) != identity.public_bytes(key):
        raise BadMessage("the issuer's certificate is for another key")
    return key, issuer


def check_name(name: str) -> str:
    """The host name or address. Raises UsageError if it is neither."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not _HOST_NAME.fullmatch(name) or re.fullmatch(r"[\d.]+", name):
        raise UsageError(
            f"{name!r} is neither a host name nor an address",
            "write it as agents reach this machine: fleet.example.org or 192.0.2.2",
        )
    return name


def add_names(home: Path, names: Sequence[str]) -> list[str]:
    """Add `names` to those in the settings file, which `up` puts in the certificate. Returns all.

    Raises UsageError.
    """
    return _save_names(home, [*_saved_names(home), *map(check_name, names)])


def forget_names(home: Path, names: Sequence[str]) -> list[str]:
    """Remove `names` from the settings file and from the certificate. Returns the other names.

    Raises UnknownName, HomeError.
    """
    saved, certificate = _saved_names(home), _certified_names(home)
    for name in names:
        if name not in certificate and name not in saved:
            raise UnknownName(
                f"the certificate does not name {name}",
                f"it names {', '.join(sorted(certificate))}",
            )
    keys, left = open_keys(home), [name for name in saved if name not in names]
    certify(home, keys.ca_key, keys.ca_pem, left, keys.issuer, forget=frozenset(names))
    return _save_names(home, left)


def _saved_names(home: Path) -> list[str]:
    return list(settings_file.read_file(home).get("names", ()))


def _save_names(home: Path, names: list[str]) -> list[str]:
    names = list(dict.fromkeys(names))
    values = settings_file.read_file(home) | {"names": names}
    write_private(home / SETTINGS_FILE, tomli_w.dumps(values).encode())
    return names


def _certified_names(home: Path) -> set[str]:
    """The names in the TLS certificate; empty if it cannot be read."""
    try:
        return certificates.certificate_names((home / "server.pem").read_bytes())
    except (OSError, ValueError):
        return set()


def open_keys(home: Path) -> Keys:
    """The keys in the home. Raises HomeError."""
    if not (home / CA_FILE).exists():
        raise HomeError(f"{home} has no CA", "make one: commonweight init")
    try:
        files = ca_files.read(home)
        fleet = ca_chain.fleet_of(files.ca_pem, files.chain)
        ca_key, issuer = _open_signer(home, files)
    except (OSError, BadMessage) as err:
        raise HomeError(f"the home {home} is damaged: {err}", "restore it from a backup") from err
    return Keys(
        fleet=fleet,
        ca_pem=files.ca_pem,
        ca_key=ca_key,
        sign_key=identity.load_signing_key(home / "coordinator.key"),
        operator_key=identity.load_signing_key(home / "operator.key"),
        issuer=issuer,
        chain=files.chain,
    )


def certify(
    home: Path,
    ca_key: SigningKey,
    ca_pem: bytes,
    names: list[str],
    issuer: bytes = b"",
    *,
    forget: Set[str] = frozenset(),
) -> bool:
    """Create or renew the TLS certificate. False if it is valid for `names` for another month.

    Names of the old certificate stay, except those to `forget`: agents may know this machine by
    them. `issuer`: the certificate (PEM) of the issuer whose key `ca_key` is; servers send it too.
    """
    certificate = home / "server.pem"
    wanted = {"localhost", "127.0.0.1", "::1", *names}
    certified = _certified_names(home)
    kept = sorted(certified - wanted - forget)
    kept = kept[: max(0, MAX_CERTIFIED_NAMES - len(wanted))]
    # A key that does not match (a crash between the two files) is replaced like an old one.
    with contextlib.suppress(OSError, ValueError):
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, home / "server.key")
        pem = certificate.read_bytes()
        if (
            pem.endswith(issuer)
            and certificates.is_issued_by(pem, issuer or ca_pem)
            and wanted <= certified
            and not forget
            and certificates.days_left(pem) > 30
        ):
            return False
    try:
        key, pem = certificates.new_server_certificate(
            ca_key, issuer or ca_pem, sorted({*wanted, *kept})
        )
    except ValueError as err:
        raise UsageError(f"no certificate can be made for {', '.join(names)}: {err}") from err
    write_private(home / "server.key", identity.private_pem(key))
    write_private(certificate, pem + issuer)
    return True


def reachable_names(host: str) -> list[str]:
    """Names and addresses by which others can reach a server that listens on `host`."""
    if host not in ("0.0.0.0", "::", ""):
        return [host]
    addresses = [a for found in psutil.net_if_addrs().values() for a in found]
    found = [
        a.address
        for a in addresses
        if a.family == socket.AF_INET and not a.address.startswith("127.")
    ]
    if host == "::":  # without loopback and link-local addresses
        found += [
            a.address
            for a in addresses
            if a.family == socket.AF_INET6 and not a.address.startswith(("::1", "fe80"))
        ]
    with contextlib.suppress(OSError):
        found.append(socket.gethostname())
    return found or ["127.0.0.1"]
