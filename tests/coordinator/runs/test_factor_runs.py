"""Runs whose adapters are multiplied: what they ask for, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.remote.run_options import build_order
from coordinator.runs import spec_rules
from coordinator.storage.run_events import RunSpec
from protocols.errors import UsageError


def order(way: str, *more: str, **typed: Any) -> RunSpec:
    asked = ["model=tiny", f"aggregation={way}", *more]
    return build_order({"task": "lora", "set": asked, **typed}).spec


@pytest.mark.parametrize(("way", "strategy"), [("stack", "fedavg"), ("svd", "svd")])
def test_the_codec_and_the_strategy_follow_from_the_way(way: str, strategy: str) -> None:
    for rank, codec in (("", "factors:8"), ("rank=4", "factors:4"), ("rank=auto", "factors:32")):
        spec = order(way, *([rank] if rank else []))
        assert (spec.codec, spec.strategy) == (codec, strategy)
        spec_rules.check(spec)
    assert order("ffa").codec == order("average").codec == "fp32"
    with pytest.raises(UsageError, match="a whole number from 1 to 1024"):
        order(way, "rank=5000")
    with pytest.raises(UsageError, match="--codec cannot be used with aggregation"):
        order(way, codec="int8")


def test_products_work_with_what_works_on_a_mean() -> None:
    for fields in ({"strategy": "fedavgm"}, {"mode": "buffered", "buffer": 2}, {"late": "fold"}):
        spec_rules.check(order("stack", **fields))
    for way in ("stack", "svd"):
        spec_rules.check(order(way, **{"outlier-limit": 3.0, "clip-norm": 1.0}))


@pytest.mark.parametrize("way", ["stack", "svd"])
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"secure": True, "quorum": 3}, "--secure cannot be used with aggregation="),
        (
            {"dp-user": 8.0, "clip-norm": 1.0, "weighting": "equal", "outlier-limit": 0.0},
            "--dp-user cannot be used with aggregation=",
        ),
        ({"strategy": "scaffold"}, ""),
        ({"strategy": "diloco"}, ""),
        ({"strategy": "fedbn"}, ""),
    ],
    ids=lambda part: str(part)[:20],
)
def test_what_cannot_be_combined_is_refused_before_the_start(
    way: str, fields: dict[str, Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words or "cannot be used with aggregation=") as refused:
        spec_rules.check(order(way, **fields))
    assert "aggregation=ffa" in refused.value.hint


def test_svd_is_synchronous() -> None:
    for fields in ({"mode": "buffered", "buffer": 2}, {"late": "fold"}):
        with pytest.raises(UsageError, match="cannot be used with"):
            spec_rules.check(order("svd", **fields))


@pytest.mark.parametrize(
    "spec",
    [
        RunSpec(task="mnist", rounds=1, codec="factors:8"),
        RunSpec(task="lora", rounds=1, codec="factors:8", settings={"model": "tiny"}),
        RunSpec(task="mnist", rounds=1, strategy="svd"),
        RunSpec(task="lora", rounds=1, settings={"model": "tiny", "aggregation": "stack"}),
        RunSpec(
            task="lora",
            rounds=1,
            codec="factors:8",
            settings={"model": "tiny", "aggregation": "svd"},
        ),
    ],
)
def test_no_run_has_one_without_the_other(spec: RunSpec) -> None:
    with pytest.raises(UsageError):
        spec_rules.check(spec)
