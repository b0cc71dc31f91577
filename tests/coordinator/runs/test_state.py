"""The run as a machine: whatever peers and clocks do, its promises hold and it comes to an end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from msgspec.structs import replace

from coordinator.cli import run_text
from coordinator.fleet.state import Fleet
from coordinator.fleet.state import Run as FleetRun
from coordinator.runs import decisions, steps, transitions
from coordinator.runs.comparisons import why_no_evaluations
from coordinator.runs.decisions import Observation
from coordinator.runs.state import Evaluation, Round, Run
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent, RunSpec, Update
from protocols.messages.comparisons import Comparison, Estimate
from protocols.messages.envelope import Metrics, RunChanged
from protocols.messages.states import ENDED, RunState
from protocols.model import schema_card
from protocols.tables.model_scores import MODELS, ModelScores

PEERS = ("A", "B", "C", "D")
ALL = frozenset(PEERS)


class Loop:
    """What the run loop does with a run, without network, disk or clock."""

    def __init__(self, spec: RunSpec) -> None:
        self.facts: list[RunEvent] = [run_events.RunStarted(spec)]
        self.run = transitions.replay("r", self.facts)
        self.here: frozenset[str] = frozenset()
        self.due = False
        self.accepted: set[str] = set()

    def record(self, *news: RunEvent) -> None:
        for fact in news:
            self.facts.append(fact)
            self.run = transitions.apply(self.run, fact)

    def lose(self, peer: str) -> None:
        self.here -= {peer}
        if peer in self.run.pending:
            self.record(run_events.PeerLost(peer, "went away"))

    def answer(self, peer: str, examples: int = 1) -> None:
        """A good answer of a peer that was asked."""
        if self.run.state is RunState.WAITING:
            self.record(run_events.WeightsInitialised("first", peer))
            return
        if self.run.state is RunState.TRAINING:
            self.accepted.add(peer)
        update = Update(digest=f"u{peer}", num_examples=examples, metrics={"loss": 1.0}, norm=0.5)
        self.record(run_events.UpdateAccepted(self.run.round, peer, update))

    def refuse(self, peer: str, reason: str = "not finite", detail: str = "x") -> None:
        self.record(run_events.UpdateRefused(self.run.round, peer, reason, detail, self.run.kind))

    def decide(self) -> steps.Step:
        return decisions.decide(self.run, Observation(self.here, self.due))

    def do(self, step: steps.Step) -> None:
        run = self.run
        match step:
            case steps.Wait():
                pass
            case steps.AskPeers(peers):
                self.due = False
                self.record(run_events.PeersAsked(peers))
            case steps.OpenRound(number, base, eligible):
                assert number == run.round + 1
                assert len(eligible) >= run.spec.quorum
                self.due, self.accepted = False, set()
                self.record(run_events.RoundOpened(number, base, eligible))
            case steps.CloseTraining(contributors):
                assert len(contributors) >= run.spec.quorum
                assert set(contributors) <= self.accepted
                assert list(contributors) == sorted(contributors)
                self.record(run_events.TrainingClosed(run.round, contributors))
            case steps.Aggregate(contributors):
                assert contributors == run.contributors
                digest = f"v{run.round}"
                self.record(
                    run_events.VersionCommitted(run.round, digest, run.head, contributors, {})
                )
            case steps.OpenEvaluation(eligible):
                self.due = False
                self.record(run_events.EvaluationOpened(run.round, eligible))
            case steps.CloseRound():
                metrics: Metrics = {"accuracy": 1.0 / run.round} if run.updates else {}
                self.record(run_events.RoundClosed(run.round, metrics, 1.0, 2, 3))
            case steps.EndRun(state, because):
                self.record(run_events.RunEnded(state, because))


class RunMachine(RuleBasedStateMachine):
    """Peers come and go, answer, fail and dawdle; deadlines pass; the loop does what is decided."""

    @initialize(
        rounds=st.integers(1, 3),
        quorum=st.integers(1, len(PEERS)),
        select=st.sampled_from([0.0, 1.0, 1.5]),
    )
    def start(self, rounds: int, quorum: int, select: float) -> None:
        self.loop = Loop(RunSpec(task="t", rounds=rounds, quorum=quorum, select=select))
        self.last_round = 0

    @rule(peer=st.sampled_from(PEERS))
    def comes(self, peer: str) -> None:
        self.loop.here |= {peer}

    @rule(peer=st.sampled_from(PEERS))
    def goes(self, peer: str) -> None:
        self.loop.lose(peer)

    @rule(count=st.integers(1, 5))
    def steps(self, count: int) -> None:
        for _ in range(count):
            if not self.loop.run.ended:
                self.loop.do(self.loop.decide())

    @precondition(lambda self: self.loop.run.pending)
    @rule(data=st.data(), examples=st.integers(1, 9))
    def answers(self, data: st.DataObject, examples: int) -> None:
        self.loop.answer(data.draw(st.sampled_from(self.loop.run.pending)), examples)

    @precondition(lambda self: self.loop.run.pending)
    @rule(data=st.data())
    def is_refused(self, data: st.DataObject) -> None:
        self.loop.refuse(data.draw(st.sampled_from(self.loop.run.pending)))

    @rule(peer=st.sampled_from(PEERS), kind=st.sampled_from(["train", "evaluate", "init"]))
    def answers_an_old_question(self, peer: str, kind: str) -> None:
        """Too late, and no verdict on the present question."""
        run = self.loop.run
        number = run.round if kind != run.kind else run.round - 1
        self.loop.record(run_events.UpdateRefused(number, peer, "late", "x", kind))
        assert self.loop.run.pending == run.pending

    @rule()
    def deadline_passes(self) -> None:
        self.loop.due = True

    @precondition(lambda self: self.loop.run.round > 1)
    @rule()
    def is_stopped(self) -> None:
        self.loop.record(run_events.RunEnded(RunState.STOPPED, "by the operator"))

    @precondition(lambda self: self.loop.run.state is RunState.STOPPED)
    @rule()
    def goes_on(self) -> None:
        """What was committed stays; a round that was cut off begins again."""
        before = self.loop.run
        self.loop.record(run_events.RunResumed())
        assert self.loop.run.head == before.head
        assert self.loop.run.history == before.history
        assert not self.loop.run.ended
        self.last_round = self.loop.run.round

    @invariant()
    def a_replay_gives_the_same_run(self) -> None:
        if hasattr(self, "loop"):
            stored = [run_events.decode(run_events.encode(fact)) for fact in self.loop.facts]
            assert transitions.replay("r", stored) == self.loop.run

    @invariant()
    def rounds_only_go_on(self) -> None:
        if not hasattr(self, "loop"):
            return
        run = self.loop.run
        assert self.last_round <= run.round <= run.spec.rounds
        self.last_round = run.round
        assert [closed.round for closed in run.history] == list(range(1, len(run.history) + 1))
        assert all(len(closed.contributors) >= run.spec.quorum for closed in run.history)

    @invariant()
    def who_is_counted_was_accepted(self) -> None:
        if hasattr(self, "loop") and self.loop.run.state in (
            RunState.AGGREGATING,
            RunState.EVALUATING,
        ):
            assert set(self.loop.run.contributors) <= self.loop.accepted

    @invariant()
    def something_is_always_decided(self) -> None:
        if hasattr(self, "loop"):
            step = self.loop.decide()
            assert not isinstance(step, steps.Wait) or step.what

    def teardown(self) -> None:
        """From wherever it stands: with all peers there and answering, the run ends."""
        if not hasattr(self, "loop"):
            return
        loop = self.loop
        loop.here = ALL
        for _ in range(20 * loop.run.spec.rounds + 20):
            if loop.run.ended:
                break
            step = loop.decide()
            loop.do(step)
            if isinstance(step, steps.Wait):
                if loop.run.pending:
                    loop.answer(loop.run.pending[0])
                else:
                    loop.due = True
        assert loop.run.ended, f"it waits for {loop.decide()}"
        if loop.run.state is RunState.FINISHED:
            assert len(loop.run.history) == loop.run.spec.rounds


TestRuns = RunMachine.TestCase
TestRuns.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


# --- what is remembered of single peers ---


def play_round(loop: Loop, *, evaluated_by: tuple[str, ...]) -> None:
    """A round with A and B, in which these peers evaluate the version."""
    loop.here, number = frozenset("AB"), loop.run.round + 1
    while len(loop.run.history) < number:
        loop.do(loop.decide())
        for peer in loop.run.pending:
            if not loop.run.evaluating or peer in evaluated_by:
                loop.answer(peer, examples=number)
            else:
                loop.record(run_events.PeerLost(peer, "went away"))


def test_a_run_keeps_the_last_evaluation_of_each_peer_in_a_closed_round() -> None:
    loop = Loop(RunSpec(task="t", rounds=3, quorum=2))
    assert why_no_evaluations(loop.run) == "no peer has evaluated a version of this run yet"
    play_round(loop, evaluated_by=("A", "B"))
    first = Evaluation(1, 1, {"loss": 1.0})
    assert loop.run.evaluations == {"A": first, "B": first}
    play_round(loop, evaluated_by=("A",))
    assert loop.run.evaluations == {"A": Evaluation(2, 2, {"loss": 1.0}), "B": first}
    assert why_no_evaluations(loop.run) == ""
    loop.record(run_events.VersionLost("v2", "v1"))
    assert loop.run.evaluations == {"B": first}


def test_a_run_with_noise_says_why_it_knows_no_evaluation() -> None:
    noisy = Loop(RunSpec(task="tabular", rounds=3, dp_epsilon=1.0)).run
    assert "adds noise to updates" in why_no_evaluations(noisy)
    closed = Round(round=1, digest="v1", metrics={"loss": 1.0}, num_evaluated=9)
    together = replace(Loop(RunSpec(task="t", rounds=3)).run, history=(closed,))
    assert "are not known" in why_no_evaluations(together)


# --- single decisions ------------------------------------------------------------------------


def training(quorum: int = 2, asked: tuple[str, ...] = ("A", "B")) -> Loop:
    loop = Loop(RunSpec(task="t", rounds=3, quorum=quorum))
    loop.record(
        run_events.WeightsInitialised("first", "file"), run_events.RoundOpened(1, "first", asked)
    )
    loop.here = frozenset(asked)
    return loop


def test_a_round_goes_on_with_the_quorum_when_the_deadline_has_passed() -> None:
    loop = training(quorum=1)
    loop.answer("A")
    assert isinstance(loop.decide(), steps.Wait)
    loop.due = True
    assert loop.decide() == steps.CloseTraining(("A",))


def test_it_does_not_go_on_below_the_quorum() -> None:
    loop = training()
    loop.answer("A")
    loop.due = True
    # B's question may have been lost; one that is at work on it answers at once when it is done.
    assert loop.decide() == steps.AskPeers(("B",))
    loop.here = frozenset()
    assert loop.decide() == steps.Wait("the quorum: 1 of 2; the deadline has passed")


def test_without_the_quorum_in_time_whoever_is_there_is_asked() -> None:
    """B is there and hangs for ever; C came after the round was opened."""
    loop = training()
    loop.answer("A")
    loop.here |= {"C"}
    assert isinstance(loop.decide(), steps.Wait)
    loop.due = True
    assert loop.decide() == steps.AskPeers(("B", "C"))
    loop.do(loop.decide())
    loop.answer("C")
    loop.due = True
    assert loop.decide() == steps.CloseTraining(("A", "C"))


def test_who_failed_may_try_again_after_a_deadline() -> None:
    loop = training()
    loop.answer("A")
    loop.refuse("B")
    assert loop.decide() == steps.Wait("1 more peer for the quorum")
    loop.due = True
    assert loop.decide() == steps.AskPeers(("B",))


def test_settings_that_nobody_can_train_with_end_the_run_in_its_first_round() -> None:
    why = ("agent failed", "usage: SCAFFOLD steers plain SGD only (momentum=0)")
    loop = training()
    loop.refuse("A", *why)
    assert isinstance(loop.decide(), steps.Wait)  # B may do better
    loop.refuse("B", *why)
    told = "SCAFFOLD steers plain SGD only (momentum=0)"
    ended = steps.EndRun(RunState.FAILED, f"no peer could train: {told}")
    assert loop.decide() == ended
    loop.here |= {"C"}
    assert loop.decide() == steps.AskPeers(("C",))
    # What else goes wrong may go right the next time.
    other = training()
    other.refuse("A", *why)
    other.refuse("B", "agent failed", "the trainer: task")
    assert isinstance(other.decide(), steps.Wait)


def test_too_few_peers_that_can_train_end_the_run_once_no_peer_is_absent() -> None:
    why = ("upload_refused", "the coordinator refuses the upload: it has 9 bytes")
    loop = training()
    loop.answer("A")
    loop.refuse("B", *why)
    absent = Observation(loop.here, absent=frozenset({"C"}))
    assert isinstance(decisions.decide(loop.run, absent), steps.Wait), "C may come"
    because = f"only 1 peer could train: {why[1]}"
    assert loop.decide() == steps.EndRun(RunState.FAILED, because)


def test_a_lost_peer_is_asked_again_when_it_is_back() -> None:
    loop = training()
    loop.answer("A")
    loop.lose("B")
    assert loop.decide() == steps.Wait("1 more peer for the quorum")
    loop.here |= {"B"}
    assert loop.decide() == steps.AskPeers(("B",))


def test_the_round_does_not_wait_for_lost_peers_once_the_quorum_is_there() -> None:
    loop = training(quorum=1)
    loop.answer("A")
    loop.lose("B")
    assert loop.decide() == steps.CloseTraining(("A",))


def test_another_peer_makes_the_first_weights_when_one_cannot_or_hangs() -> None:
    loop = Loop(RunSpec(task="t", rounds=1))
    assert loop.decide() == steps.Wait("a peer that can make the first weights")
    loop.here = frozenset("ABC")
    assert loop.decide() == steps.AskPeers(("A",), opens_phase=True)
    loop.do(loop.decide())
    assert loop.decide() == steps.Wait("the first weights from 1 peer", ("A",))
    loop.refuse("A")
    assert loop.decide() == steps.AskPeers(("B",), opens_phase=True)
    loop.do(loop.decide())
    loop.due = True
    assert loop.decide() == steps.AskPeers(("A", "B", "C"))


def test_a_late_answer_does_not_settle_the_present_question() -> None:
    """A's answer to round 1 arrives in round 2, where A has been asked again."""
    loop = training(quorum=1)
    loop.answer("B")
    loop.due = True
    while loop.run.round < 2:
        step = loop.decide()
        loop.do(step)
        if isinstance(step, steps.Wait):
            loop.answer(loop.run.pending[0])
    assert loop.run.peers["A"] == "asked"
    loop.record(run_events.UpdateRefused(1, "A", "late", "x", "train"))
    assert loop.run.peers["A"] == "asked"
    assert loop.run.refused == 1
    loop.refuse("A")
    assert loop.run.peers["A"] == "refused"


