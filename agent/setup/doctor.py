"""The checks of `commonweight-agent doctor`, from the agent's folder to the coordinator.

They do not disturb a running agent: they open no session and publish nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from agent.data.settings import is_spooled
from agent.home import enrollment_file, fleet_trust, sensible_values, settings
from agent.home.enrollment_file import Enrollment
from agent.policy import sandbox, sensors
from agent.policy.sensors import Sensors
from agent.setup import autostart, consents, environment, own_data, sharing_text
from protocols import VERSION
from protocols.enrollment import identity
from protocols.errors import CommonweightError, NotEnrolled, Refused, Unreachable
from protocols.local import homes, join_client
from protocols.local.checks import Advice, Check, CheckStep, run_checks
from protocols.local.home_checks import check_crashes, check_private, check_room
from protocols.local.os_errors import os_errors_as
from protocols.network import addresses, version_check
from protocols.network.error_text import describe_error

if TYPE_CHECKING:
    from agent.transport.coordinator_client import CoordinatorClient
    from protocols.enrollment.joining import EnrollmentStatus

_TIMEOUT_S = 5.0
_MAX_CA_BYTES = 64 * 1024
#: Free space to warn below, and to fail below: a version of a large model, its update, the outbox.
_ROOM_BYTES = 5_000_000_000, 500_000_000
#: Flower refuses signatures whose time differs by more.
MAX_AHEAD_S, MAX_BEHIND_S = 5.0, 300.0
_SKEW_WARNING_S = 3.0
_CERTIFICATE_WARNING_DAYS = 30


def examine_agent(home: Path) -> Iterator[Check]:
    """Run the checks of the agent in `home`, and yield each result at once."""
    with contextlib.closing(_Doctor(home)) as doctor:
        yield from run_checks(
            [
                CheckStep("home", lambda: str(homes.open_home("agent"))),
                CheckStep("permissions", partial(check_private, home), ("home",)),
                CheckStep("settings", doctor.settings, ("home",)),
                CheckStep("tasks", doctor.tasks, ("settings",)),
                CheckStep("sharing", doctor.sharing, ("settings",)),
                CheckStep("data", doctor.data, ("settings",)),
                CheckStep("disk", partial(check_room, home, *_ROOM_BYTES), ("home",)),
                CheckStep("crashes", partial(check_crashes, home), ("home",)),
                CheckStep("packages", environment.check_packages),
                CheckStep("device", doctor.device),
                CheckStep("sandbox", doctor.sandbox, ("settings",)),
                CheckStep("sensors", doctor.sensors, ("settings",)),
                CheckStep("service", autostart.check),
                CheckStep("enrolled", doctor.enrolled, ("home",)),
                CheckStep("dns", doctor.dns, ("enrolled",)),
                CheckStep("tcp", doctor.tcp, ("dns",)),
                CheckStep("tls", doctor.tls, ("tcp",)),
                CheckStep("clock", doctor.clock, ("tls",)),
                CheckStep("coordinator", doctor.coordinator, ("tls",)),
                CheckStep("flower", doctor.flower, ("coordinator",)),
                CheckStep("mqtt", doctor.mqtt, ("enrolled", "coordinator")),
                CheckStep("version", doctor.version, ("coordinator",)),
            ]
        )


class _Doctor:
    """The checks, and what they share: a check runs only after those that it needs."""

    _enrollment: Enrollment
    _status: EnrollmentStatus | None = None
    _link: CoordinatorClient | None = None

    def __init__(self, home: Path) -> None:
        self._home = home

    def close(self) -> None:
        if self._link is not None:
            self._link.close()

    # --- this machine ---

    def settings(self) -> str | Advice:
        chosen = settings.read(self._home)
        if objections := sensible_values.objections(chosen, chosen.__struct_fields__):
            return Advice("; ".join(objections), "commonweight-agent policy set")
        if why := chosen.no_runs_because():
            return Advice(why, "commonweight-agent trust add ID")
        lr = f"at most {chosen.max_lr:g}" if chosen.max_lr else "without limit"
        return (
            f"runs have {chosen.min_batch} rows a step (min_batch), {chosen.min_examples} rows an "
            f"update (min_examples), {chosen.min_cohort} peers a round (min_cohort) or more, and a "
            f"learning rate {lr} (max_lr)"
        )

    def device(self) -> str:
        return environment.check_device(settings.read(self._home).device)

    def tasks(self) -> str | Advice:
        chosen = settings.read(self._home)
        allowed = [
            consents.describe(chosen, task, "every task" if task == consents.EVERY else task)
            for task in chosen.tasks
            if task == consents.EVERY or chosen.grants(task)
        ]
        detail = f"allowed: {'; '.join(allowed)}" if allowed else "no task is allowed yet"
        if chosen.forbidden_tasks:
            detail += f"; forbidden: {', '.join(chosen.forbidden_tasks)}"
        changed = [task for task in chosen.tasks if chosen.standing_of(task) == "changed"]
        if changed:
            advice = f"commonweight-agent task allow {changed[0]}"
            return Advice(f"{detail}; the file of {changed[0]} has changed since", advice)
        if waiting := consents.requests(self._home, chosen):
            return Advice(f"{detail}; {waiting[0].about}", waiting[0].command)
        if awaiting := consents.awaiting_columns(chosen):
            return Advice(detail, consents.columns_command(awaiting[0]))
        return detail

    def sharing(self) -> str:
        chosen = settings.read(self._home)
        return sharing_text.describe(chosen, self._home) or "off: no port is opened"

    def data(self) -> str:
        found = own_data.check(settings.read(self._home))
        return "; ".join(line for line in (found, own_data.waiting_rows(self._home)) if line)

    def sensors(self) -> str | Advice:
        chosen = settings.read(self._home)
        readings = Sensors(self._home).read()
        power = {None: "power unknown", True: "on battery", False: "on mains"}[readings.on_battery]
        charge = f", battery {readings.battery_percent:.0f} %" if readings.battery_percent else ""
        detail, unknown = power + charge, sensors.missing_sensors(readings)
        if not unknown:
            return detail
        detail += f"; no sensor here for {', '.join(unknown)}"
        if strict := [rule for rule in unknown if getattr(chosen, rule) == "never"]:
            return Advice(
                f"{detail}, and {strict[0]} is set to never, which pauses if unknown",
                f"commonweight-agent policy set {strict[0]} auto",
            )
        return f"{detail}, which pauses nothing"

    def sandbox(self) -> str | Advice:
        chosen = settings.read(self._home)
        if chosen.fleet:
            return "not needed: another fleet trains, and no task runs here"
        detail, fix = sandbox.describe(chosen.sandbox, sandbox.support())
        if fix and chosen.sandbox == "require":
            raise CommonweightError(detail, fix)
        if not fix and is_spooled(chosen.data, chosen.data_reader):
            detail += "; another process reads the table"
        own = self._home.resolve()
        for path in filter(None, (chosen.data, chosen.models, *chosen.sandbox_read)):
            if own.is_relative_to(Path(path).resolve()) and chosen.sandbox != "off":
                detail += f"; but tasks may read {path}, which contains the agent's keys in {own}"
                fix = "keep data and models in a folder of their own"
        return Advice(detail, fix) if fix else detail

    # --- the coordinator, from the network inwards ---

    def enrolled(self) -> str:
        enrollment = enrollment_file.read_enrollment(self._home)
        own = identity.public_bytes(identity.load_signing_key(self._home / "sign.key"))
        identity.load_node_key(self._home / "node.key")
        certificate = fleet_trust.trusted_cas(enrollment).verify_certificate(
            enrollment.certificate, time.time()
        )
        if certificate.sign_public != own:
            raise NotEnrolled("the certificate is for another key", "join again: --replace")
        self._enrollment = enrollment
        return f"{enrollment.name}, id {enrollment.peer}, fleet {enrollment.fleet}"

    @property
    def _address(self) -> tuple[str, int]:
        address = addresses.parse(self._enrollment.addresses[0])
        return address.host, address.port

    def dns(self) -> str:
        host, port = self._address
        with os_errors_as(
            Unreachable,
            f"no address for {host}",
            "is this machine online? Else join again with a ticket that names an address",
        ):
            infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return f"{host} is {', '.join(sorted({str(info[4][0]) for info in infos}))}"

    def tcp(self) -> str:
        where = self._enrollment.addresses[0]
        failed = os_errors_as(
            Unreachable,
            f"{where} takes no connection",
            "is the coordinator up (commonweight up), and does no firewall block it?",
        )
        with failed, socket.create_connection(self._address, _TIMEOUT_S):
            return f"{where} takes connections"

    def tls(self) -> str | Advice:
        ca_pem = self._enrollment.ca_pem
        context = ssl.create_default_context(cadata=ca_pem)
        try:
            with (
                socket.create_connection(self._address, _TIMEOUT_S) as plain,
                context.wrap_socket(plain, server_hostname=self._address[0]) as secure,
            ):
                certificate = secure.getpeercert() or {}
        except ssl.SSLCertVerificationError as err:
            raise Refused(
                f"the server's certificate is not valid: {err.verify_message}", self._tls_fix(err)
            ) from err
        except OSError as err:
            raise Unreachable(f"no TLS: {err}", "does another program listen there?") from err
        days = int((ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) // 86400)
        detail = f"the certificate is from this fleet's CA, {days} days left"
        if days < _CERTIFICATE_WARNING_DAYS:
            return Advice(detail, "restart the coordinator: it renews its certificate")
        return detail

    def _tls_fix(self, err: ssl.SSLCertVerificationError) -> str:
        if "mismatch" in err.verify_message:
            return "on the coordinator, add this address to `names` in settings.toml and restart it"
        if "expired" in err.verify_message or "not yet valid" in err.verify_message:
            return "correct the clock; if it is right, restart the coordinator: it renews"
        known = self._enrollment
        follow = partial(fleet_trust.with_new_ca, known)
        with contextlib.suppress(Refused):
            if join_client.find_new_ca(known.addresses, known, follow) != known:
                return (
                    "the fleet has a new CA, signed by the one known here: the agent takes it at "
                    "its next session: commonweight-agent up"
                )
        return "another coordinator answers there: join it with its own ticket and --replace"

    def clock(self) -> str | Advice:
        import httpx

        from protocols.enrollment.joining import CA_PATH
        from protocols.local import bounded_http

        context = ssl.create_default_context(cadata=self._enrollment.ca_pem)
        url = f"https://{self._enrollment.addresses[0]}{CA_PATH}"
        try:
            with httpx.Client(verify=context, timeout=_TIMEOUT_S) as http:
                # The first request opens the connection, so that the next answer is quick.
                bounded_http.request(http, "GET", url, max_bytes=_MAX_CA_BYTES)
                before = time.time()
                answer = bounded_http.request(http, "GET", url, max_bytes=_MAX_CA_BYTES)
                answer.raise_for_status()
                now = (before + time.time()) / 2
        except httpx.HTTPError as err:
            raise Unreachable(
                f"no answer over HTTPS: {describe_error(err)}",
                "run on the coordinator: commonweight doctor",
            ) from err
        if "date" not in answer.headers:
            return "the coordinator's answer has no date"
        theirs = parsedate_to_datetime(answer.headers["date"]).timestamp()
        return check_skew(now - theirs)

    def _open_link(self) -> CoordinatorClient:
        if self._link is None:
            from agent.home.credentials import Credentials
            from agent.transport.coordinator_client import CoordinatorClient

            self._link = CoordinatorClient(Credentials.load(self._home, self._enrollment))
        return self._link

    def coordinator(self) -> str:
        try:
            self._status = self._open_link().enrollment_status()
        except Refused as err:
            raise Refused(
                f"it refuses this machine's signature ({err.message})",
                "correct the clock if it is wrong; if the peer was removed: join --replace",
            ) from err
        if self._status.enrollment == "awaiting":
            raise Refused(
                "this machine awaits approval",
                f"run on the coordinator: commonweight peers approve {self._status.name}",
            )
        return f"knows this machine as {self._status.name}"

    def flower(self) -> str:
        try:
            self._open_link().check()
        except Refused as err:
            raise Refused(
                f"Flower refuses the node key ({err.message})",
                "correct the clock if it is wrong; else join --replace",
            ) from err
        return "it accepts the node key"

    def mqtt(self) -> str:
        from agent.transport.mqtt_client import try_login

        address = self._enrollment.mqtt
        if self._status is not None and self._status.enrollment == "enrolled":
            address = self._open_link().mqtt_address()  # the password may have changed
        # Windows: paho needs a selector loop.
        with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
            why = runner.run(try_login(address))
        if why:
            raise Unreachable(why, "training works without it; is the broker's port reachable?")
        return f"logged in at {address.netloc}"

    def version(self) -> str | Advice:
        assert self._status is not None
        theirs = self._status.version
        if theirs == VERSION:
            return f"{VERSION}, as the coordinator"
        detail = f"{VERSION} here, {theirs} on the coordinator"
        fix = f"pip install 'commonweight=={theirs}'"
        if not version_check.are_compatible(theirs, VERSION):
            raise CommonweightError(detail, fix)
        return Advice(detail, fix)


def check_skew(ahead_s: float) -> str | Advice:
    """Compare this clock with the coordinator's date header, which cuts off up to 2 s.

    Raises CommonweightError if signatures would be refused.
    """
    ahead_s -= 1.0  # the mean of what is cut off
    detail = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'} the coordinator"
    fix = "set the clocks of both machines by the network (NTP)"
    if ahead_s > MAX_AHEAD_S or ahead_s < -MAX_BEHIND_S:
        raise CommonweightError(f"{detail}: signatures are refused", fix)
    if abs(ahead_s) > _SKEW_WARNING_S:
        return Advice(detail, fix)
    return "as the coordinator's, within 3 s"
