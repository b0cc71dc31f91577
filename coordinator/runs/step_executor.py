"""Carries out the steps that `decisions.decide` returns, and records their events."""

from __future__ import annotations

from coordinator.runs import candidates, decisions, model_choice, retention, schema_agreement, steps
from coordinator.runs.parts import RunParts
from coordinator.runs.rounds import Rounds
from coordinator.runs.secure.sums import SecureSums
from coordinator.runs.state import Run
from coordinator.storage import run_events


class StepExecutor:
    """The steps of one run. `rounds` and `sums` carry out theirs."""

    def __init__(self, parts: RunParts, sums: SecureSums, rounds: Rounds) -> None:
        self._parts, self._ctx, self._sums, self._rounds = parts, parts.ctx, sums, rounds
        self._recorder, self._requests, self._timer = parts.recorder, parts.requests, parts.timer

    @property
    def _run(self) -> Run:
        return self._recorder.run

    async def execute(self, step: steps.Step) -> None:
        """Carry out a step and record its events. Waiting is for the loop."""
        record = self._recorder.record
        match step:
            case steps.AgreeSchema():
                await self._agree()
            case steps.ChooseModel():
                await record(model_choice.choose(self._run))
                self._parts.follow(self._run)
            case steps.BeginModel():
                await self._begin_model(step)
            case steps.FetchVersion(version):
                self._timer.open_phase()
                await record(run_events.VersionSought(version))
            case steps.KeepOwn():
                own = run_events.Holding(self._run.round, self._run.head)
                self._parts.model.set_version(own.digest)
                state = retention.state_of(self._run, own, self._ctx.store)
                await record(run_events.VersionRecalled(own, "backup", state))
            case steps.AskPeers(peers, opens_phase):
                self._open_phase_if(opens_phase)
                run = self._run
                self._requests.cancel(lambda r: r.peer in peers and r.is_of(run))
                await record(run_events.PeersAsked(peers))
            case steps.AssignWork(given):
                self._open_phase_if(False)
                await record(*given)
            case steps.OpenRound():
                await self._rounds.open(step)
            case steps.CloseTraining(contributors):
                await record(run_events.TrainingClosed(self._run.round, contributors))
            case steps.FixCohort():
                await self._sums.fix_cohort()
            case steps.FixSharers():
                await self._sums.fix_sharers()
            case steps.FixSurvivors():
                await self._sums.fix_survivors()
            case steps.LoseCohort(because):
                await self._sums.lose(because)
            case steps.Aggregate(contributors):
                await self._rounds.aggregate(contributors)
            case steps.OpenEvaluation(eligible):
                chosen = decisions.select_peers(self._run, self._run.round, eligible)
                asked = await self._requests.configure(self._run, chosen)
                self._timer.open_phase()
                await record(run_events.EvaluationOpened(self._run.round, asked))
            case steps.CloseRound():
                await self._rounds.close()
            case steps.EndRun(state, because):
                await record(run_events.RunEnded(state, because))

    async def _begin_model(self, step: steps.BeginModel) -> None:
        """Begin the run's next model. What was asked and sent for the one before is obsolete."""
        self._requests.cancel_all()
        self._requests.clear_work()
        await self._recorder.record(candidates.event(self._run, step))
        self._ctx.store.uploads.clear()
        self._recorder.incompatible.clear()  # peers decide again for another model
        self._parts.follow(self._run)
        self._timer.open_phase()

    async def _agree(self) -> None:
        agreement = schema_agreement.agree(self._run, self._parts.model.schema)
        await self._recorder.record(*agreement.events)
        for event in agreement.events:
            if isinstance(event, run_events.UpdateRefused):
                self._parts.tell_owner(event.peer, event.detail)
        for peer, text in agreement.notes:
            if peer:
                self._parts.tell_owner(peer, text)
            name = f"{self._ctx.name_of(peer)}: " if peer else ""
            self._recorder.report("warning", f"{name}{text}", peer)

    def _open_phase_if(self, opens_phase: bool) -> None:
        """Restart the deadline if it has passed, but not whenever a peer reconnects.

        A peer that comes and goes would delay the round for ever.
        """
        if opens_phase or self._parts.deadline_passed:
            self._timer.open_phase()
