"""Where runs, their rounds and jobs stand, as the monitors are told. Pure."""

from __future__ import annotations

from itertools import islice

from coordinator import runs
from coordinator.jobs import Job
from coordinator.runs import Run
from protocols import messages
from protocols.messages import JobChanged, RunChanged, printable
from protocols.states import RunState

#: Reasons that go into one message.
_EXCUSED_TOLD = 8


def run_body(run: Run, waiting_for: str, memory_bytes: int = 0) -> RunChanged:
    """Where a run stands, as the monitor is told."""
    answered = sum(standing == "answered" for standing in run.peers.values())
    return RunChanged(
        run=run.id,
        task=run.spec.task,
        # A buffered run evaluates one version and trains for the next at the same time.
        state=RunState.TRAINING if run.buffered and run.state is RunState.EVALUATING else run.state,
        round=run.round,
        rounds=run.spec.rounds,
        quorum=run.spec.buffer or run.spec.quorum,
        asked=len(run.given) if run.buffered else len(run.peers),
        answered=len(run.buffer) if run.buffered else answered,
        waiting_for="" if run.ended else waiting_for,
        head=run.head,
        best_round=run.best.round if run.best else 0,
        ended_because=printable(run.ended_because),
        memory_bytes=memory_bytes,
    )


def round_body(run_id: str, closed: runs.Round) -> messages.RoundClosed:
    """A closed round, as the monitor is told."""
    return messages.RoundClosed(
        run=run_id,
        round=closed.round,
        digest=closed.digest,
        seconds=closed.seconds,
        peers=len(closed.contributors),
        refused=closed.refused,
        loss=closed.metrics.get("loss"),
        accuracy=closed.metrics.get("accuracy"),
        diverged="loss" in closed.metrics and closed.metrics["loss"] is None,
        metrics=closed.metrics,
        bytes_up=closed.bytes_up,
        bytes_down=closed.bytes_down,
        norms=closed.norms,
        spread=closed.spread,
        worst=closed.worst,
        spent=closed.spent,
        staleness=closed.staleness,
    )


def job_body(job: Job) -> JobChanged:
    """Where a job stands, as the monitors are told."""
    spread, units = job.is_spread, job.units.values()
    verified = sum(bool(unit.verified) for unit in units)
    in_hand = [unit for unit in units if unit.leases and not unit.verified]
    given = [given for unit in units for given in unit.given.values()]
    return JobChanged(
        job=job.id,
        kind=job.spec.kind,
        task=job.spec.task,
        state=job.state.value,
        done=job.verified_rows if spread else verified,
        total=job.total_rows if spread else len(job.units),
        peers=len({peer for _, peer, _ in job.leases()}),
        ended_because=printable(job.ended_because),
        leased=sum(job.rows(unit) if spread else 1 for unit in in_hand),
        units=verified,
        rows=job.verified_rows,
        rows_per_s=sum(job.rates.values()),
        bytes_up=sum(one.nbytes for one in given),
        bytes_down=sum(job.nbytes(unit) * (len(unit.given) + len(unit.leases)) for unit in units),
        dropped=sum(job.dropped.values()),
        num_excused=len(job.excused),
        excused={
            peer: printable(reason) for peer, reason in islice(job.excused.items(), _EXCUSED_TOLD)
        },
        began_at=job.began_at,
        ended_at=job.ended_at,
    )