def test_who_follows_a_run_hears_of_the_refusals_of_every_round() -> None:
    loop = training(quorum=1)
    progress = run_text.Progress()

    def step() -> run_text.Step:
        return progress.step(loop.run, lambda: Fleet(fleet="f"))

    loop.refuse("A", "not finite")
    assert step().refusals == ("refused A: not finite: x",)
    assert not any(step()[1:]), "nothing is told twice"
    loop.answer("B")
    loop.due = True
    while loop.run.round < 2:
        decided = loop.decide()
        loop.do(decided)
        if isinstance(decided, steps.Wait):
            loop.answer(loop.run.pending[0])
    assert [closed.round for closed in step().closed] == [1]
    loop.refuse("B", "too large")
    assert step().refusals == ("refused B: too large: x",)


def test_rounds_of_the_model_before_come_before_the_line_of_the_next_one() -> None:
    run = replace(training().run, spec=RunSpec(task="t", rounds=9, first_round=4))
    closed = tuple(Round(round=n, digest=f"{n}", metrics={"loss": 1.0}) for n in (1, 2, 4))
    step = run_text.Step(run, (), closed, ("waits",), ("model: mlp now, 2 of 3",))
    told = [line.split(" loss")[0] for line in step.lines()]
    assert told == ["round 1/9", "round 2/9", "model: mlp now, 2 of 3", "round 4/9", "waits"]


