"""Which versions work together, and what the others are told."""

from __future__ import annotations

import pytest

from protocols.errors import VersionSkew
from protocols.network import version_check


@pytest.mark.parametrize(
    ("one", "other", "near"),
    [
        ("0.1.0", "0.1.0", True),
        ("0.1.0", "0.1.9", True),
        ("0.1.0", "0.2.0", True),
        ("0.2.0", "0.1.5rc1", True),
        ("0.1.0", "0.3.0", False),
        ("1.0.0", "0.9.0", False),
        ("1.4.0", "2.4.0", False),
        ("1.10.0", "1.9.0", True),
        ("1.1", "1.2", True),
        ("0.1.0", "", True),
        ("0.1.0", "unknown", True),
        ("0.0.0", "5.0.0", True),
    ],
)
def test_at_most_one_minor_version_apart(one: str, other: str, near: bool) -> None:
    assert version_check.are_compatible(one, other) is near
    assert version_check.are_compatible(other, one) is near


def test_a_refusal_names_both() -> None:
    with pytest.raises(
        VersionSkew, match=r"the coordinator runs commonweight 0\.4\.0, this is 0\.1"
    ):
        version_check.check_compatible("0.4.0", "the coordinator", ours="0.1.0")
