"""Names and texts that an offered task file may have."""

from __future__ import annotations

import msgspec
import pytest

from protocols.errors import BadMessage
from protocols.messages import offers
from protocols.messages.offers import Offer, OfferList

DIGEST = "ab" * 32


@pytest.mark.parametrize("data", [b"x = 1\n", "# größer\r\n".encode(), b"# coding: utf8\n", b" "])
def test_a_small_text_may_be_offered(data: bytes) -> None:
    assert offers.check_text(data) == data.decode()


@pytest.mark.parametrize("name", ["gait.py:Gait", "a.py:_B", "A_1.py:B2"])
def test_a_name_is_file_and_class(name: str) -> None:
    assert offers.check_name(name) == name
    made = Offer(name=name, digest=DIGEST, nbytes=1, at=1.0)
    assert msgspec.json.decode(msgspec.json.encode(made), type=Offer) == made


def test_the_largest_list_fits_into_its_limit() -> None:
    made = Offer(
        name=f"{'a' * 31}.py:{'B' * 29}",
        digest=DIGEST,
        nbytes=offers.MAX_FILE_BYTES,
        at=2.0**40,
        by="b" * 64,
        note="\u4e2d" * 400,
    )
    full = OfferList(fleet="f" * 64, number=2**62, offers=(made,) * offers.MAX_OFFERS)
    packed = offers.SIGNED_OFFERS.pack(full, lambda message: bytes(64))
    assert len(packed) <= offers.MAX_LIST_BYTES
    assert offers.SIGNED_OFFERS.unpack(packed, lambda *_: True) == full


@pytest.mark.parametrize("name", ["mnist", "a.py", "a:B", "a.py:B C", "a.py:", ":B", "a.pyc:B"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(BadMessage, match="cannot be offered"):
        offers.check_name(name)
