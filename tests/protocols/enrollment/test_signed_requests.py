"""Signed requests: over method, path and body, for a while, and once."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.enrollment import identity, signed_requests
from protocols.enrollment.signed_requests import WINDOW_S, NonceCache
from protocols.errors import BadMessage

KEY = identity.new_signing_key()
PUBLIC = identity.public_bytes(KEY)
PATH = "/cw/v1/weights/0?x=1"


def good(method: str, path: str, sent: dict[str, str], now: float | None = None) -> bool:
    signed = signed_requests.parse(method, path, sent, time.time() if now is None else now)
    return identity.verify(PUBLIC, signed.signature, signed.message)


def test_a_request_says_who_and_what() -> None:
    sent = signed_requests.sign_headers("me", KEY.sign, "PUT", PATH, "a" * 64)
    signed = signed_requests.parse("PUT", PATH, sent, time.time())
    assert (signed.sender, signed.body_sha256) == ("me", "a" * 64)
    assert identity.verify(PUBLIC, signed.signature, signed.message)


def test_the_signature_covers_method_path_body_time_and_nonce() -> None:
    sent = signed_requests.sign_headers("me", KEY.sign, "GET", PATH)
    assert good("GET", PATH, sent)
    assert not good("PUT", PATH, sent)
    assert not good("GET", PATH + "2", sent)
    assert not good("GET", PATH, sent | {signed_requests.BODY: "b" * 64})
    assert not good("GET", PATH, sent | {signed_requests.NONCE: "0" * 24})
    assert not good("GET", PATH, sent | {signed_requests.TIME: repr(time.time())})


def test_a_signature_has_one_form() -> None:
    """The last character before the padding has four spare bits, which the decoder ignores."""
    sent = signed_requests.sign_headers("me", KEY.sign, "GET", PATH)
    text = sent[signed_requests.SIGNATURE]
    other = text[:-3] + {"A": "B", "Q": "R", "g": "h", "w": "x"}[text[-3]] + "=="
    with pytest.raises(BadMessage, match="canonical"):
        good("GET", PATH, sent | {signed_requests.SIGNATURE: other})


@pytest.mark.parametrize(
    ("away_s", "fine"),
    [(0, True), (WINDOW_S - 5, True), (5 - WINDOW_S, True), (WINDOW_S + 5, False), (-1e9, False)],
)
def test_a_request_is_good_for_a_window(away_s: float, fine: bool) -> None:
    sent = signed_requests.sign_headers("me", KEY.sign, "GET", PATH)
    now = float(sent[signed_requests.TIME]) + away_s
    if fine:
        assert good("GET", PATH, sent, now)
    else:
        with pytest.raises(BadMessage, match="clock"):
            signed_requests.parse("GET", PATH, sent, now)


@pytest.mark.parametrize("at", ["nan", "inf", "-inf", "", "yesterday", "1e400"])
def test_no_odd_time_passes(at: str) -> None:
    sent = signed_requests.sign_headers("me", KEY.sign, "GET", PATH) | {signed_requests.TIME: at}
    with pytest.raises(BadMessage):
        signed_requests.parse("GET", PATH, sent, time.time())


@pytest.mark.parametrize(
    "name",
    [
        signed_requests.SENDER,
        signed_requests.TIME,
        signed_requests.NONCE,
        signed_requests.BODY,
        signed_requests.SIGNATURE,
    ],
)
def test_every_header_is_needed(name: str) -> None:
    sent = signed_requests.sign_headers("me", KEY.sign, "GET", PATH)
    del sent[name]
    with pytest.raises(BadMessage, match="not signed"):
        signed_requests.parse("GET", PATH, sent, time.time())


NAMES = [
    signed_requests.SENDER,
    signed_requests.TIME,
    signed_requests.NONCE,
    signed_requests.BODY,
    signed_requests.SIGNATURE,
]


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=90)))
def test_junk_in_a_header_is_refused_or_is_a_wrong_signature(changed: dict[str, str]) -> None:
    sent = signed_requests.sign_headers("me", KEY.sign, "GET", PATH)
    covered = {name: text for name, text in changed.items() if name != signed_requests.SENDER}
    try:
        signed = signed_requests.parse("GET", PATH, sent | covered, time.time())
    except BadMessage:
        return
    same = covered.items() <= sent.items()
    assert identity.verify(PUBLIC, signed.signature, signed.message) == same


def test_a_nonce_is_spent_once_by_each() -> None:
    nonces = NonceCache()
    assert nonces.use("a", "n", 0.0)
    assert not nonces.use("a", "n", 0.0)
    assert not nonces.use("a", "n", WINDOW_S)
    assert nonces.use("b", "n", 0.0)


def test_nonces_are_bounded_and_none_is_forgotten_while_it_is_good() -> None:
    nonces = NonceCache(limit=10)
    for number in range(10):
        assert nonces.use("a", str(number), 0.0)
    # Full: rather refuse than forget a nonce whose signature would still be taken.
    assert not nonces.use("a", "more", WINDOW_S)
    assert not nonces.use("a", "0", 2 * WINDOW_S)
    assert nonces.use("a", "more", 2 * WINDOW_S + 1)
    assert len(nonces._seen) == 1
