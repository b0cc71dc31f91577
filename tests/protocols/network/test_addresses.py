"""Addresses of coordinators in their parts."""

from __future__ import annotations

import pytest

from protocols.network.addresses import Address, netloc, parse


@pytest.mark.parametrize(
    ("text", "address", "shown"),
    [
        ("hub:9092", Address("hub", 9092, ""), "hub:9092"),
        ("[fd77::2]:9092", Address("fd77::2", 9092, ""), "[fd77::2]:9092"),
        ("train.example.org:443/fleet", Address("train.example.org", 443, "/fleet"), ""),
        ("train.example.org:443/a/b/", Address("train.example.org", 443, "/a/b"), ""),
    ],
)
def test_parts(text: str, address: Address, shown: str) -> None:
    assert parse(text) == address
    assert not shown or netloc(address.host, address.port) == shown


@pytest.mark.parametrize("text", ["", "hub", "hub:", "hub:x", "hub/9092"])
def test_what_is_none(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        parse(text)
