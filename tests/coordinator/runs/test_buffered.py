"""The machine of buffered runs: whoever comes and goes, each update counts once or is refused."""

from __future__ import annotations

from collections import Counter

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from coordinator.runs import buffered, decisions, steps, transitions, validation
from coordinator.runs.decisions import Observation
from coordinator.runs.state import Assignment
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent, RunSpec, Update
from protocols.errors import UpdateRefused
from protocols.messages.states import RunState

PEERS = ("A", "B", "C", "D")
Key = tuple[str, int, int]


class Machine(RuleBasedStateMachine):
    """Hypothesis chooses who is next; a restart is a replay of what was written down."""

    @initialize(
        buffer=st.integers(1, 4), concurrency=st.integers(0, 3), staleness=st.integers(0, 3)
    )
    def begin(self, buffer: int, concurrency: int, staleness: int) -> None:
        spec = RunSpec(
            task="t",
            rounds=6,
            mode="buffered",
            buffer=buffer,
            concurrency=concurrency,
            max_staleness=staleness,
        )
        self.facts: list[RunEvent] = []
        self.run = transitions.replay("r", [run_events.RunStarted(spec)])
        self.facts.append(run_events.RunStarted(spec))
        self.here = set(PEERS)
        self.counted: Counter[Key] = Counter()
        self.summed: Counter[Key] = Counter()
        self.trained_on: dict[str, Assignment] = {}
        self.record(run_events.WeightsInitialised("v0", "file"))

    def record(self, *news: RunEvent) -> None:
        for fact in news:
            self.facts.append(fact)
            self.run = transitions.apply(self.run, fact)

    @rule(due=st.booleans(), count=st.integers(1, 8))
    def coordinator_works(self, due: bool, count: int) -> None:
        for _ in range(count):
            if not self.run.ended and not self.do(due):
                return

    def do(self, due: bool) -> bool:
        run, step = self.run, decisions.decide(self.run, Observation(frozenset(self.here), due))
        match step:
            case steps.OpenRound(number, base):
                self.record(run_events.RoundOpened(number, base, (), len(self.here)))
            case steps.AssignWork(given):
                assert given, "a step that does nothing would be done for ever"
                self.record(*given)
            case steps.CloseTraining(contributors):
                assert list(contributors) == [one.peer for one in buffered.in_order(run)]
                self.record(run_events.TrainingClosed(run.round, contributors))
            case steps.Aggregate(contributors):
                assert len(contributors) >= run.spec.buffer
                for one in run.buffer:
                    self.summed[one.peer, one.round, one.update.turn] += 1
                version = f"v{run.round}"
                self.record(
                    run_events.VersionCommitted(run.round, version, run.head, contributors, {})
                )
            case steps.OpenEvaluation(eligible):
                self.record(run_events.EvaluationOpened(run.round, eligible))
            case steps.CloseRound():
                self.record(run_events.RoundClosed(run.round, {}, 1.0, 0, 0))
            case steps.EndRun(state, because):
                self.record(run_events.RunEnded(state, because))
            case _:
                return False
        return True

    @rule(peer=st.sampled_from(PEERS), good=st.booleans())
    def peer_hands_in_its_training(self, peer: str, good: bool) -> None:
        if (
            self.run.state is RunState.AGGREGATING
            or (given := self.run.assignments.get(peer)) is None
        ):
            return
        if given.lost:
            return
        try:
            expected = validation.expected_reply(self.run, {}, peer, "train")
            if not good:
                raise UpdateRefused("not finite", "x")
        except UpdateRefused as err:
            self.record(run_events.UpdateRefused(given.round, peer, err.reason, "x", "train"))
            return
        assert expected.base == f"v{given.round - 1}"
        behind = buffered.staleness(self.run, given)
        assert 0 <= behind <= self.run.spec.max_staleness
        self.counted[peer, given.round, given.turn] += 1
        update = Update(
            digest=f"{peer}{given}",
            num_examples=1,
            base=given.base,
            turn=given.turn,
            staleness=behind,
        )
        self.record(run_events.UpdateAccepted(given.round, peer, update))

    @rule(peer=st.sampled_from(PEERS))
    def peer_evaluates(self, peer: str) -> None:
        if self.run.state is RunState.EVALUATING and peer in self.run.pending:
            update = Update(num_examples=1, metrics={"loss": 1.0})
            self.record(run_events.UpdateAccepted(self.run.round, peer, update))

    @rule(peer=st.sampled_from(PEERS))
    def peer_leaves_or_comes_back(self, peer: str) -> None:
        self.here ^= {peer}
        if peer not in self.here and not self.run.ended:
            self.record(run_events.PeerLost(peer, "went away"))

    @rule()
    def coordinator_is_started_again(self) -> None:
        again = transitions.replay("r", self.facts)
        assert again == self.run
        assert [run_events.decode(run_events.encode(fact)) for fact in self.facts] == self.facts

    @invariant()
    def no_update_counts_twice(self) -> None:
        if hasattr(self, "run"):
            assert all(times == 1 for times in (*self.counted.values(), *self.summed.values()))
            assert self.summed.keys() <= self.counted.keys()
            waiting = {(one.peer, one.round, one.update.turn) for one in self.run.buffer}
            if not self.run.ended:
                assert set(self.counted) == set(self.summed) | waiting

    @invariant()
    def no_more_work_at_a_time_than_they_may(self) -> None:
        if hasattr(self, "run") and (most := self.run.spec.concurrency):
            assert sum(not given.lost for given in self.run.assignments.values()) <= most

    def teardown(self) -> None:
        """Everybody is here and works: the run ends with its last version."""
        if not hasattr(self, "run"):
            return
        self.here = set(PEERS)
        for _ in range(400):
            if self.run.ended:
                break
            self.coordinator_works(True, 8)
            for peer in PEERS:
                self.peer_hands_in_its_training(peer, True)
                self.peer_evaluates(peer)
        assert self.run.state is RunState.FINISHED
        assert self.run.num_versions == self.run.spec.rounds or len(self.run.history) == 6