def test_rounds_between_two_evaluations_are_no_lines_of_their_own() -> None:
    spec = RunSpec(task="t", rounds=9, evaluate_every=3)
    evaluated = {1: {"loss": 2.0}, 4: {"loss": 1.0}}
    rounds = tuple(Round(round=n, digest=f"{n}", metrics=evaluated.get(n, {})) for n in range(1, 6))
    run = replace(training().run, spec=spec, history=rounds)
    told = [line.split(" loss")[0] for line in run_text.Step(run, (), rounds, ()).lines()]
    assert told == ["round 1/9", "round 4/9"]
    never = replace(run, history=tuple(replace(one, metrics={}) for one in rounds))
    assert len(list(run_text.Step(never, (), never.history, ()).lines())) == 5


def test_who_follows_a_run_reads_what_it_waits_for_before_round_1() -> None:
    run, progress = training().run, run_text.Progress()
    assert run.pending, "its peers have work"
    changed = RunChanged(
        run=run.id,
        task="t",
        state=RunState.WAITING,
        round=0,
        rounds=3,
        quorum=2,
        waiting_for="a comparison of models",
    )
    fleet = Fleet(fleet="f", runs={run.id: FleetRun(changed=changed, changed_at=0.0)})
    steps = [progress.step(replace(run, state=RunState.WAITING), lambda: fleet) for _ in range(9)]
    told = [step.waits for step in steps if step.waits]
    assert told == [("waits for a comparison of models",)]


