"""What operators offer: kept in the ledger, signed for agents, and withdrawn."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from coordinator.admin import audit
from coordinator.fleet.registry import Registry
from coordinator.fleet.task_offers import TaskOffers
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.enrollment import identity
from protocols.errors import BadMessage, UnknownName, UsageError
from protocols.messages.offers import MAX_OFFERS, SIGNED_OFFERS, OfferList, OfferRequest

KEY = identity.new_signing_key()


def opened(folder: Path) -> TaskOffers:
    return TaskOffers(SqliteLedger(folder / "ledger.db"), "fleet", KEY.sign)


def signed(offers: TaskOffers) -> OfferList:
    public = identity.public_bytes(KEY)
    return SIGNED_OFFERS.unpack(offers.signed_list(), lambda *it: identity.verify(public, *it))


def test_offers_are_signed_and_survive_a_restart(tmp_path: Path) -> None:
    offers, told = opened(tmp_path), []
    offers.on_change = told.append
    assert (offers.number, signed(offers).offers) == (0, ())
    first = offers.offer(OfferRequest(name="a.py:A", data=b"a = 1\n"), "operator", "ada")
    second = offers.offer(OfferRequest(name="a.py:A", data=b"a = 2\n"), "operator", "ada")
    other = offers.offer(OfferRequest(name="b.py:B", data=b"b = 1\n"), "p1", "bob")
    again = opened(tmp_path)
    assert signed(again) == signed(offers)
    assert signed(again).offers == (second, other)
    assert again.number == offers.number >= int(time.time()) - 60
    assert again.file(second.digest) == b"a = 2\n"
    assert again.file(first.digest) is None, "it is superseded"
    again.withdraw("a.py:A", "p1", "bob")
    assert (signed(again).offers, again.number) == ((other,), offers.number + 1)
    assert [line.partition(" the task")[0] for line in told] == ["ada offers"] * 2 + ["bob offers"]
    with pytest.raises(UnknownName, match=r"'a.py:A' is offered"):
        again.withdraw("a.py:A", "p1", "bob")

    ledger = SqliteLedger(tmp_path / "ledger.db", read_only=True)
    lines = [f"{one.event}: {one.text}" for one in audit.read_audit(ledger)]
    assert (
        lines[0] == f"task offered: the operator of this home offered a.py:A, sha256 {first.digest}"
    )
    assert lines[3] == f"task withdrawn: p1 withdrew a.py:A, sha256 {second.digest}"
    assert Registry(ledger).peers == {}, "the registry reads the same entries"


def test_few_small_texts_are_offered_at_a_time(tmp_path: Path) -> None:
    offers = opened(tmp_path)
    for data in (b"", b"\xff", b"# coding: rot13\n"):
        with pytest.raises(UsageError, match="offered file"):
            offers.offer(OfferRequest(name="a.py:A", data=data), "operator", "ada")
    for number in range(MAX_OFFERS):
        offers.offer(OfferRequest(name=f"a{number}.py:A", data=b"a\n"), "operator", "ada")
    with pytest.raises(UsageError, match="16 tasks are offered already"):
        offers.offer(OfferRequest(name="b.py:A", data=b"a\n"), "operator", "ada")
    offers.offer(OfferRequest(name="a0.py:A", data=b"b\n"), "operator", "ada")
    assert len(offers.offers()) == MAX_OFFERS


def test_a_list_is_signed_for_its_own_purpose(tmp_path: Path) -> None:
    packed = opened(tmp_path).signed_list()
    other = identity.public_bytes(identity.new_signing_key())
    with pytest.raises(BadMessage, match="not signed"):
        SIGNED_OFFERS.unpack(packed, lambda *it: identity.verify(other, *it))
