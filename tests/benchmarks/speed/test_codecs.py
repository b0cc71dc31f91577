"""The benchmark of the codecs measures every codec."""

from __future__ import annotations

from benchmarks.speed import codecs
from protocols.codecs import registry


def test_every_codec_is_measured_and_makes_the_update_smaller() -> None:
    rows = codecs.run(1)
    assert [row["name"] for row in rows] == [registry.parse(n).name for n in registry.NAMES[1:]]
    assert all(row["ratio_bytes_large"] > 1.5 for row in rows)