def test_a_run_that_failed_shows_the_last_refusal_once() -> None:
    loop = training(quorum=1)
    loop.refuse("A", "not finite")
    loop.record(run_events.RunEnded(RunState.FAILED, f"no peer: {loop.run.last_refusal}"))
    for texts in ({"A": loop.run.last_refusal}, {"C": "another reason"}):
        run = replace(loop.run, refusal_texts=texts)
        shown = "\n".join(run_text.describe(run, Fleet(fleet="f")))
        assert "because no peer" in shown
        assert shown.count(run.last_refusal) == 1


def test_nobody_there_to_evaluate_closes_the_round() -> None:
    loop = training(quorum=1, asked=("A",))
    loop.answer("A")
    for _ in range(2):
        loop.do(loop.decide())
    loop.here = frozenset()
    assert loop.run.state is RunState.EVALUATING
    assert loop.decide() == steps.CloseRound()


def test_who_selects_asks_a_few_more_than_it_needs_and_goes_on_at_the_quorum() -> None:
    loop = Loop(RunSpec(task="t", rounds=9, quorum=2, select=1.5, seed=7))
    loop.record(run_events.WeightsInitialised("first", "file"))
    run = loop.run
    chosen = decisions.select_peers(run, 1, ALL)
    assert len(chosen) == 3
    assert chosen == decisions.select_peers(run, 1, reversed(PEERS))  # of who is there, and no more
    rounds = [decisions.select_peers(run, number, ALL) for number in range(1, 40)]
    assert set().union(*rounds) == ALL
    loop.record(run_events.RoundOpened(1, "first", chosen))
    loop.here = ALL
    loop.answer(chosen[0])
    assert loop.decide() == steps.Wait("updates of 2 peers", chosen[1:])
    loop.answer(chosen[2])
    assert loop.decide() == steps.CloseTraining((chosen[0], chosen[2]))


