"""The packets of MQTT 3.1.1 that a client may send, read from bytes within bounds. Pure.

Source: MQTT Version 3.1.1, OASIS Standard, 29 October 2014. Each function raises `BadPacket` for
anything that the standard forbids, and for what no client of a fleet needs: QoS 2, sessions that
outlast a connection, and packets of more than `MAX_PACKET_BYTES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from protocols.messages.envelope import MAX_PAYLOAD_BYTES

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 1, 2, 3, 4, 8, 9
UNSUBSCRIBE, PINGREQ, DISCONNECT = 10, 12, 14
#: A payload, its topic, and in CONNECT a client id and a login.
MAX_PACKET_BYTES = MAX_PAYLOAD_BYTES + 4096
MAX_FILTERS = 16
#: The first byte of a packet, without the flags of PUBLISH.
_FIRST_BYTES = {0x10, 0x40, 0x82, 0xA2, 0xC0, 0xE0}
#: DISCONNECT: the broker does not send the client's will.
DISCONNECT_BYTES = b"\xe0\x00"


class BadPacket(Exception):
    """The bytes are no packet that a client may send."""


class Packet(NamedTuple):
    """`data` is the whole packet, `body` its bytes after the header."""

    kind: int
    flags: int
    body: memoryview
    data: memoryview


class Will(NamedTuple):
    topic: str
    payload: bytes
    qos: int
    retain: bool


class Connect(NamedTuple):
    client_id: str
    keepalive_s: int
    user: str
    password: bytes
    will: Will | None


class Publish(NamedTuple):
    """Whether the broker keeps a message, and the size of its payload."""

    topic: str
    retain: bool
    nbytes: int


class Subscribe(NamedTuple):
    packet_id: int
    filters: tuple[str, ...]


class PacketReader:
    """Splits a stream of bytes into packets. It keeps at most one unfinished packet."""

    def __init__(self) -> None:
        self._rest = bytearray()

    def feed(self, data: bytes) -> Iterator[Packet]:
        """The packets that are complete with `data`; take them all before the next call."""
        self._rest += data
        stream = bytes(self._rest)
        at = 0
        while (size := _packet_size(stream, at)) and at + size[0] + size[1] <= len(stream):
            head, length = size
            view = memoryview(stream)[at : at + head + length]
            at += head + length
            del self._rest[: head + length]
            yield Packet(view[0] >> 4, view[0] & 15, view[head:], view)


def _packet_size(stream: bytes, at: int) -> tuple[int, int] | None:
    """Bytes of the header and of the body of the packet at `at`; None if it is not there yet."""
    if at >= len(stream):
        return None
    first, length = stream[at], 0
    if first not in _FIRST_BYTES and (first >> 4 != PUBLISH or first & 6 > 2):
        raise BadPacket("not a packet of an MQTT 3.1.1 client, or QoS 2")
    for number in range(4):
        if at + 1 + number >= len(stream):
            return None
        byte = stream[at + 1 + number]
        length |= (byte & 127) << 7 * number
        if length > MAX_PACKET_BYTES:
            raise BadPacket(f"a packet of more than {MAX_PACKET_BYTES} bytes")
        if byte < 128:
            return 2 + number, length
    raise BadPacket("a length of more than four bytes")


class _Fields:
    """Reads the fields of a body in order."""

    def __init__(self, body: memoryview) -> None:
        self._body, self._at = body, 0

    def take(self, size: int) -> bytes:
        taken = bytes(self._body[self._at : self._at + size])
        if len(taken) != size:
            raise BadPacket("a field ends after its packet")
        self._at += size
        return taken

    def number(self, size: int = 2) -> int:
        return int.from_bytes(self.take(size))

    def binary(self) -> bytes:
        return self.take(self.number())

    def text(self) -> str:
        try:
            found = self.binary().decode()
        except UnicodeDecodeError as err:
            raise BadPacket("a text is not UTF-8") from err
        if "\0" in found:
            raise BadPacket("a text with a NUL")
        return found

    @property
    def left(self) -> int:
        return len(self._body) - self._at


def parse_connect(packet: Packet) -> Connect:
    """Section 3.1. Raises `BadPacket` also for a CONNECT without a login."""
    fields = _Fields(packet.body)
    if (packet.kind, fields.text(), fields.number(1)) != (CONNECT, "MQTT", 4):
        raise BadPacket("not a CONNECT of MQTT 3.1.1")
    flags, keepalive_s = fields.number(1), fields.number()
    has_will, qos, retain = flags & 4, flags >> 3 & 3, bool(flags & 32)
    if flags & 1 or qos > 1 or (not has_will and (qos or retain)):
        raise BadPacket("CONNECT with invalid flags")
    client_id, will = fields.text(), None
    if has_will:
        will = Will(_topic(fields), fields.binary(), qos, retain)
    if flags & 0xC0 != 0xC0:
        raise BadPacket("CONNECT without user and password")
    user, password = fields.text(), fields.binary()
    if fields.left:
        raise BadPacket("CONNECT with bytes after its end")
    return Connect(client_id, keepalive_s, user, password, will)


def parse_publish(packet: Packet) -> Publish:
    """Section 3.3."""
    fields = _Fields(packet.body)
    topic, qos = _topic(fields), packet.flags >> 1 & 3
    if packet.flags & 8 and not qos:
        raise BadPacket("a repeated message of QoS 0")
    if qos and not fields.number():
        raise BadPacket("a message with the number 0")
    return Publish(topic, bool(packet.flags & 1), fields.left)


def parse_subscribe(packet: Packet) -> Subscribe:
    """Sections 3.8 and 3.10: SUBSCRIBE, or UNSUBSCRIBE, which has no QoS."""
    fields = _Fields(packet.body)
    packet_id = fields.number()
    filters: list[str] = []
    while fields.left and len(filters) <= MAX_FILTERS:
        filters.append(fields.text())
        if packet.kind == SUBSCRIBE and fields.number(1) > 2:
            raise BadPacket("a subscription with an invalid QoS")
    if not packet_id or not 0 < len(filters) <= MAX_FILTERS or not all(filters):
        raise BadPacket("a subscription without a number or filters, or with too many")
    return Subscribe(packet_id, tuple(filters))


def check_rest(packet: Packet) -> None:
    """Sections 3.4, 3.12 and 3.14: a packet of another kind. Its length follows from its kind."""
    if len(packet.body) != (2 if packet.kind == PUBACK else 0):
        raise BadPacket("a packet of a wrong length")


def _topic(fields: _Fields) -> str:
    topic = fields.text()
    if not topic or "+" in topic or "#" in topic:
        raise BadPacket("a topic that is empty or has wildcards")
    return topic


def encode_connect(connect: Connect) -> bytes:
    """CONNECT with a clean session."""
    will = connect.will
    flags = 0xC2 | (4 | will.qos << 3 | will.retain << 5 if will else 0)
    body = _binary(b"MQTT") + bytes([4, flags]) + connect.keepalive_s.to_bytes(2)
    body += _binary(connect.client_id.encode())
    if will:
        body += _binary(will.topic.encode()) + _binary(will.payload)
    body += _binary(connect.user.encode()) + _binary(connect.password)
    return bytes([0x10]) + _length(len(body)) + body


def encode_refusal(code: int) -> bytes:
    """CONNACK with a return code: 1 for another version, 5 for a login that is refused."""
    return bytes([0x20, 2, 0, code])


def encode_subscribe_refusal(subscribe: Subscribe) -> bytes:
    """SUBACK that refuses each filter."""
    body = subscribe.packet_id.to_bytes(2) + b"\x80" * len(subscribe.filters)
    return bytes([0x90]) + _length(len(body)) + body


def _binary(data: bytes) -> bytes:
    return len(data).to_bytes(2) + data


def _length(length: int) -> bytes:
    encoded = bytearray()
    while True:
        length, low = divmod(length, 128)
        encoded.append(low | (128 if length else 0))
        if not length:
            return bytes(encoded)
