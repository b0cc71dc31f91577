"""Which version comes back when the coordinator's disk is gone, and whose word is taken for it."""

from __future__ import annotations

from functools import partial

import pytest

from coordinator import facts, recall, transitions
from coordinator.facts import Fact, Holding, RunSpec, Update
from coordinator.runs import Run
from protocols import identity
from protocols.errors import UpdateRefused
from protocols.exchange import Question, Work, sign_work
from protocols.states import RunState

OWN, STRANGER = identity.new_signing_key(), identity.new_signing_key()
IS_OWN = partial(identity.verify, identity.raw_public(OWN))
HERE = frozenset("ABC")
#: The ledger of the backup: one round of three is closed.
BEFORE: list[Fact] = [
    facts.RunStarted(RunSpec(task="t", rounds=3)),
    facts.WeightsInitialised("v0", "A"),
    facts.RoundOpened(1, "v0", ("A",)),
    facts.UpdateAccepted(1, "A", Update(digest="u", num_examples=1)),
    facts.TrainingClosed(1, ("A",)),
    facts.VersionCommitted(1, "v1", "v0", ("A",), {}, {"momentum": "m1"}),
    facts.RoundClosed(1, {"accuracy": 0.5}, 1.0, 0, 0),
]


def seeking(*then: Fact, whole: bool = False) -> Run:
    return transitions.replay("r", [*BEFORE, facts.RecallBegun(whole), *then])


def told(**held: Holding | None) -> list[Fact]:
    asked: Fact = facts.PeersAsked(tuple(sorted(held)))
    return [asked, *(facts.HoldingTold(peer, version) for peer, version in held.items())]


def test_everybody_who_comes_is_asked_and_the_newest_version_is_taken() -> None:
    assert recall.decide(seeking(), HERE, False) == recall.Ask(("A", "B", "C"))
    new, old = Holding(5, "v5"), Holding(4, "v4")
    run = seeking(*told(A=old, B=new, C=None))
    assert isinstance(recall.decide(run, HERE, False), str)  # one with a newer one may come yet
    assert recall.decide(run, HERE | {"D"}, False) == recall.Ask(("D",))
    assert recall.decide(run, HERE, True) == recall.Seek(new)


def test_of_two_versions_of_one_round_that_of_more_peers_is_taken() -> None:
    run = seeking(*told(A=Holding(5, "z"), B=Holding(5, "a"), C=Holding(5, "a")))
    assert recall.decide(run, HERE, True) == recall.Seek(Holding(5, "a"))


def test_a_holder_that_has_it_not_is_passed_over_and_then_the_next_best_is_taken() -> None:
    new, old = Holding(5, "v5"), Holding(4, "v4")
    run = seeking(*told(A=old, B=new, C=new), facts.VersionSought(new))
    assert run.kind == "recall"
    assert recall.decide(run, HERE, False) == recall.Ask(("B",))
    for peer in "BC":
        assert recall.decide(run, HERE, False) == recall.Ask((peer,))
        run = transitions.apply(run, facts.PeersAsked((peer,)))
        assert isinstance(recall.decide(run, HERE, False), str)
        run = transitions.apply(run, facts.UpdateRefused(1, peer, "agent failed", "x", "recall"))
    again = recall.decide(run, frozenset("A"), True)
    assert again == recall.Ask(("A",))  # asked anew: what it holds may have changed
    run = transitions.apply(run, facts.PeersAsked(("A",)))
    run = transitions.apply(run, facts.HoldingTold("A", old))
    assert recall.decide(run, frozenset("A"), True) == recall.Seek(old)


def test_the_backups_own_version_is_kept_if_nobody_has_a_newer_one() -> None:
    run = seeking(*told(A=Holding(1, "v1"), B=None), whole=True)
    assert recall.decide(run, frozenset("AB"), True) == recall.KeepOwn()
    newer = seeking(*told(A=Holding(2, "v2")), whole=True)
    assert recall.decide(newer, frozenset("A"), True) == recall.Seek(Holding(2, "v2"))


def test_a_run_that_had_finished_does_not_wait_for_ever() -> None:
    finished = facts.RunEnded(RunState.FINISHED, "all 3 rounds are done")
    run = transitions.replay("r", [*BEFORE, finished, facts.RecallBegun(False), *told(A=None)])
    assert recall.decide(run, frozenset("A"), True) == recall.GiveUp()
    assert isinstance(recall.decide(seeking(*told(A=None)), frozenset("A"), True), str)


def test_rounds_that_the_ledger_never_saw_are_one_entry() -> None:
    run = seeking(facts.VersionRecalled(Holding(2, "v2"), "A"))
    assert [(closed.round, closed.digest) for closed in run.history] == [(1, "v1"), (2, "v2")]
    assert (run.round, run.head, run.parent, run.strategy_state) == (2, "v2", "v1", {})
    assert run.best is not None
    assert run.best.round == 1
    back = seeking(facts.VersionRecalled(Holding(0, "v0"), "A"))
    assert (back.round, back.head, back.history, back.best) == (0, "v0", (), None)


def signed(kind: Question, number: int = 4, run: str = "r", key: identity.SigningKey = OWN):
    work = Work(run=run, round=number, kind=kind, task="t", base="d" if kind != "init" else "")
    return sign_work(work, key.sign)


def test_work_proves_the_version_that_it_is_on() -> None:
    assert recall.proven(seeking(), signed("train"), IS_OWN) == Holding(3, "d")
    assert recall.proven(seeking(), signed("evaluate"), IS_OWN) == Holding(4, "d")
    assert recall.proven(seeking(), None, IS_OWN) is None


@pytest.mark.parametrize(
    "proof",
    [
        signed("train", key=STRANGER),
        signed("train", run="another"),
        signed("init"),
        signed("recall"),
        (b"{}", OWN.sign(b"commonweight work 1\n{}")),
        (b"", b""),
    ],
)
def test_what_the_coordinator_did_not_sign_for_this_run_proves_nothing(
    proof: tuple[bytes, bytes],
) -> None:
    with pytest.raises(UpdateRefused, match=r"work|proves"):
        recall.proven(seeking(), proof, IS_OWN)
