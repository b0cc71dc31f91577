"""MQTT code of agents and coordinator: broker address, sequence numbers, replays. Pure."""

from __future__ import annotations

import secrets
import ssl
import time
from typing import Annotated, Any
from urllib.parse import unquote, urlsplit

from msgspec import Meta, Struct

from protocols.errors import UsageError
from protocols.messages.envelope import Body, Envelope, Sign, seal

_PORTS = {"mqtt": 1883, "mqtts": 8883}
NO_TLS_HINT = "others on the network path can read presence, telemetry and the login: use mqtts://"
_EXAMPLE = "write it as mqtt://[user:password@]host:port, or mqtts:// for TLS"

#: A command with a time further than this from the agent's clock is ignored.
COMMAND_WINDOW_S = 120.0
#: The broker notices a lost host after 1.5 intervals, so it sends the will within 8 s.
KEEPALIVE_S = 5
#: Some brokers do not answer a refused login, so the wait for an answer is short.
TIMEOUT_S = 5.0


class MqttAddress(Struct, frozen=True, kw_only=True):
    """A broker and its login. `ca_pem` is the only CA to trust, or empty for the system's CAs.

    Neither `repr` nor `str` shows the password.
    """

    host: Annotated[str, Meta(min_length=1, max_length=253)]
    port: Annotated[int, Meta(ge=1, le=65535)]
    tls: bool = True
    user: Annotated[str, Meta(max_length=1024)] = ""
    password: Annotated[str, Meta(max_length=1024)] = ""
    ca_pem: Annotated[str, Meta(max_length=64 * 1024)] = ""

    @property
    def netloc(self) -> str:
        """`host:port`, with brackets around an IPv6 host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    @property
    def is_readable_on_the_way(self) -> bool:
        """True without TLS, unless the broker is on this machine."""
        return not self.tls and self.host not in ("localhost", "127.0.0.1", "::1")

    def __str__(self) -> str:
        login = f"{self.user}@" if self.user else ""
        return f"{'mqtts' if self.tls else 'mqtt'}://{login}{self.netloc}"

    def __repr__(self) -> str:
        return f"MqttAddress({self})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        # msgspec's own would print every field, the password too, in a rich traceback.
        return [("url", str(self))]


def parse_url(url: str, ca_pem: str = "") -> MqttAddress:
    """The address in `mqtt://[user:password@]host[:port]` or `mqtts://…`. Raises UsageError.

    The error never repeats the URL, because it may contain a password.
    """
    try:
        parts = urlsplit(url.strip())
        port, host = parts.port, parts.hostname
    except ValueError:  # its text quotes the URL
        raise UsageError("the MQTT URL has an invalid host or port", _EXAMPLE) from None
    if parts.scheme not in _PORTS:
        raise UsageError("the MQTT URL must start with mqtt:// or mqtts://", _EXAMPLE)
    if not host or len(host) > 253 or any(not 0 < len(part) < 64 for part in host.split(".")):
        raise UsageError("the MQTT URL has no valid host", _EXAMPLE)
    if port == 0:
        raise UsageError("the MQTT URL has port 0, which is not a valid port", _EXAMPLE)
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise UsageError("the MQTT URL must end after the port", _EXAMPLE)
    if ca_pem and parts.scheme == "mqtt":
        raise UsageError("a CA has no effect without TLS", "write mqtts:// instead of mqtt://")
    return MqttAddress(
        host=host,
        port=port or _PORTS[parts.scheme],
        tls=parts.scheme == "mqtts",
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        ca_pem=ca_pem,
    )


def tls_context(address: MqttAddress) -> ssl.SSLContext | None:
    """The TLS context that checks the broker's certificate; None without TLS. Raises UsageError."""
    if not address.tls:
        return None
    try:
        return ssl.create_default_context(cadata=address.ca_pem or None)
    except ssl.SSLError as err:
        raise UsageError("the CA of the MQTT broker is not a PEM certificate") from err


def describe_failure(cause: BaseException | None, address: MqttAddress) -> str:
    """Text for a failed connection, from the `cause` of the MQTT library's error."""
    match cause:
        case ConnectionRefusedError():
            return f"no broker listens at {address.netloc}"
        case ssl.SSLCertVerificationError():
            return f"the certificate of {address.netloc} is not valid: {cause.verify_message}"
        case OSError() if cause.strerror and not isinstance(cause, TimeoutError):
            return f"cannot reach {address.netloc}: {cause.strerror}"
        case _:
            return f"{address.netloc} refused the MQTT login or does not answer"


class SequencedSigner:
    """Numbers and signs the messages of one session (`epoch`), from 0 without gaps.

    Receivers count a missing number as a lost message, so use one signer per audience.
    """

    def __init__(self, sender: str, sign: Sign) -> None:
        self.epoch = secrets.token_hex(8)
        self._sender, self._sign, self._seq = sender, sign, -1

    def next_envelope(self, body: Body) -> Envelope:
        """The next message, numbered and not yet signed."""
        self._seq += 1
        return Envelope(
            sender=self._sender, epoch=self.epoch, seq=self._seq, at=time.time(), body=body
        )

    def seal(self, topic: str, body: Body) -> bytes:
        """The next message's payload on `topic`."""
        return seal(topic, self.next_envelope(body), self._sign)


class ReplayFilter:
    """Detects replayed messages of one sender by the highest number of each session.

    Remembers the `limit` latest sessions. A replay of an older one passes, so commands must also
    check the time.
    """

    def __init__(self, limit: int = 64) -> None:
        self._highest: dict[tuple[str, str], int] = {}
        self._limit = limit

    def is_new(self, epoch: str, kind: str, seq: int) -> bool:
        """True the first time for each number, if numbers arrive in order.

        Messages of different `kind` may overtake each other (QoS 0 and 1), so they count apart.
        """
        key = (epoch, kind)
        highest = self._highest.pop(key, -1)
        self._highest[key] = max(highest, seq)
        if len(self._highest) > self._limit:
            del self._highest[next(iter(self._highest))]
        return seq > highest
