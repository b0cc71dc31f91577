"""The objects that the loop of a run, its rounds and its secure sums share."""

from __future__ import annotations

from dataclasses import dataclass

from flwr.serverapp.strategy import Strategy

from coordinator import strategies
from coordinator.runs import decisions
from coordinator.runs.context import RunContext
from coordinator.runs.model import RunModel
from coordinator.runs.recorder import RunRecorder
from coordinator.runs.requests import PendingRequests
from coordinator.runs.state import Run
from coordinator.runs.timing import PhaseTimer
from coordinator.strategies.adapter import StrategyAdapter
from protocols.codecs import registry
from protocols.privacy.secagg.messages import ring_of


@dataclass
class RunParts:
    """The parts of one run. `follow` changes those that depend on its settings."""

    ctx: RunContext
    adapter: StrategyAdapter
    strategy: Strategy
    model: RunModel
    timer: PhaseTimer
    recorder: RunRecorder
    requests: PendingRequests

    @classmethod
    def create(cls, run: Run, ctx: RunContext) -> RunParts:
        """Raises CommonweightError if the run's strategy cannot be made."""
        adapter, strategy, model = _made(run, ctx)
        timer = PhaseTimer()
        requests = PendingRequests(ctx, adapter, strategy, model, run.late)
        recorder = RunRecorder(run, ctx, timer)
        return cls(ctx, adapter, strategy, model, timer, recorder, requests)

    def follow(self, run: Run) -> None:
        """Continue with the settings of this run, before round 1. Raises CommonweightError."""
        self.adapter, self.strategy, self.model = _made(run, self.ctx)
        self.requests.use(self.adapter, self.strategy, self.model)

    @property
    def deadline_passed(self) -> bool:
        """True if the phase of the run is longer than its deadline."""
        return self.timer.phase_s >= decisions.phase_deadline_s(self.recorder.run)

    def tell_owner(self, peer: str, text: str) -> None:
        """Tell the owner of a peer what concerns them of this run."""
        self.ctx.tell_owner(peer, f"run {self.recorder.run.id}: {text}")


def _made(run: Run, ctx: RunContext) -> tuple[StrategyAdapter, Strategy, RunModel]:
    adapter = strategies.find(run.spec.strategy)
    ring_bits = ring_of(run.spec.work_codec) if run.spec.secure else 0
    model = RunModel(ctx.transfer, registry.parse(run.spec.codec), ring_bits)
    return adapter, adapter.make(run.spec.strategy_args), model
