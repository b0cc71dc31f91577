"""The gate's parser: paho's own packets, in pieces of any size, and bytes that are no packets."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import paho.mqtt.client as paho
import pytest
from hypothesis import given
from hypothesis import strategies as st
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from coordinator.transport import mqtt_packets as mqtt
from coordinator.transport.mqtt_packets import (
    MAX_PACKET_BYTES,
    BadPacket,
    Connect,
    Packet,
    PacketReader,
    Will,
)

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
TOPIC = st.text(
    st.characters(exclude_characters="\0+#", exclude_categories=["Cs"]), min_size=1, max_size=40
)
PAYLOAD = st.binary(max_size=600)


def packets(data: bytes, sizes: list[int] | None = None) -> list[Packet]:
    """The packets in `data`, fed in pieces of these sizes."""
    reader, found = PacketReader(), []
    for size in [*(sizes or []), len(data)]:
        found += list(reader.feed(data[:size]))
        data = data[size:]
    return found


class Socket:
    """Where paho writes."""

    def __init__(self) -> None:
        self.sent = b""

    def send(self, data: bytes) -> int:
        self.sent += data
        return len(data)

    def close(self) -> None:
        """Nothing to close."""


def by_paho(do: Callable[[Any], object], **options: Any) -> bytes:
    """The bytes that paho sends."""
    options = {"client_id": "id", "protocol": MQTTProtocolVersion.MQTTv311} | options
    client: Any = paho.Client(CallbackAPIVersion.VERSION2, **options)
    client._sock = Socket()
    client._state = paho._ConnectionState.MQTT_CS_CONNECTED
    client._thread = object()  # so that it queues, and writes when asked
    do(client)
    client._packet_write()
    sent: bytes = client._sock.sent
    client._sock = None
    return sent


@given(TEXT, TEXT, TEXT, st.integers(0, 65535), st.none() | st.tuples(TOPIC, PAYLOAD))
def test_pahos_connect_is_read_and_written_again(
    client_id: str, user: str, password: str, keepalive: int, will: tuple[str, bytes] | None
) -> None:
    def connect(client: Any) -> None:
        client.username_pw_set(user, password)
        if will:
            client.will_set(will[0], will[1], qos=1, retain=True)
        client._client_id = client_id.encode()
        client._send_connect(keepalive)

    [packet] = packets(by_paho(connect))
    expected = Connect(
        client_id, keepalive, user, password.encode(), Will(*will, 1, True) if will else None
    )
    assert mqtt.parse_connect(packet) == expected
    [again] = packets(mqtt.encode_connect(expected))
    assert mqtt.parse_connect(again) == expected
    assert bytes(again.data) == bytes(packet.data)


@given(TOPIC, PAYLOAD, st.integers(0, 1), st.booleans(), st.lists(st.integers(1, 9), max_size=50))
def test_pahos_messages_are_read_in_pieces(
    topic: str, payload: bytes, qos: int, retain: bool, sizes: list[int]
) -> None:
    info = paho.MQTTMessageInfo(7)
    sent = by_paho(
        lambda client: client._send_publish(
            7, topic.encode(), payload, qos, retain, info=info if qos == 0 else None
        )
    )
    found = packets(2 * sent, sizes)
    assert b"".join(bytes(one.data) for one in found) == 2 * sent
    for packet in found:
        expected = (topic, retain, len(payload))
        assert mqtt.parse_publish(packet) == expected


@given(st.lists(st.tuples(TOPIC, st.integers(0, 2)), min_size=1, max_size=16))
def test_pahos_subscriptions_are_read(wanted: list[tuple[str, int]]) -> None:
    def subscribe(client: Any) -> None:
        client._send_subscribe(False, [(topic.encode(), qos) for topic, qos in wanted])
        client._send_unsubscribe(False, [topic.encode() for topic, _ in wanted])

    first, second = packets(by_paho(subscribe))
    filters = tuple(topic for topic, _ in wanted)
    assert (first.kind, second.kind) == (mqtt.SUBSCRIBE, mqtt.UNSUBSCRIBE)
    assert mqtt.parse_subscribe(first).filters == filters
    assert mqtt.parse_subscribe(second).filters == filters
    refusal = mqtt.encode_subscribe_refusal(mqtt.parse_subscribe(first))
    assert refusal[2:4] == bytes(first.body[:2])
    assert refusal[4:] == b"\x80" * len(filters)


@given(st.binary(max_size=300), st.lists(st.integers(1, 9), max_size=50))
def test_any_bytes_are_packets_or_bad(data: bytes, sizes: list[int]) -> None:
    parse_all(data, sizes)


def parse_all(data: bytes, sizes: list[int]) -> int:
    """The number of packets read. Any error but BadPacket fails the test."""
    parsers = {
        mqtt.CONNECT: mqtt.parse_connect,
        mqtt.PUBLISH: mqtt.parse_publish,
        mqtt.SUBSCRIBE: mqtt.parse_subscribe,
        mqtt.UNSUBSCRIBE: mqtt.parse_subscribe,
    }
    count = 0
    try:
        for packet in packets(data, sizes):
            parsers.get(packet.kind, mqtt.check_rest)(packet)
            count += 1
    except BadPacket:
        pass
    return count


def test_changed_packets_are_read_or_bad() -> None:
    """Real packets with some bytes changed, cut out or doubled."""
    rng = random.Random(5)
    will = Will("cw/f/peer/P/presence", b"gone", 1, True)
    real = [
        mqtt.encode_connect(Connect("id", 5, "user", b"password", will)),
        by_paho(lambda client: client._send_publish(7, b"a/topic", b"text", 1, True)),
        by_paho(lambda client: client._send_subscribe(False, [(b"a/+/b", 1)])),
    ]
    read = 0
    for _ in range(20_000):
        data = bytearray(rng.choice(real) + rng.choice(real))
        for _ in range(rng.randrange(4)):
            at = rng.randrange(len(data))
            match rng.randrange(3):
                case 0:
                    data[at] = rng.randrange(256)
                case 1:
                    del data[at : at + rng.randrange(4)]
                case _:
                    data[at:at] = data[at : at + rng.randrange(9)]
        read += parse_all(bytes(data), [rng.randrange(1, 9) for _ in range(4)])
    assert read > 10_000


@pytest.mark.parametrize(
    "data",
    [
        b"\x30\xff\xff\xff\x7f",  # 256 MB
        b"\x30" + b"\xff" * 4,  # a fifth byte of length
        b"\x30" + bytes([0x80 | (MAX_PACKET_BYTES + 1) % 128, 0xFF, 0x7F]),
        b"\x34\x05\x00\x01a\x00\x01",  # QoS 2
        b"\x36\x05\x00\x01a\x00\x01",  # QoS 3
        b"\x00\x00",
        b"\x20\x02\x00\x00",  # what only a broker sends
        b"\xf0\x00",  # AUTH of MQTT 5
        b"\x62\x02\x00\x01",  # PUBREL
        b"\x80\x00",  # SUBSCRIBE with wrong flags
        b"GET / HTTP/1.1\r\n",
    ],
)
def test_what_no_client_may_send_is_bad_at_its_first_bytes(data: bytes) -> None:
    with pytest.raises(BadPacket):
        packets(data)


@pytest.mark.parametrize(
    "body",
    [
        b"\x00\x04MQTT\x05\xc2\x00\x05\x00\x00\x00\x01u\x00\x01p",  # version 5
        b"\x00\x06MQIsdp\x03\xc2\x00\x05\x00\x00\x00\x01u\x00\x01p",  # version 3.1
        b"\x00\x04MQTT\x04\x02\x00\x05\x00\x00",  # no login
        b"\x00\x04MQTT\x04\xc3\x00\x05\x00\x00\x00\x01u\x00\x01p",  # a reserved flag
        b"\x00\x04MQTT\x04\xe2\x00\x05\x00\x00\x00\x01u\x00\x01p",  # retain without a will
        b"\x00\x04MQTT\x04\xc2\x00\x05\x00\x00\x00\x01u\x00\x01p!",  # more bytes
        b"\x00\x04MQTT\x04\xc2\x00\x05\x00\x00\x00\x01u\x00\x09p",  # fewer bytes
        b"\x00\x04MQTT\x04\xc2\x00\x05\x00\x00\x00\x01\xff\x00\x01p",  # not UTF-8
        b"\x00\x04MQTT\x04\xc2\x00\x05\x00\x00\x00\x01\x00\x00\x01p",  # NUL
        b"\x00\x04MQTT\x04\xc6\x00\x05\x00\x00\x00\x03a/#\x00\x00\x00\x01u\x00\x01p",  # will on #
    ],
)
def test_a_connect_that_is_refused(body: bytes) -> None:
    [packet] = packets(bytes([0x10, len(body)]) + body)
    with pytest.raises(BadPacket):
        mqtt.parse_connect(packet)
