"""The broker's address, back-off, and the numbers of messages."""

from __future__ import annotations

import itertools
from io import StringIO
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from protocols.enrollment import certificates, identity
from protocols.errors import UsageError
from protocols.messages import envelope as messages
from protocols.messages import topics
from protocols.messages.mqtt import (
    MqttAddress,
    ReplayFilter,
    SequencedSigner,
    parse_url,
    tls_context,
)
from protocols.network.backoff import delays

PASSWORD = "pass/word"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("mqtt://broker", MqttAddress(host="broker", port=1883, tls=False)),
        ("mqtts://broker/", MqttAddress(host="broker", port=8883)),
        ("mqtts://[::1]:9", MqttAddress(host="::1", port=9)),
        (
            " mqtts://me:pass%2Fword@broker.example:9000\n",
            MqttAddress(host="broker.example", port=9000, user="me", password=PASSWORD),
        ),
    ],
)
def test_an_url_is_read(url: str, expected: MqttAddress) -> None:
    assert parse_url(url) == expected


@pytest.mark.parametrize(
    "url",
    [
        "",
        "broker:1883",
        "http://broker",
        "mqtt://",
        "mqtt://:1883",
        "mqtt://broker:0",
        "mqtt://broker:70000",
        "mqtt://broker:x",
        "mqtt://broker/topic",
        "mqtt://broker?x=1",
        "mqtt://a..b",
        "mqtt://[::1",
        f"mqtt://me:{PASSWORD}@broker",
    ],
)
def test_a_wrong_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_url(url)
    assert "mqtt" in caught.value.hint + caught.value.message
    assert "word" not in caught.value.message
    assert caught.value.__suppress_context__ or caught.value.__cause__ is None


def test_the_password_is_not_shown() -> None:
    address = parse_url("mqtts://me:sesame@[::1]:9")
    console = Console(file=StringIO(), width=200)
    console.print([address], {"a": address})
    shown = repr(address) + str(address) + repr([address]) + console.file.getvalue()  # type: ignore[attr-defined]
    assert "sesame" not in shown
    assert "me@[::1]:9" in shown


def test_tls_checks_the_name_and_one_ca_only() -> None:
    assert tls_context(MqttAddress(host="x", port=1, tls=False)) is None
    _, ca_pem = certificates.new_ca("test")
    context = tls_context(MqttAddress(host="x", port=1, ca_pem=ca_pem.decode()))
    assert context is not None
    assert context.check_hostname
    assert len(context.get_ca_certs()) == 1
    with pytest.raises(UsageError):
        tls_context(MqttAddress(host="x", port=1, ca_pem="no certificate"))
    with pytest.raises(UsageError):
        parse_url("mqtt://x", ca_pem.decode())


@given(st.integers())
def test_waits_stay_in_bounds_and_differ(seed: int) -> None:
    waits = list(itertools.islice(delays(Random(seed)), 40))
    assert all(0.5 <= wait <= 15 for wait in waits)
    assert max(waits) > 5
    assert waits[0] <= 1.5
    other = next(delays(Random(seed + 1)))
    assert other != waits[0]


def test_a_voice_numbers_without_gaps_and_is_heard_once() -> None:
    key = identity.new_signing_key()
    voice, seen = SequencedSigner("P", key.sign), ReplayFilter(limit=2)
    topic = topics.presence("0" * 16, "P")

    def verify(sender: str, signature: bytes, signed: bytes) -> bool:
        return identity.verify(identity.public_bytes(key), signature, signed)

    for number in range(3):
        payload = voice.seal(topic, messages.Doorbell())
        envelope = messages.unseal(topic, payload, verify)
        assert (envelope.epoch, envelope.seq, envelope.sender) == (voice.epoch, number, "P")
        assert seen.is_new(envelope.epoch, "a", envelope.seq)
        assert not seen.is_new(envelope.epoch, "a", envelope.seq)
    assert seen.is_new(voice.epoch, "b", 0)
    assert SequencedSigner("P", key.sign).epoch != voice.epoch


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.integers(0, 9))))
def test_nothing_is_fresh_twice(numbers: list[tuple[str, int]]) -> None:
    seen = ReplayFilter()
    fresh = [one for one in numbers if seen.is_new(one[0], "k", one[1])]
    assert len(fresh) == len(set(fresh))
    for epoch in "xyz":
        of_epoch = [number for name, number in fresh if name == epoch]
        assert of_epoch == sorted(of_epoch)
