"""Tickets: every typing error is told from a refusal before anything is sent."""

from __future__ import annotations

import hashlib
import random
import string
from base64 import urlsafe_b64encode

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocols.enrollment import tickets
from protocols.enrollment.tickets import Ticket
from protocols.errors import ExitCode, TicketMalformed

TICKETS = st.builds(
    Ticket,
    addresses=st.lists(
        st.text(string.ascii_lowercase + string.digits + ".:-[]", min_size=3, max_size=24),
        min_size=1,
        max_size=4,
    ).map(tuple),
    ca_sha256=st.binary(min_size=32, max_size=32),
    id=st.text("0123456789abcdef", min_size=8, max_size=8),
    secret=st.binary(min_size=16, max_size=16),
)
TYPED = string.ascii_letters + string.digits + "-_+/=.,!~äЖ"


@given(TICKETS)
def test_a_round_trip(ticket: Ticket) -> None:
    text = tickets.encode(ticket)
    assert tickets.decode(text) == ticket
    assert text.startswith("cw1.")
    assert set(text) <= set(string.ascii_letters + string.digits + "-_.")


@given(TICKETS, st.data())
def test_white_space_is_tolerated(ticket: Ticket, data: st.DataObject) -> None:
    text = tickets.encode(ticket)
    for blank in data.draw(st.lists(st.sampled_from([" ", "\n", "\r\n", "\t"]), max_size=4)):
        at = data.draw(st.integers(0, len(text)))
        text = text[:at] + blank + text[at:]
    assert tickets.decode(text) == ticket


@pytest.mark.parametrize("addresses", [("a:1",), ("ab:1",), ("abc:1",), ("10.0.0.1:9092", "x:1")])
def test_every_change_of_one_character_is_found(addresses: tuple[str, ...]) -> None:
    """Also in the last character, which holds bits that the data do not use."""
    text = tickets.encode(tickets.new_ticket(addresses, bytes(range(32))))
    rng = random.Random(7)
    for at, letter in enumerate(text):
        others = TYPED if at >= len(text) - 2 or letter in "-_" else rng.sample(TYPED, 12)
        for other in others:
            if other == letter:
                continue
            with pytest.raises(TicketMalformed):
                tickets.decode(text[:at] + other + text[at + 1 :])


def test_every_cut_every_doubling_and_every_swap_is_found() -> None:
    text = tickets.encode(tickets.new_ticket(("127.0.0.1:9092",), bytes(32)))
    for at in range(len(text)):
        for wrong in (text[:at], text[at + 1 :], text[:at] + text[at + 1 :], text[:at] + "=" * 4):
            if wrong != text:
                with pytest.raises(TicketMalformed):
                    tickets.decode(wrong)
        with pytest.raises(TicketMalformed):
            tickets.decode(text[: at + 1] + text[at] + text[at + 1 :])
        swapped = text[:at] + text[at : at + 2][::-1] + text[at + 2 :]
        if swapped != text:
            with pytest.raises(TicketMalformed):
                tickets.decode(swapped)


@given(st.text())
def test_any_text_is_a_ticket_or_malformed(text: str) -> None:
    for candidate in (text, "cw1." + text):
        with pytest.raises(TicketMalformed) as caught:
            tickets.decode(candidate)
        assert caught.value.exit_code is ExitCode.USAGE
        assert caught.value.hint


def test_another_format_is_named() -> None:
    with pytest.raises(TicketMalformed, match="'cw2'") as caught:
        tickets.decode("cw2.abcdef")
    assert "update" in caught.value.hint


@pytest.mark.parametrize(
    "fields",
    [
        [["a:1"], bytes(31), "0" * 8, bytes(16)],
        [["a:1"], bytes(32), "0" * 8, bytes(15)],
        [["a:1"], bytes(32), "0" * 9, bytes(16)],
        [[], bytes(32), "0" * 8, bytes(16)],
        [["a:1"] * 17, bytes(32), "0" * 8, bytes(16)],
        [["a:1"], bytes(32)],
        {"addresses": ["a:1"]},
        [["x" * 40]],
    ],
)
def test_a_right_checksum_over_wrong_fields_is_refused(fields: object) -> None:
    body = msgspec.msgpack.encode(fields)
    checked = body + hashlib.sha256(body).digest()[:4]
    text = tickets.PREFIX + urlsafe_b64encode(checked).rstrip(b"=").decode()
    with pytest.raises(TicketMalformed):
        tickets.decode(text)


def test_secrets_are_fresh_and_kept_hashed() -> None:
    one, other = (tickets.new_ticket(("a:1",), bytes(32)) for _ in range(2))
    assert one.secret != other.secret
    assert one.id != other.id
    kept = tickets.hash_secret(one.id, one.secret)
    assert kept == tickets.hash_secret(one.id, one.secret)
    assert kept != tickets.hash_secret(other.id, one.secret)
    assert one.secret.hex() not in kept