def test_who_selects_replaces_the_lost_and_asks_nobody_else() -> None:
    loop = Loop(RunSpec(task="t", rounds=9, quorum=2, select=1.0))
    asked = decisions.select_peers(loop.run, 1, ALL)
    loop.record(
        run_events.WeightsInitialised("first", "file"), run_events.RoundOpened(1, "first", asked)
    )
    loop.here = ALL
    loop.answer(asked[0])
    loop.lose(asked[1])
    step = loop.decide()
    assert isinstance(step, steps.AskPeers)
    assert len(step.peers) == 1
    assert step.peers[0] not in asked


def answered(loop: Loop, peer: str, seconds: float) -> None:
    update = Update(digest=f"u{peer}", num_examples=1, seconds=seconds)
    loop.record(run_events.UpdateAccepted(loop.run.round, peer, update))


def test_an_automatic_deadline_is_twice_what_the_slowest_needed() -> None:
    loop = Loop(RunSpec(task="t", rounds=9, quorum=2, deadline="auto", deadline_s=600.0))
    first = run_events.WeightsInitialised("first", "file")
    loop.record(first, run_events.RoundOpened(1, "first", ("A", "B")))
    answered(loop, "A", 10.0)
    assert decisions.phase_deadline_s(loop.run) == 600.0  # nobody knows what B needs
    answered(loop, "B", 30.0)
    assert decisions.phase_deadline_s(loop.run) == 60.0
    for _ in range(5):  # what was long ago is forgotten
        answered(loop, "B", 1.0)
        answered(loop, "A", 1.0)
    assert decisions.phase_deadline_s(loop.run) == 5.0
    late = run_events.UpdateRefused(1, "B", "late", "x", "train", 400.0)
    loop.record(late)  # one that was too slow is given time
    assert decisions.phase_deadline_s(loop.run) == 600.0


