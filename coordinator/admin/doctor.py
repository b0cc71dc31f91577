"""Checks of this coordinator: its folder, its ledger, its ports, its broker."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import ssl
import time
from collections.abc import Iterator
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from coordinator.fleet.readings import num_available, num_enrolled
from coordinator.fleet.state import Fleet
from coordinator.storage import ledger_place, settings
from coordinator.storage.settings import UP_FILE, Settings
from coordinator.transport.mosquitto import CONFIG, find_program
from coordinator.transport.ports import listen_error, listenable
from protocols import VERSION
from protocols.enrollment import certificates
from protocols.errors import CommonweightError, HomeError, Unreachable
from protocols.local import homes
from protocols.local.checks import Advice, Check, CheckStep, Skipped, run_checks
from protocols.local.home_checks import check_crashes, check_private, check_room
from protocols.messages.mqtt import (
    NO_TLS_HINT,
    MqttAddress,
    describe_failure,
    parse_url,
    tls_context,
)

ENGINES = ("1.41", "1.42")
_TIMEOUT_S = 5.0
#: Free disk space for the versions of a large model: a warning, and a fault.
_LOW_DISK_BYTES, _MIN_DISK_BYTES = 10_000_000_000, 1_000_000_000
_RENEWED_DAYS = 30
_RESTART_HINT = "restart the coordinator: it then creates a new one"


class Status(NamedTuple):
    """The status of a running coordinator."""

    address: str
    fleet: Fleet
    mqtt: MqttAddress


def examine_coordinator(home: Path) -> Iterator[Check]:
    """Run every check of the coordinator in `home`; yield each result at once."""
    doctor = _Doctor(home)
    # In their order, each with the checks that must pass before it.
    steps = (
        CheckStep("home", doctor.home),
        CheckStep("permissions", lambda: check_private(home), ("home",)),
        CheckStep("settings", doctor.settings),
        CheckStep("disk", lambda: check_room(home, _LOW_DISK_BYTES, _MIN_DISK_BYTES), ("home",)),
        CheckStep("crashes", lambda: check_crashes(home), ("home",)),
        CheckStep("engine", engine),
        CheckStep("ledger", doctor.ledger, ("home",)),
        CheckStep("versions", doctor.versions, ("home",)),
        CheckStep("clock", doctor.clock, ("ledger",)),
        CheckStep("running", doctor.running, ("home",)),
        CheckStep("certificate", doctor.certificate, ("home", "settings")),
        CheckStep("ports", doctor.ports, ("settings",)),
        CheckStep("broker", doctor.broker, ("running",)),
        CheckStep("peers", doctor.peers, ("running",)),
    )
    yield from run_checks(steps)


class _Doctor:
    """The checks, and the results that later ones use: each runs after the checks it needs."""

    _settings: Settings
    _up: Status | None = None
    _newest_at = 0.0

    def __init__(self, home: Path) -> None:
        self._home = home

    @property
    def _is_external(self) -> bool:
        """Whether the coordinator does not run the broker. Options count for one that runs."""
        chosen = bool(self._settings.mqtt_url or self._settings.mqtt_mosquitto)
        told = self._told_at_start if self._up is not None else {}
        return bool(told.get("external_broker", chosen))

    @cached_property
    def _told_at_start(self) -> dict[str, Any]:
        """What the coordinator wrote to `up.json` at its start; empty after its end. Read once."""
        try:
            return dict(msgspec.json.decode((self._home / UP_FILE).read_bytes()))
        except (OSError, msgspec.DecodeError, TypeError, ValueError):
            return {}

    # --- the folder ---

    def home(self) -> str:
        home = homes.open_home("coordinator")
        return f"{home}, fleet {settings.open_keys(home).fleet}"

    def settings(self) -> str | Advice:
        self._settings = settings.read()
        broker = "an external broker" if self._is_external else "the embedded broker"
        said = f"{self._settings.host}:{self._settings.port}, {broker}"
        url = self._settings.mqtt_url
        if url and parse_url(url).is_readable_on_the_way:
            return Advice(f"{said} without TLS", NO_TLS_HINT)
        return said

    def ledger(self) -> str:
        if not ledger_place.exists(self._home):
            return "no entries yet"
        with ledger_place.reading(self._home) as ledger:
            changed, newest = ledger.verify(), ledger.newest()
        if changed is not None:
            raise HomeError(
                f"entry {changed} was changed, or one before it is missing",
                "do not trust the entries after it: commonweight admin audit verify",
            )
        self._newest_at = newest.at if newest else 0.0
        return f"{newest.seq if newest else 0} entries, every hash fits"

    def versions(self) -> str:
        folder = self._home / "versions"
        if not folder.exists():
            return "none yet"
        files = list(folder.glob("*.safetensors"))
        for file in files:
            with file.open("rb") as opened:
                opened.read(8)
        nbytes = sum(file.stat().st_size for file in files)
        return f"{len(files)} versions, {nbytes / 1e6:.1f} MB"

    def clock(self) -> str:
        now = time.time()
        ahead = max(self._newest_at, (self._home / "ca.pem").stat().st_mtime) - now
        if ahead > 1.0:
            raise CommonweightError(
                f"the newest entry is {ahead:.0f} s in the future",
                "set the clock from the network (NTP): signatures are valid for minutes only",
            )
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))

    def certificate(self) -> str | Advice:
        host = str(self._told_at_start.get("host", self._settings.host))
        names = self._settings.names or settings.reachable_names(host)
        try:
            pem = (self._home / "server.pem").read_bytes()
            missing = set(names) - certificates.certificate_names(pem)
            days = int(certificates.days_left(pem))
        except (OSError, ValueError) as err:
            raise HomeError(f"server.pem cannot be read: {err}", _RESTART_HINT) from err
        said = f"valid for {', '.join(names)}, {days} days left"
        if missing or days < 0:
            said = f"it lacks {', '.join(sorted(missing))}" if missing else "it has expired"
            if self._up is not None:  # otherwise the next start creates a new one
                raise CommonweightError(said, _RESTART_HINT)
            return Advice(said, _RESTART_HINT)
        return Advice(said, _RESTART_HINT) if days < _RENEWED_DAYS else said

    # --- at work ---

    def running(self) -> str | Skipped:
        from coordinator.remote.api_client import Remote

        if not (self._home / UP_FILE).exists() and not ledger_place.exists(self._home):
            return Skipped("not started yet", "commonweight up")
        with contextlib.closing(Remote(self._home)) as remote:
            self._up = Status(remote.address, remote.fleet(), remote.watch().mqtt)
        return f"answers at {remote.address}"

    def ports(self) -> str:
        if self._up is not None:
            ours = [self._up.address]
            if not self._is_external:
                ours.append(self._up.mqtt.netloc)
            return f"{' and '.join(ours)} are in use by this coordinator"
        chosen, ports = self._settings, {self._settings.port}
        if not self._is_external:
            ports.add(chosen.mqtt_port or (chosen.port and chosen.port + 1))
        ports.discard(0)  # any free port
        for port in sorted(ports):
            check_free(chosen.host, port)
        return f"{' and '.join(map(str, sorted(ports)))} are free" if ports else "any free port"

    def broker(self) -> str:
        assert self._up is not None
        mqtt, links = self._up.mqtt, self._up.fleet.links
        fix = "training continues without it, and the coordinator restarts it: commonweight monitor"
        if self._is_external:
            fix = "training continues without it; check that broker"
        if folder := self._told_at_start.get("mosquitto"):
            start = f"{find_program()} -c {folder}/{CONFIG}"
            fix = f"training continues without it; start it again: {start}"
        try:
            check_tls_handshake(mqtt)
        except OSError as err:
            raise Unreachable(describe_failure(err, mqtt), fix) from err
        if not links.mqtt:
            raise Unreachable(f"{mqtt.netloc} answers, but the coordinator is not logged in", fix)
        return f"{mqtt.netloc} answers{' over TLS' if mqtt.tls else ' (without TLS)'}"

    def peers(self) -> str | Advice:
        assert self._up is not None
        fleet = self._up.fleet
        awaiting = [peer.name for peer in fleet.peers.values() if peer.standing == "awaiting"]
        said = f"{num_enrolled(fleet)} enrolled, {num_available(fleet, fleet.at)} can work now"
        if awaiting:
            said += f", {len(awaiting)} wait for approval"
            return Advice(said, f"commonweight peers approve {awaiting[0]}")
        if not fleet.peers:
            return Advice(said, "commonweight ticket create")
        return said


def engine() -> str:
    """Flower's minor versions are fixed, because private names of it are used."""
    found = version("flwr")
    if ".".join(found.split(".")[:2]) not in ENGINES:
        raise CommonweightError(
            f"flwr {found}; this version of commonweight needs {' or '.join(ENGINES)}",
            f"pip install 'flwr=={ENGINES[-1]}.*'",
        )
    return f"commonweight {VERSION}, flwr {found}, SQLite {sqlite3.sqlite_version}"


def check_free(host: str, port: int) -> None:
    """Raise PortInUse or UsageError if a server cannot listen there."""
    try:
        listenable(host, port)
    except OSError as err:
        raise listen_error(err, host, port) from err


def check_tls_handshake(mqtt: MqttAddress) -> None:
    """Connect, and check the certificate if the address uses TLS. Raises OSError."""
    context = tls_context(mqtt)
    with socket.create_connection((mqtt.host, mqtt.port), _TIMEOUT_S) as plain:
        if isinstance(context, ssl.SSLContext):
            context.wrap_socket(plain, server_hostname=mqtt.host).close()
