"""Random schedules of secure sums: an honest coordinator on a bad network, and a hostile one.

A long test plays 100,000 of them. `python -m tests.support.secure_schedules` plays any range.
In each, no agent tells both kinds of share, masks two cohorts with one card or signs two sets of
survivors, and each acknowledged update counts once or is refused with its reason. The last tests
break each of these rules, and the schedules notice it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from msgspec.structs import replace

from agent.home.secure_store import TurnKey
from protocols.privacy.secagg import peer
from protocols.privacy.secagg.aggregator import Aggregator, SurvivorsFixed
from protocols.privacy.secagg.turn import Turn
from tests.support import secure_cohort
from tests.support.secure_schedules import Site, play_honest, play_hostile

NAMES = ("ShareRequest", "MaskRequest", "AgreeRequest", "UnmaskRequest", "sum known")


def test_no_schedule_of_a_bad_network_gives_a_wrong_sum() -> None:
    results = Counter(play_honest(seed) for seed in range(60))
    assert results["sum"] > 40


@pytest.mark.attack("secure", by="coordinator")
def test_a_hostile_coordinator_learns_no_sum_of_too_few() -> None:
    """Attack: random requests with stale and forged cards, invented peers, split sets, repeats."""
    done = play_many(50)
    assert all(done[name] for name in NAMES)  # the schedules come as far as that


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("tenth", range(10))
def test_100_000_schedules(tenth: int) -> None:
    for seed in range(tenth * 5000, (tenth + 1) * 5000):
        play_honest(seed)
        play_hostile(seed)


def play_many(count: int) -> Counter[str]:
    return sum((play_hostile(seed) for seed in range(count)), Counter[str]())


class Forgetful(secure_cohort.MemoryStore):
    """A disk that loses what was signed, as a snapshot that is put back does."""

    def get(self, key: TurnKey) -> Turn | None:
        state = super().get(key)
        return replace(state, agree=None) if state else None

    def advance(self, old: Turn, new: Turn, step: str) -> None:
        self._record(new)


def test_the_schedules_notice_an_agent_that_forgets_what_it_signed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(secure_cohort, "MemoryStore", Forgetful)
    with pytest.raises(AssertionError, match=r"two sets of survivors|both kinds"):
        play_many(100)


def test_the_schedules_notice_a_peer_that_accepts_any_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "_check_set", lambda *_: None)
    with pytest.raises(AssertionError, match=r"the sum of \d peers is known|both secrets"):
        play_many(300)


FORGOTTEN: list[tuple[str, dict[str, Any], str]] = [
    ("share", {"cohort": None}, "one card in two cohorts"),
    ("mask", {"mask": None, "upload": ""}, "two masked updates with one card"),
    ("agree", {"agree": None}, "two sets of survivors signed"),
]


@pytest.mark.parametrize(("step", "forgotten", "found"), FORGOTTEN, ids=lambda part: str(part)[:8])
def test_the_schedules_notice_an_agent_that_answers_a_step_twice(
    step: str, forgotten: dict[str, Any], found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = getattr(peer, step)
    monkeypatch.setattr(
        peer, step, lambda state, *others: answer(replace(state, **forgotten), *others)
    )
    with pytest.raises(AssertionError, match=found):
        play_many(100)


def play_honest_ones(count: int) -> None:
    for seed in range(count):
        play_honest(seed)


def test_the_schedules_notice_an_update_that_the_sum_leaves_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sum of the others is right, and no refusal tells why the last one does not count."""
    all_survivors = Aggregator.fix_survivors

    def fewer(self: Aggregator) -> SurvivorsFixed:
        survivors = all_survivors(self).survivors
        return SurvivorsFixed(survivors=survivors[: max(self.needed(), len(survivors) - 1)])

    monkeypatch.setattr(Aggregator, "fix_survivors", fewer)
    with pytest.raises(AssertionError, match="an acknowledged update counts 0 times"):
        play_honest_ones(20)


def test_the_schedules_notice_a_late_update_that_nobody_refuses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Site, "refuse", lambda self, update: None)
    with pytest.raises(AssertionError, match="an acknowledged update counts 0 times"):
        play_honest_ones(2000)