def test_a_run_that_was_stopped_goes_on_where_it_was() -> None:
    loop = training(quorum=1, asked=("A",))
    loop.answer("A")
    loop.do(loop.decide())
    loop.do(loop.decide())
    assert loop.run.state is RunState.EVALUATING
    loop.record(run_events.RunEnded(RunState.STOPPED, "x"), run_events.RunResumed())
    assert loop.decide() == steps.OpenEvaluation(("A",))  # the version is there
    loop.do(steps.CloseRound())
    loop.do(loop.decide())
    loop.answer("A")
    loop.record(run_events.RunEnded(RunState.FAILED, "x"), run_events.RunResumed())
    assert loop.decide() == steps.OpenRound(2, loop.run.head, ("A",))  # the round is not


def test_the_first_of_equals_stays_best() -> None:
    loop = training(quorum=1, asked=("A",))
    for number in (1, 2):
        if number > 1:
            loop.record(run_events.RoundOpened(number, loop.run.head, ("A",)))
        loop.answer("A")
        loop.do(loop.decide())
        loop.do(loop.decide())
        loop.record(run_events.RoundClosed(number, {"accuracy": 0.5}, 1.0, 0, 0))
    assert loop.run.best is not None
    assert loop.run.best.round == 1


_ONE = st.sampled_from(PEERS)
_SOME = st.lists(_ONE, unique=True).map(tuple)
CARD = schema_card.make_card("t", "1", {})
_HELD = st.builds(run_events.Holding, st.integers(-1, 3), st.sampled_from(["x", "y"]))
COMPARED = Comparison(run="r", metric="loss", rows=9, models={"shared": Estimate(1, 1, 1)})
FACTS: dict[type, Callable[[st.DrawFn], Any]] = {
    run_events.PeerDescribed: lambda d: run_events.PeerDescribed("A", CARD),
    run_events.PreprocessingFixed: lambda d: run_events.PreprocessingFixed("{}", ("A",)),
    run_events.ModelsCompared: lambda d: run_events.ModelsCompared(d(_ONE), ModelScores(rows=9)),
    run_events.ScoresMissing: lambda d: run_events.ScoresMissing(d(_ONE), "x", "y"),
    run_events.ModelChosen: lambda d: run_events.ModelChosen(
        model="linear", spec=RunSpec(task="t", rounds=2), then=d(st.sampled_from([(), ("mlp",)]))
    ),
    run_events.ModelBegun: lambda d: run_events.ModelBegun(
        d(st.sampled_from(MODELS)),
        RunSpec(task="t", rounds=2, settings={"model": d(st.sampled_from(MODELS))}),
        d(st.integers(-1, 3)),
    ),
    run_events.SchemaAgreed: lambda d: run_events.SchemaAgreed(CARD),
    run_events.WeightsInitialised: lambda d: run_events.WeightsInitialised("x", "A"),
    run_events.RoundOpened: lambda d: run_events.RoundOpened(d(st.integers(-1, 3)), "x", d(_SOME)),
    run_events.WorkGiven: lambda d: run_events.WorkGiven(d(_ONE), 1, "x", d(st.integers(0, 2))),
    run_events.PeersAsked: lambda d: run_events.PeersAsked(d(_SOME)),
    run_events.WorkGiven: lambda d: run_events.WorkGiven(d(_ONE), d(st.integers(-1, 3)), "x"),
    run_events.PeerLost: lambda d: run_events.PeerLost(d(_ONE), "x"),
    run_events.UpdateAccepted: lambda d: run_events.UpdateAccepted(
        1, d(_ONE), Update(num_examples=1)
    ),
    run_events.UpdateRefused: lambda d: run_events.UpdateRefused(1, d(_ONE), "x", "x"),
    run_events.TrainingClosed: lambda d: run_events.TrainingClosed(1, d(_SOME)),
    run_events.PrivacySpent: lambda d: run_events.PrivacySpent(1, 2.0, 1.0, 3),
    run_events.CohortFixed: lambda d: run_events.CohortFixed(
        1, d(st.integers(0, 1)), d(st.sampled_from(["train", "evaluate"])), d(_SOME), "c"
    ),
    run_events.SharersFixed: lambda d: run_events.SharersFixed(1, d(_SOME), "s"),
    run_events.MaskedUpdateAccepted: lambda d: run_events.MaskedUpdateAccepted(1, d(_ONE), "m", 4),
    run_events.SurvivorsFixed: lambda d: run_events.SurvivorsFixed(1, d(_SOME)),
    run_events.CohortLost: lambda d: run_events.CohortLost(1, "x"),
    run_events.VersionCommitted: lambda d: run_events.VersionCommitted(1, "x", "y", d(_SOME), {}),
    run_events.VersionLost: lambda d: run_events.VersionLost("x", d(st.sampled_from(["x", "y"]))),
    run_events.EvaluationOpened: lambda d: run_events.EvaluationOpened(1, d(_SOME)),
    run_events.RoundClosed: lambda d: run_events.RoundClosed(1, {}, 1.0, 0, 0),
    run_events.RunEnded: lambda d: run_events.RunEnded(d(st.sampled_from(sorted(ENDED))), "x"),
    run_events.RunResumed: lambda d: run_events.RunResumed(),
    run_events.PeerCompared: lambda d: run_events.PeerCompared(d(_ONE), COMPARED),
    run_events.RunDeleted: lambda d: run_events.RunDeleted(),
    run_events.RecallBegun: lambda d: run_events.RecallBegun(d(st.booleans())),
    run_events.HoldingTold: lambda d: run_events.HoldingTold(d(_ONE), d(st.none() | _HELD)),
    run_events.VersionSought: lambda d: run_events.VersionSought(d(_HELD)),
    run_events.VersionRecalled: lambda d: run_events.VersionRecalled(d(_HELD), "A"),
}


