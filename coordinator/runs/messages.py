"""The messages to monitors about runs and closed rounds. Pure."""

from __future__ import annotations

from itertools import islice

from coordinator.runs import candidates, state
from coordinator.runs.state import Run
from protocols.messages import envelope
from protocols.messages.envelope import RunChanged, strip_controls
from protocols.messages.states import RunState

#: What a run waits for while another one is active.
ITS_TURN = "its turn"
#: Peers whose reasons a message has.
_MAX_REFUSED = 8
#: Fields that a closed round has in common with its message.
_SAME_IN_BOTH = (
    *("round", "digest", "seconds", "refused", "metrics", "bytes_up", "bytes_down", "norms"),
    *("spread", "worst", "spent", "staleness"),
)


def run_body(run: Run, waiting_for: str, memory_bytes: int = 0) -> RunChanged:
    """The state of a run."""
    answered = sum(status == "answered" for status in run.peers.values())
    return RunChanged(
        run=run.id,
        task=run.spec.task,
        # A buffered run evaluates one version and trains for the next at the same time.
        state=RunState.TRAINING if run.buffered and run.state is RunState.EVALUATING else run.state,
        round=run.round,
        rounds=run.spec.rounds,
        quorum=run.spec.buffer or run.spec.quorum,
        asked=len(run.assignments) if run.buffered else len(run.peers),
        answered=len(run.buffer) if run.buffered else answered,
        waiting_for="" if run.ended else waiting_for,
        head=run.head,
        best_round=run.best.round if run.best else 0,
        ended_because=strip_controls(run.ended_because),
        num_refused=len(run.refusal_texts),
        refused=_first_refusals(run),
        memory_bytes=memory_bytes,
        deleted=run.deleted,
        choice=strip_controls(candidates.text(run)),
        compared=run.num_compared,
    )


def owners_text(run: Run) -> str:
    """The model that a run has chosen, or trains now, and why, as owners may read it."""
    return strip_controls(candidates.text_for_owners(run))


def _first_refusals(run: Run) -> dict[str, str]:
    first = islice(run.refusal_texts.items(), _MAX_REFUSED)
    return {peer: strip_controls(text) for peer, text in first}


def round_body(run_id: str, closed: state.Round) -> envelope.RoundClosed:
    """A closed round."""
    loss = closed.metrics.get("loss")
    return envelope.RoundClosed(
        run=run_id,
        peers=len(closed.contributors),
        loss=loss,
        accuracy=closed.metrics.get("accuracy"),
        diverged="loss" in closed.metrics and loss is None,
        **{name: getattr(closed, name) for name in _SAME_IN_BOTH},
    )
