"""What both ends of MQTT share: the broker's address, a session's numbers, replays told. Pure."""

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
_EXAMPLE = "write it as mqtt://[user:password@]host:port, or mqtts:// for TLS"

#: A command that is older (or newer) than this is not obeyed.
COMMAND_WINDOW_S = 120.0
#: A lost host is noticed after one and a half of these, so its will fires within 8 s.
KEEPALIVE_S = 5
#: A refused login shows as silence with some brokers, so nobody should wait for it for long.
TIMEOUT_S = 5.0


class MqttAddress(Struct, frozen=True, kw_only=True):
    """A broker and the login for it. `ca_pem` is the only CA to trust, or empty for the system's.

    Neither `repr` nor `str` shows the password.
    """

    host: Annotated[str, Meta(min_length=1, max_length=253)]
    port: Annotated[int, Meta(ge=1, le=65535)]
    tls: bool = True
    user: str = ""
    password: str = ""
    ca_pem: str = ""

    @property
    def netloc(self) -> str:
        """`host:port`, as a person reads it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        login = f"{self.user}@" if self.user else ""
        return f"{'mqtts' if self.tls else 'mqtt'}://{login}{self.netloc}"

    def __repr__(self) -> str:
        return f"MqttAddress({self})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        # msgspec's own would print every field in a rich traceback.
        return [("url", str(self))]


def parse_url(url: str, ca_pem: str = "") -> MqttAddress:
    """The address in `mqtt://[user:password@]host[:port]` or `mqtts://…`. Raises UsageError.

    The error never repeats the URL: there may be a password in it.
    """
    try:
        parts = urlsplit(url.strip())
        port, host = parts.port, parts.hostname
    except ValueError:  # its text quotes the URL
        raise UsageError("the MQTT URL's host or port cannot be read", _EXAMPLE) from None
    if parts.scheme not in _PORTS:
        raise UsageError("the MQTT URL begins with neither mqtt:// nor mqtts://", _EXAMPLE)
    if not host or len(host) > 253 or any(not 0 < len(part) < 64 for part in host.split(".")):
        raise UsageError("the MQTT URL names no host", _EXAMPLE)
    if port == 0:
        raise UsageError("no broker can be asked at port 0", _EXAMPLE)
    if parts.path not in ("", "/") or parts.query or parts.fragment:
        raise UsageError("the MQTT URL goes on after its port", _EXAMPLE)
    if ca_pem and parts.scheme == "mqtt":
        raise UsageError("a CA is of no use without TLS", "write mqtts:// instead of mqtt://")
    return MqttAddress(
        host=host,
        port=port or _PORTS[parts.scheme],
        tls=parts.scheme == "mqtts",
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        ca_pem=ca_pem,
    )


def tls_context(address: MqttAddress) -> ssl.SSLContext | None:
    """What checks the broker's certificate and name; None without TLS. Raises UsageError."""
    if not address.tls:
        return None
    try:
        return ssl.create_default_context(cadata=address.ca_pem or None)
    except ssl.SSLError as err:
        raise UsageError("the CA for the MQTT broker is not a certificate in PEM form") from err


def describe_failure(cause: BaseException | None, address: MqttAddress) -> str:
    """Words for a failed connection, from the error below the MQTT library's."""
    match cause:
        case ConnectionRefusedError():
            return f"nobody listens at {address.netloc}"
        case ssl.SSLCertVerificationError():
            return f"the certificate of {address.netloc} is not good: {cause.verify_message}"
        case OSError() if cause.strerror and not isinstance(cause, TimeoutError):
            return f"cannot reach {address.netloc}: {cause.strerror}"
        case _:
            return f"the MQTT login was refused or nobody answers at {address.netloc}"


class SequencedSigner:
    """One session of a sender (its `epoch`): numbers and signs what it says, from 0 without gaps.

    Receivers take a missing number for a lost message, so one voice serves one audience.
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
    """Tells new messages of one sender from replayed ones: the highest number of each session.

    Sessions have random names; the `limit` latest are remembered. An older one would be let in
    again, hence the time check on whatever must not be obeyed twice.
    """

    def __init__(self, limit: int = 64) -> None:
        self._highest: dict[tuple[str, str], int] = {}
        self._limit = limit

    def is_new(self, epoch: str, kind: str, seq: int) -> bool:
        """True once for each number, if they come in order.

        `kind` keeps apart what may overtake each other on the way (QoS 0 and 1).
        """
        key = (epoch, kind)
        highest = self._highest.pop(key, -1)
        self._highest[key] = max(highest, seq)
        if len(self._highest) > self._limit:
            del self._highest[next(iter(self._highest))]
        return seq > highest
