"""Which version comes back when the coordinator's disk is gone, and whose word is taken for it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from coordinator.runs import recovery, retention, steps, transitions
from coordinator.runs.state import Run
from coordinator.storage import run_events
from coordinator.storage.run_events import Holding, RunEvent, RunSpec, Update
from coordinator.storage.weight_store import WeightStore
from coordinator.strategies.state import StateStore
from protocols.enrollment import identity
from protocols.errors import UpdateRefused
from protocols.messages.states import RunState
from protocols.messages.work import SIGNED_WORK, Work, WorkKind

OWN, STRANGER = identity.new_signing_key(), identity.new_signing_key()
FLEET = "f" * 16
IS_OWN = partial(identity.verify, identity.public_bytes(OWN))
HERE = frozenset("ABC")
#: The ledger of the backup: one round of three is closed.
BEFORE: list[RunEvent] = [
    run_events.RunStarted(RunSpec(task="t", rounds=3)),
    run_events.WeightsInitialised("v0", "A"),
    run_events.RoundOpened(1, "v0", ("A",)),
    run_events.UpdateAccepted(1, "A", Update(digest="u", num_examples=1)),
    run_events.TrainingClosed(1, ("A",)),
    run_events.VersionCommitted(1, "v1", "v0", ("A",), {}, {"momentum": "m1"}),
    run_events.RoundClosed(1, {"accuracy": 0.5}, 1.0, 0, 0),
]


def seeking(*then: RunEvent, whole: bool = False) -> Run:
    return transitions.replay("r", [*BEFORE, run_events.RecallBegun(whole), *then])


def told(**held: Holding | None) -> list[RunEvent]:
    asked: RunEvent = run_events.PeersAsked(tuple(sorted(held)))
    return [asked, *(run_events.HoldingTold(peer, version) for peer, version in held.items())]


def test_everybody_who_comes_is_asked_and_the_newest_version_is_taken() -> None:
    assert recovery.decide(seeking(), HERE, False) == steps.AskPeers(("A", "B", "C"))
    new, old = Holding(5, "v5"), Holding(4, "v4")
    run = seeking(*told(A=old, B=new, C=None))
    assert isinstance(
        recovery.decide(run, HERE, False), steps.Wait
    )  # one with a newer one may come yet
    assert recovery.decide(run, HERE | {"D"}, False) == steps.AskPeers(("D",))
    assert recovery.decide(run, HERE, True) == steps.FetchVersion(new)


def test_of_two_versions_of_one_round_that_of_more_peers_is_taken() -> None:
    run = seeking(*told(A=Holding(5, "z"), B=Holding(5, "a"), C=Holding(5, "a")))
    assert recovery.decide(run, HERE, True) == steps.FetchVersion(Holding(5, "a"))


def test_a_holder_that_has_it_not_is_passed_over_and_then_the_next_best_is_taken() -> None:
    new, old = Holding(5, "v5"), Holding(4, "v4")
    run = seeking(*told(A=old, B=new, C=new), run_events.VersionSought(new))
    assert run.kind == "recall"
    assert recovery.decide(run, HERE, False) == steps.AskPeers(("B",))
    for peer in "BC":
        assert recovery.decide(run, HERE, False) == steps.AskPeers((peer,))
        run = transitions.apply(run, run_events.PeersAsked((peer,)))
        assert isinstance(recovery.decide(run, HERE, False), steps.Wait)
        run = transitions.apply(
            run, run_events.UpdateRefused(1, peer, "agent failed", "x", "recall")
        )
    again = recovery.decide(run, frozenset("A"), True)
    assert again == steps.AskPeers(("A",))  # asked anew: what it holds may have changed
    run = transitions.apply(run, run_events.PeersAsked(("A",)))
    run = transitions.apply(run, run_events.HoldingTold("A", old))
    assert recovery.decide(run, frozenset("A"), True) == steps.FetchVersion(old)


def test_the_backups_own_version_is_kept_if_nobody_has_a_newer_one() -> None:
    run = seeking(*told(A=Holding(1, "v1"), B=None), whole=True)
    assert recovery.decide(run, frozenset("AB"), True) == steps.KeepOwn()
    newer = seeking(*told(A=Holding(2, "v2")), whole=True)
    assert recovery.decide(newer, frozenset("A"), True) == steps.FetchVersion(Holding(2, "v2"))


def test_a_run_that_had_finished_does_not_wait_for_ever() -> None:
    finished = run_events.RunEnded(RunState.FINISHED, "all 3 rounds are done")
    run = transitions.replay("r", [*BEFORE, finished, run_events.RecallBegun(False), *told(A=None)])
    assert recovery.decide(run, frozenset("A"), True) == steps.EndRun(
        RunState.FINISHED, "all 3 rounds are done; its versions are lost"
    )
    assert isinstance(recovery.decide(seeking(*told(A=None)), frozenset("A"), True), steps.Wait)


def test_rounds_that_the_ledger_never_saw_are_one_entry() -> None:
    run = seeking(run_events.VersionRecalled(Holding(2, "v2"), "A"))
    assert [(closed.round, closed.digest) for closed in run.history] == [(1, "v1"), (2, "v2")]
    assert (run.round, run.head, run.parent, run.strategy_state) == (2, "v2", "v1", {})
    assert run.best is not None
    assert run.best.round == 1
    back = seeking(run_events.VersionRecalled(Holding(0, "v0"), "A"))
    assert (back.round, back.head, back.history, back.best) == (0, "v0", (), None)


def signed(
    kind: WorkKind,
    number: int = 4,
    run: str = "r",
    key: identity.SigningKey = OWN,
    fleet: str = FLEET,
):
    base = "d" * 64 if kind != "init" else ""
    work = Work(run=run, round=number, kind=kind, task="t", base=base, fleet=fleet)
    return SIGNED_WORK.seal(work, key.sign)


def test_work_proves_the_version_that_it_is_on() -> None:
    assert recovery.verify_proof(seeking(), signed("train"), IS_OWN, FLEET) == Holding(3, "d" * 64)
    assert recovery.verify_proof(seeking(), signed("evaluate"), IS_OWN, FLEET) == Holding(
        4, "d" * 64
    )
    assert recovery.verify_proof(seeking(), None, IS_OWN, FLEET) is None
    older = signed("train", fleet="")
    assert recovery.verify_proof(seeking(), older, IS_OWN, FLEET) == Holding(3, "d" * 64)


@pytest.mark.parametrize(
    "proof",
    [
        signed("train", key=STRANGER),
        signed("train", run="another"),
        signed("train", fleet="0" * 16),
        signed("init"),
        signed("recall"),
        (b"{}", OWN.sign(b"commonweight work 1\n{}")),
        (b"", b""),
    ],
)
def test_what_the_coordinator_did_not_sign_for_this_run_proves_nothing(
    proof: tuple[bytes, bytes],
) -> None:
    with pytest.raises(UpdateRefused, match=r"work|proves|fleet"):
        recovery.verify_proof(seeking(), proof, IS_OWN, FLEET)


def test_files_of_a_round_that_had_not_closed_are_deleted_after_the_recall(tmp_path: Path) -> None:
    """The backup has the version and its state, and the ledger names both."""
    unclosed: list[RunEvent] = [
        run_events.RoundOpened(2, "v1", ("A",)),
        run_events.UpdateAccepted(2, "A", Update(digest="u2", num_examples=1)),
        run_events.TrainingClosed(2, ("A",)),
        run_events.VersionCommitted(2, "v2", "v1", ("A",), {}, {"momentum": "m2"}),
    ]
    back = run_events.VersionRecalled(Holding(5, "v5"), "A")
    run = transitions.replay(
        "r", [*BEFORE, *unclosed, run_events.RecallBegun(True), *told(A=Holding(5, "v5")), back]
    )
    store = WeightStore(tmp_path)
    states = StateStore(store.states)
    versions = [store.version_path(digest) for digest in ("v2", "v1", "v5")]
    paths = [*versions, states.path("m2"), states.path("m1")]
    for path in paths:
        path.touch()
    retention.Retention(run, store, set).prune(run)
    assert [path.stem for path in paths if path.exists()] == ["v1", "v5", "m1"]