TestBuffered = Machine.TestCase
TestBuffered.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)


def test_the_discount_is_that_of_the_paper() -> None:
    assert [buffered.discount(n) for n in (0, 3, 8)] == [1.0, 0.5, 1 / 3]


def test_settings_that_nobody_can_train_with_end_a_buffered_run_before_its_first_version() -> None:
    why = ("agent failed", "usage: SCAFFOLD steers plain SGD only (momentum=0)")
    run = transitions.replay(
        "r",
        [
            run_events.RunStarted(RunSpec(task="t", rounds=2, mode="buffered", buffer=2)),
            run_events.WeightsInitialised("v0", "file"),
            run_events.RoundOpened(1, "v0", (), 2),
            *(run_events.WorkGiven(peer, 1, "v0") for peer in ("A", "B")),
            run_events.UpdateRefused(1, "A", *why, kind="train"),
        ],
    )
    here = frozenset({"A", "B"})
    assert isinstance(decisions.decide(run, Observation(here)), steps.Wait), "B may do better"
    refused = transitions.apply(run, run_events.UpdateRefused(1, "B", *why, kind="train"))
    told = "SCAFFOLD steers plain SGD only (momentum=0)"
    ended = steps.EndRun(RunState.FAILED, f"no peer could train: {told}")
    assert decisions.decide(refused, Observation(here)) == ended
    newcomer = decisions.decide(refused, Observation(here | {"C"}))
    assert newcomer == steps.AssignWork((run_events.WorkGiven("C", 1, "v0"),))
    # One peer makes all updates of a version, so it is enough.
    update = Update(digest="u", num_examples=1, base="v0")
    one = transitions.apply(run, run_events.UpdateAccepted(1, "B", update))
    assert isinstance(decisions.decide(one, Observation(here)), steps.AssignWork)
