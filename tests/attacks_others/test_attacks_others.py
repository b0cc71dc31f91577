"""The attacks on other systems fail on ours, and would be noticed if they did not."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from msgspec.structs import replace

from protocols.privacy.secagg import keys, peer
from protocols.privacy.secagg.messages import AgreeAnswer, AgreeRequest, UnmaskAnswer, UnmaskRequest
from protocols.privacy.secagg.recovery import Recovery
from tests.attacks_others import measures, on_ours
from tests.attacks_others.__main__ import Row, report
from tests.attacks_others.measures import Finding

FEW = range(2**10)


@pytest.mark.attack("secure", by="coordinator")
def test_the_seed_of_a_pair_mask_is_not_found() -> None:
    """Attack: try seeds of the one mask that is left after a peer dropped out."""
    finding = on_ours.try_seeds(FEW)
    assert not finding.works, finding
    assert "256 bits of a seed are free and 256 change the mask" in finding.detail


def test_a_seed_with_few_free_bits_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    strong = keys.pair_mask

    def weak(*words: object) -> bytes:
        return bytes(31) + strong(*words)[:1]  # type: ignore[arg-type]

    monkeypatch.setattr(keys, "pair_mask", weak)
    finding = on_ours.try_seeds(FEW)
    assert finding.works
    assert "1,024 seeds tried, 1 fits" in finding.detail


@pytest.mark.attack("secure", by="coordinator")
def test_both_secrets_of_a_peer_are_never_told() -> None:
    """Attack: name a peer as gone to some peers and as a survivor to the others, in every split."""
    finding = on_ours.ask_for_both_shares()
    assert not finding.works, finding


def test_a_peer_that_signs_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def agree(
        state: peer.Turn, request: AgreeRequest, pins: object, sign: peer.Sign
    ) -> tuple[peer.Turn, AgreeAnswer]:
        assert state.mask is not None
        message = peer._cohort(state).agreement(state.mask.sharers, request.survivors)
        answer = AgreeAnswer(cohort=request.cohort, signature=sign(message))
        return replace(state, agree=request), answer

    monkeypatch.setattr(peer, "agree", agree)
    finding = on_ours.ask_for_both_shares()
    assert not finding.works, "a peer repeats its last answer, and has deleted its keys"
    unmask = peer.unmask

    def keep_all(state: peer.Turn, request: UnmaskRequest) -> tuple[peer.Turn, UnmaskAnswer]:
        return state, unmask(state, request)[1]

    monkeypatch.setattr(peer, "unmask", keep_all)
    assert on_ours.ask_for_both_shares().works


@pytest.mark.attack("secure", by="coordinator")
def test_an_upload_shows_nothing_of_the_update() -> None:
    """Attack: correlate an upload with its update, subtract elements, use all that is stored."""
    findings = on_ours.look_at_an_upload()
    attacks = [measures.CORRELATE, measures.SUBTRACT, measures.STORED]
    assert [one.attack for one in findings] == attacks
    assert not any(one.works for one in findings), findings
    assert "2 masks are unknown to the coordinator" in findings[-1].detail


def test_a_coordinator_that_knows_all_masks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    derived = set[bytes]()
    derive = keys.pair_mask

    @functools.wraps(derive)
    def noted(*words: object) -> bytes:
        derived.add(seed := derive(*words))  # type: ignore[arg-type]
        return seed

    honest = on_ours.recover

    def all_of_them(state: on_ours.Aggregator) -> Recovery:
        return honest(state)._replace(plus=sorted(derived))

    monkeypatch.setattr(keys, "pair_mask", noted)
    monkeypatch.setattr(on_ours, "recover", all_of_them)
    assert all(one.works for one in on_ours.look_at_an_upload())


def test_a_search_finds_a_seed_of_the_mersenne_twister() -> None:
    """As in Flower: the first element is known, and the others have a range."""
    plain = np.random.default_rng(0).integers(0, 100, 20).astype(np.uint32)

    def whole(seed: int) -> measures.Ring:
        draws = np.random.RandomState(seed).randint(0, 2**32 - 1, 20, dtype=np.int64)
        return draws.astype(np.uint32)

    width = np.full(20, 99, np.uint32)
    width[0] = 0
    low = np.zeros(20, np.int64)
    low[0] = plain[0]
    target = measures.Target(plain + whole(5_000_123), low, width)
    numbers = range(5_000_000, 5_010_000)

    def first(some: np.typing.NDArray[np.uint64]) -> measures.Ring:
        return measures.first_outputs(some.astype(np.uint32))

    assert [*measures.search(target, numbers, first, whole)] == [5_000_123]


def test_a_contradiction_of_the_docs_is_told() -> None:
    works, fails = Finding("an attack", True, "seen"), Finding("an attack", False, "unseen")
    for theirs, ours, wrong in (
        (works, fails, []),
        (None, fails, []),
        (fails, fails, ["the docs say that this attack works on Other 1: an attack"]),
        (works, works, ["this attack works on commonweight: an attack"]),
    ):
        row = Row("Other 1", theirs, ours)
        assert [*row.contradictions()] == wrong
        text = report([row], "commonweight 0")
        assert text.count("an attack") == 2 + len(wrong)
        assert ("not run" in text) is (theirs is None)