@given(st.data())
def test_any_facts_in_any_order_can_be_replayed(data: st.DataObject) -> None:
    """A ledger is only read here: it may be odd, but never the end of the coordinator."""
    run = Run(id="r", spec=RunSpec(task="t", rounds=2))
    for kind in data.draw(st.lists(st.sampled_from(list(FACTS)), max_size=20)):
        before = run
        run = transitions.apply(run, FACTS[kind](data.draw))
        if before.ended and kind not in (run_events.RunResumed, run_events.RecallBegun):
            known = {"deleted": run.deleted, "comparisons": run.comparisons}
            known["num_compared"] = len(run.comparisons)
            assert run == replace(before, **known)
        decisions.decide(run, Observation(ALL, data.draw(st.booleans())))
        decisions.decide(run, Observation(frozenset(), data.draw(st.booleans())))


def test_every_fact_has_a_transition_and_only_two_leave_an_end() -> None:
    assert set(FACTS) == set(transitions.TRANSITIONS)
    after = {kind for kind, (states, _) in transitions.TRANSITIONS.items() if states & ENDED}
    stays = {run_events.RunDeleted, run_events.PeerCompared}
    assert after == {run_events.RunResumed, run_events.RecallBegun} | stays
    stopped = Run(id="r", spec=RunSpec(task="t", rounds=2), state=RunState.STOPPED)
    assert transitions.apply(stopped, run_events.RunDeleted()).ended
    compared = transitions.apply(stopped, run_events.PeerCompared("p", COMPARED))
    assert compared.ended
    assert compared.comparisons == {"p": COMPARED}
    assert transitions.apply(compared, run_events.RunResumed()).comparisons == {}
    assert RunState.FINISHED not in transitions.TRANSITIONS[run_events.RunResumed][0]


@pytest.mark.parametrize("state", sorted(ENDED))
def test_an_ended_run_decides_nothing(state: RunState) -> None:
    run = Run(id="r", spec=RunSpec(task="t", rounds=2), state=state)
    assert isinstance(decisions.decide(run, Observation(ALL, True)), steps.Wait)


def test_the_api_sends_runs_with_the_field_names_that_older_versions_know() -> None:
    sent = msgspec.json.decode(msgspec.json.encode(Run(id="r", spec=RunSpec(task="t", rounds=1))))
    assert set(sent) == (
        {"id", "spec", "since", "state", "round", "first", "head", "parent", "described", "card"}
        | {"preprocessing", "eligible", "peers", "updates", "contributors", "evaluating", "refused"}
        | {"refusals", "last_refusal", "last_refused", "norms", "history", "best", "needed"}
        | {"strategy_state", "recalling", "whole", "holdings", "sought", "given", "last", "buffer"}
        | {"resting", "excluded", "staleness", "num_examples", "ended_in", "ended_because"}
        | {"deleted", "refusal_kinds", "refusal_texts", "on_time", "abandoned", "declared"}
        | {"limited", "limited_now", "surveyed", "evaluations", "num_asked", "num_spent", "late"}
        | {"cohort", "turn", "lost_cohorts", "comparisons", "scores", "scores_missing", "choice"}
        | {"num_compared", "standing", "trained", "upcoming", "ordered"}
    )
