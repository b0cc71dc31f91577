"""Metrics as numbers beside a masked update."""

from __future__ import annotations

import pytest

from protocols.errors import BadMessage, UsageError
from protocols.messages.envelope import Metrics, Tallies
from protocols.privacy.secagg import messages, ring, tails
from protocols.privacy.secagg.messages import STEPS, TailNames, encode


def sums(*peers: tuple[Metrics, Tallies, int]) -> tuple[TailNames, list[float]]:
    names = tails.names(*peers[0][:2])
    total = sum(
        ring.encode_tail(tails.values(names, *peer, 5), len(peers)).astype(object) for peer in peers
    )
    return names, ring.decode_tail((total % 2**64).astype("uint64"))


def test_the_mean_is_over_the_peers_whose_metric_is_finite() -> None:
    names, total = sums(
        ({"loss": 0.5, "auc": None}, {"hits": [3.0, 1.0]}, 1),
        ({"loss": 0.2, "auc": 0.75}, {"hits": [2.0, 0.0]}, 3),
        ({"loss": None, "auc": 1e9}, {"hits": [0.0, 5.0]}, 2),
    )
    assert len(total) == tails.count(names) == 6
    metrics, tallies = tails.means(names, total)
    assert metrics["loss"] == pytest.approx((0.5 + 3 * 0.2) / 4, abs=1e-3)
    assert metrics["auc"] == pytest.approx(0.75, abs=1e-3)
    assert tallies == {"hits": [5.0, 6.0]}


def test_a_tally_of_house_prices_that_is_too_large_to_be_summed_is_not_known() -> None:
    """The sum of squared errors of 300 prices exceeds what three peers can add up."""
    names = TailNames(metrics=("loss",), tallies={"regression": 2, "hits": 1})
    small, large = [300.0, 4e11], [300.0, 8e4**2 * 300]
    for last, expected in ((small, {"regression", "hits"}), (large, {"hits"})):
        told = [{"regression": one, "hits": [5.0]} for one in (small, small, last)]
        total = sum(
            ring.encode_tail(tails.values(names, {"loss": 0.1}, one, 300, 300, 3), 3)
            for one in told
        )
        metrics, tallies = tails.means(names, ring.decode_tail(total))
        assert metrics["loss"] == pytest.approx(0.1, abs=1e-3)
        assert tails.known(tallies, 3).keys() == expected


def test_a_metric_that_no_peer_has_is_none() -> None:
    names, total = sums(({"loss": None}, {}, 5), ({"loss": None}, {}, 1))
    assert tails.means(names, total) == ({"loss": None}, {})


def test_the_largest_metrics_of_the_largest_cohort_fit() -> None:
    names = TailNames(metrics=("loss",))
    for examples in (1, 2**16, 2**53):
        one = tails.values(names, {"loss": tails._MAX_VALUE}, {}, examples, examples)
        assert ring.encode_tail(one, messages.MAX_COHORT).astype("int64")[0] > 0


def test_agents_of_older_versions_do_not_know_a_masked_codec() -> None:
    assert messages.ring_of(messages.masked_codec("int8")) == 16
    assert messages.ring_of("fp32") == messages.ring_of("masked:8") == 0
    with pytest.raises(UsageError, match="cannot send the codec topk"):
        messages.masked_codec("topk:0.1")


@pytest.mark.parametrize("step", STEPS)
def test_bytes_that_are_no_request_or_answer_are_refused(step: messages.SecureStep) -> None:
    for data in (b"", b"\xc1", encode({"cohort": b"x" * 31}), encode({"cohort": b"x" * 32})):
        with pytest.raises(BadMessage, match=f"request of the step {step}"):
            messages.decode_request(step, data)
        with pytest.raises(BadMessage, match=f"answer to the step {step}"):
            messages.decode_answer(step, data)
    with pytest.raises(BadMessage, match="not a valid card"):
        messages.decode_ready(encode({"card": [b"x", b"y"]}))
