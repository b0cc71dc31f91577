"""Secure runs as a machine: what is decided, and what events change."""

from __future__ import annotations

from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.runs import decisions, steps, transitions
from coordinator.runs.decisions import Observation
from coordinator.runs.secure.decisions import MAX_LOST_COHORTS, Progress, is_over_for, needs
from coordinator.runs.state import COHORT, Run, accepted_uploads
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent, RunSpec, Update
from protocols.messages.states import RunState
from protocols.messages.work import OpenSum

PEERS = ("A", "B", "C", "D")
ALL = frozenset(PEERS)


class Loop:
    """What the loop does with a secure run, without network, disk or keys.

    `here`: online peers. `told`: peers whose answer to the present step is in memory.
    """

    def __init__(self, **spec: Any) -> None:
        made = RunSpec(task="t", **{"rounds": 2, "quorum": 3, "secure": True, **spec})
        self.facts: list[RunEvent] = [
            run_events.RunStarted(made),
            run_events.WeightsInitialised("first", "file"),
        ]
        self.run = transitions.replay("r", self.facts)
        self.here, self.told = ALL, set[str]()
        self.due = self.over = False

    def record(self, *news: RunEvent) -> None:
        for fact in news:
            self.facts.append(fact)
            self.run = transitions.apply(self.run, fact)

    def threshold(self) -> int:
        assert self.run.cohort is not None
        return -(-2 * len(self.run.cohort.peers) // 3)

    def progress(self) -> Progress | None:
        if (cohort := self.run.cohort) is None:
            return None
        asked = cohort.survivors or cohort.sharers or cohort.peers
        answered = set(cohort.masked) if cohort.step == "mask" else self.told
        missing = [p for p in asked if p not in answered and self.run.peers.get(p) != "refused"]
        awaited = tuple(p for p in missing if p in self.here)
        needed = max(self.threshold(), needs(self.run))
        if cohort.survivors:
            needed = self.threshold()
        enough = len(answered & set(asked)) >= needed
        absent = frozenset(missing) - set(awaited)
        return Progress(
            len(answered), len(asked), needed, awaited, absent, enough, self.due, self.over
        )

    def decide(self) -> steps.Step:
        return decisions.decide(self.run, Observation(self.here, self.due, sum=self.progress()))

    def answer(self, peer: str) -> None:
        run, cohort = self.run, self.run.cohort
        if cohort is None:
            update = Update(digest=f"card {peer}", num_examples=ord(peer))
            self.record(run_events.UpdateAccepted(run.round, peer, update))
        elif cohort.step == "mask":
            self.record(run_events.MaskedUpdateAccepted(run.round, peer, f"masked {peer}", 4))
        else:
            self.told.add(peer)

    def do(self, step: steps.Step) -> None:
        run, cohort = self.run, self.run.cohort
        match step:
            case steps.OpenRound(number, base, eligible):
                self.record(run_events.RoundOpened(number, base, eligible))
            case steps.AskPeers(peers):
                self.record(run_events.PeersAsked(peers))
            case steps.CloseTraining(contributors):
                self.record(run_events.TrainingClosed(run.round, contributors))
            case steps.FixCohort():
                assert len(run.updates) >= 3
                kind = "evaluate" if run.evaluating else "train"
                peers = tuple(sorted(run.updates))
                self._next(run_events.CohortFixed(run.round, run.turn, kind, peers, "request"))
            case steps.FixSharers():
                sharers = tuple(sorted(self.told))
                self._next(run_events.SharersFixed(run.round, sharers, "shares"))
            case steps.FixSurvivors():
                assert cohort is not None
                self._next(run_events.SurvivorsFixed(run.round, tuple(sorted(cohort.masked))))
            case steps.LoseCohort(because):
                self._next(run_events.CohortLost(run.round, because))
            case steps.Aggregate(contributors):
                assert cohort is not None
                assert contributors == cohort.survivors == tuple(sorted(run.updates))
                assert len(contributors) >= run.spec.quorum
                digest = f"v{run.round}"
                self._next(
                    run_events.VersionCommitted(run.round, digest, run.head, contributors, {})
                )
            case steps.OpenEvaluation(eligible):
                self.record(run_events.EvaluationOpened(run.round, eligible))
            case steps.CloseRound():
                self._next(run_events.RoundClosed(run.round, {}, 1.0, 2, 3))
            case steps.EndRun(state, because):
                self.record(run_events.RunEnded(state, because))
        if not isinstance(step, steps.Wait):
            self.due = self.over = False

    def _next(self, event: RunEvent) -> None:
        self.told = set()
        self.record(event)

    def play(self, until: type[steps.Step]) -> steps.Step:  # type: ignore[valid-type]
        """All peers answer at once, until this step is decided."""
        for _ in range(100):
            step = self.decide()
            if isinstance(step, until):  # type: ignore[arg-type]
                return step
            self.do(step)
            if isinstance(step, steps.Wait):
                for peer in sorted(self.run.pending):
                    self.answer(peer)
        raise AssertionError(f"it decides {step}")


def test_a_round_goes_through_all_steps_and_the_run_finishes() -> None:
    loop = Loop()
    loop.play(steps.EndRun)
    kinds = [type(fact).__name__ for fact in loop.facts]
    sums = ["CohortFixed", "SharersFixed", *["MaskedUpdateAccepted"] * 4, "SurvivorsFixed"]
    training = ["RoundOpened", *["UpdateAccepted"] * 4, "TrainingClosed", *sums, "VersionCommitted"]
    evaluation = ["EvaluationOpened", *["UpdateAccepted"] * 4, *sums, "RoundClosed"]
    assert kinds[2:] == [*training, *evaluation] * 2
    stored = [run_events.decode(run_events.encode(fact)) for fact in loop.facts]
    assert transitions.replay("r", stored) == loop.run


def test_a_step_waits_for_online_peers_and_then_goes_on_without_them() -> None:
    loop = Loop()
    loop.play(steps.FixCohort)
    loop.do(loop.decide())
    for peer in "ABC":
        loop.answer(peer)
    waits = steps.Wait("secure: 3 of 4 peers have shared their keys, needs 3", ("D",))
    assert loop.decide() == waits
    loop.due = True
    assert loop.decide() == steps.FixSharers()
    loop.due = False
    loop.here -= {"D"}
    assert loop.decide() == steps.FixSharers(), "a lost peer is not awaited if others are enough"


def test_a_peer_that_refuses_a_step_is_left_out() -> None:
    loop = Loop()
    loop.play(steps.FixSharers)
    loop.do(loop.decide())
    for peer in "ABC":
        loop.answer(peer)
    assert isinstance(loop.decide(), steps.Wait)
    loop.record(run_events.UpdateRefused(1, "D", "secure_refused", "too few peers", "mask"))
    assert loop.run.refusal_texts == {"D": "too few peers"}
    assert loop.decide() == steps.FixSurvivors()
    loop.do(loop.decide())
    assert loop.run.contributors == ("A", "B", "C")
    loop.record(run_events.UpdateRefused(1, "A", "secure_refused", "no", "unmask"))
    assert loop.run.peers["A"] == "refused"


def test_a_sum_is_over_for_a_peer_that_is_not_asked_again() -> None:
    loop = Loop()

    def over(kind: Any = "train", **named: Any) -> str:
        told = {"run": "r", "round": 1, "turn": 0, "kind": kind, **named}
        return "".join(p for p in PEERS if is_over_for(loop.run, p, OpenSum(**told)))

    everyone = "".join(PEERS)
    assert over() == everyone, "the round has not begun"
    loop.play(steps.FixCohort)
    assert (over(), over("evaluate"), over(turn=1), over(round=2)) == ("", *[everyone] * 3)
    loop.do(loop.decide())
    for peer in "ABC":
        loop.answer(peer)
    assert over() == ""
    loop.due = True
    loop.do(loop.decide())
    assert over() == "D", "it has not shared"
    loop.due = False
    loop.play(steps.Aggregate)
    assert over() == "D"
    loop.do(loop.decide())
    assert over() == everyone
    loop.play(steps.CloseRound)
    assert (over(), over("evaluate")) == (everyone, "")
    loop.do(loop.decide())
    assert over("evaluate") == everyone
    loop.play(steps.EndRun)
    assert over(round=2) == over("evaluate", round=2) == everyone


def test_a_lost_cohort_is_trained_again_with_the_next_turn() -> None:
    loop = Loop()
    loop.play(steps.FixSurvivors)
    masked = {(p, f"masked {p}") for p in PEERS}
    assert accepted_uploads(loop.run) == masked | {(COHORT, "request"), (COHORT, "shares")}
    loop.do(loop.decide())
    loop.here = frozenset("A")
    assert isinstance(loop.decide(), steps.Wait)
    loop.answer("A")
    loop.due = True
    assert isinstance(loop.decide(), steps.Wait), "the others may come back"
    loop.over = True
    lost = loop.decide()
    assert lost == steps.LoseCohort("1 of 4 shares, and a sum needs 3")
    loop.do(lost)
    run = loop.run
    assert (run.state, run.round, run.turn, run.cohort) == (RunState.TRAINING, 1, 1, None)
    assert accepted_uploads(run) == set()
    loop.here = ALL
    assert loop.decide() == steps.AskPeers(PEERS)
    loop.play(steps.EndRun)
    assert loop.run.lost_cohorts == 0, "counted in each round"
    assert loop.run.turn == 1


def test_the_run_fails_after_too_many_lost_cohorts() -> None:
    loop = Loop()
    for _ in range(MAX_LOST_COHORTS):
        loop.play(steps.FixSharers)
        loop.do(steps.LoseCohort("x"))
    loop.play(steps.FixSharers)
    loop.told, loop.here, loop.over, loop.due = set(), frozenset(), True, True
    end = loop.decide()
    assert isinstance(end, steps.EndRun)
    assert end.state is RunState.FAILED
    assert "6 cohorts of round 1 were lost" in end.because
    assert "commonweight run resume r" in end.because


def test_a_lost_evaluation_closes_the_round_without_metrics() -> None:
    loop = Loop()
    loop.play(steps.OpenEvaluation)
    loop.do(loop.decide())
    for peer in PEERS:
        loop.answer(peer)
    loop.do(loop.decide())
    assert loop.run.cohort is not None
    loop.do(steps.LoseCohort("x"))
    assert (loop.run.state, loop.run.turn) == (RunState.EVALUATING, 0)
    assert loop.decide() == steps.CloseRound()


def test_fewer_than_three_evaluations_are_not_summed() -> None:
    loop = Loop()
    loop.play(steps.OpenEvaluation)
    loop.do(loop.decide())
    loop.answer("A")
    loop.answer("B")
    loop.due = True
    assert loop.decide() == steps.CloseRound()


def test_a_round_that_begins_again_has_another_turn() -> None:
    for event in (
        run_events.VersionLost("first", "first"),
        run_events.RecallBegun(True),
    ):
        loop = Loop()
        loop.play(steps.FixSharers)
        before = loop.run.turn
        loop.record(event)
        assert loop.run.turn > before
        assert loop.run.cohort is None
    loop.record(run_events.RunEnded(RunState.STOPPED, "x"), run_events.RunResumed())
    assert loop.run.turn > before + 2


def test_the_turn_of_plain_runs_stays_0() -> None:
    loop = Loop(secure=False)
    loop.record(run_events.RunEnded(RunState.STOPPED, "x"), run_events.RunResumed())
    assert loop.run.turn == 0


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_from_anywhere_the_run_ends_once_all_peers_answer(data: st.DataObject) -> None:
    """Peers come, go, answer, refuse; steps are repeated; deadlines pass."""
    loop = Loop(rounds=data.draw(st.integers(1, 2)))
    for _ in range(data.draw(st.integers(0, 60))):
        match data.draw(st.integers(0, 6)):
            case 0:
                loop.here = frozenset(data.draw(st.sets(st.sampled_from(PEERS))))
            case 1 if loop.run.pending:
                loop.answer(data.draw(st.sampled_from(loop.run.pending)))
            case 2 if loop.run.pending:
                peer = data.draw(st.sampled_from(loop.run.pending))
                kind = loop.run.kind
                loop.record(run_events.UpdateRefused(loop.run.round, peer, "no", "x", kind))
            case 3:
                loop.due = True
            case 4:
                loop.due = loop.over = True
            case 5:  # a restart forgets what is only in memory
                loop.told = set()
            case _:
                if not loop.run.ended:
                    loop.do(loop.decide())
        stored = [run_events.decode(run_events.encode(fact)) for fact in loop.facts]
        assert transitions.replay("r", stored) == loop.run
        assert msgspec.json.decode(msgspec.json.encode(loop.run), type=Run) == loop.run
    loop.here = ALL
    for _ in range(300):
        if loop.run.ended:
            break
        step = loop.decide()
        loop.do(step)
        if isinstance(step, steps.Wait):
            if loop.run.cohort is None:
                answered = list(loop.run.pending)[:1]
            else:
                answered = [p for p in loop.run.pending if p not in loop.told][:1]
            for peer in answered:
                loop.answer(peer)
            if not answered:
                loop.due = loop.over = True
    assert loop.run.ended, f"it waits for {loop.decide()}"
