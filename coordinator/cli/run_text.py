"""Runs and rounds as text for `commonweight run` and the Python API. Pure, except `follow`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from protocols.messages.states import ENDED, RunState

if TYPE_CHECKING:
    from coordinator.fleet.state import Fleet, Peer
    from coordinator.remote.api_client import Remote
    from coordinator.runs.state import Round, Run
    from coordinator.storage.run_events import RunSpec

#: The interval between two requests for a run.
POLL_S = 0.5
#: After this many requests, the reason why a run waits is shown, as most waits are shorter.
WAIT_POLLS = 4
#: Peers that get no work are named up to this number.
_MAX_ABSENT = 20


def describe(run: Run, fleet: Fleet) -> Iterator[str]:
    """Lines about a run: its state, what it waits for, its settings, refusals and rounds."""
    from coordinator.runs import comparisons
    from coordinator.runs.decisions import phase_deadline_s
    from coordinator.runs.rollback import present

    spec, peers = run.spec, fleet.peers
    yield f"{run.id}: {run.state}, round {_of_all(run, run.round)}"
    if run.ended:
        is_told = run.last_refusal in run.refusal_texts.values()  # below
        yield f"because {run.ended_briefly if is_told else run.ended_because}"
    elif shown := fleet.runs.get(run.id):
        if shown.changed.memory_bytes:
            nbytes = shown.changed.memory_bytes
            yield f"closing a round takes about {nbytes / 1e6:,.0f} MB of memory"
        yield from waiting_lines(run, fleet)
    arguments = "".join(f" {name}={value}" for name, value in spec.strategy_args.items())
    auto = "auto, now " if spec.deadline == "auto" else ""
    select = f", select {spec.select:g}x" if spec.select else ""
    late = ", late updates folded" if spec.late == "fold" else ""
    how = f"strategy {spec.strategy}{arguments}, codec {spec.codec}"
    if spec.app:
        how = f"{spec.task}, code {spec.app[:12]}: its ServerApp decides"
    yield (
        f"{how}, quorum {spec.quorum}, "
        f"deadline {auto}{phase_deadline_s(run):g} s, weighting {spec.weighting}{select}{late}"
    )
    if private := spec.private:
        shared = f"{private.shared} honest peers of a sum share the noise, fewer are not unmasked"
        yield (
            f"{shared if private.is_shared else 'each peer adds its own noise'}: "
            f"ε {private.epsilon:g} at δ {private.delta:g} for each "
            f"row over all {private.rounds} rounds, gradients clipped to norm {private.clip:g}"
        )
    if allowed := spec.private_versions:
        spent = f"ε {allowed.epsilon_of(run.num_spent):.3g} of {allowed.epsilon:g} spent"
        yield (
            f"privacy: {spent} after {run.num_spent} of {allowed.rounds} rounds, for each peer "
            f"at δ {allowed.delta:g}; changes clipped to norm {spec.clip_norm:g}, "
            "versions not evaluated"
        )
    yield from choice_lines(run)
    if spec.secure:
        yield secure_line(spec)
    for peer, text in run.refusal_texts.items():
        yield f"refused {_name(peer, peers)}: {text}"
    if run.refusals > len(run.refusal_texts):
        last = f"{_name(run.last_refused, peers)}: {run.last_refusal}"
        since = f", the last one of {last}; it has answered since" if not run.refusal_texts else ""
        yield f"{run.refusals} refusals so far{since}"
    yield from buffer_lines(run, peers)
    begins = {one.spec.first_round: one.model for one in run.trained}
    if run.trained:
        begins[spec.first_round] = present(run).model
    for closed in run.history:
        if (model := begins.get(closed.round)) is not None:
            yield f"model {model}:"
        star = " ★" if run.best and closed.round == run.best.round else ""
        yield f"{round_line(run, closed)} {closed.digest[:12]}{star}"
    if run.best is not None:
        yield from fairness(run.best, peers)
    for peer, told in sorted(run.comparisons.items()):
        yield comparisons.line(_name(peer, peers), told)
    if run.ended and (why := comparisons.why_none(run)):
        yield why


def choice_lines(run: Run) -> Iterator[str]:
    """The models that a run of `model=auto` has chosen, and why; of several, which is trained now
    or kept, and what the others have reached."""
    from coordinator.runs import candidates, model_choice

    if run.choice is None:
        return
    yield model_choice.line(run.choice)
    if run.ordered is None:
        return
    told = candidates.summary(run) if run.ended else candidates.text(run)
    if told not in run.ended_because:  # a run that was stopped has only this
        yield f"model: {told}"


def _of_all(run: Run, number: int) -> str:
    """A round of the run; and of how many, unless it trains several models."""
    return f"{number}/{run.spec.rounds}" if run.ordered is None else str(number)


def secure_line(spec: RunSpec) -> str:
    """A line about a secure run: the coordinator's view, and the scaling of each peer's change."""
    seen = f"secure: the coordinator sees only sums of {spec.quorum} updates or more"
    if not spec.clip_norm:  # peers that share noise clip each row instead
        return seen
    return f"{seen}; each peer scales its change down to norm {spec.clip_norm:g}"


def round_line(run: Run, closed: Round) -> str:
    """A closed round: metrics, peers, seconds, megabytes."""
    metrics = " ".join(
        f"{name} {value:.4f}" for name, value in closed.metrics.items() if value is not None
    )
    behind = f"staleness ≤ {max(closed.staleness.values())} " if closed.staleness else ""
    return (
        f"round {_of_all(run, closed.round)} {metrics} {behind}"
        f"peers {len(closed.contributors)} {closed.seconds:.2f} s "
        f"up {closed.bytes_up / 1e6:.2f} MB down {closed.bytes_down / 1e6:.2f} MB"
    )


class Step(NamedTuple):
    """The changes of a run: refusals as text, closed rounds, what it waits for as text, and the
    models that it has chosen or trains now."""

    run: Run
    refusals: tuple[str, ...]
    closed: tuple[Round, ...]
    waits: tuple[str, ...]
    chosen: tuple[str, ...] = ()

    def lines(self) -> Iterator[str]:
        """All of it as text. Rounds of earlier models come before the line of the present one."""
        first = self.run.spec.first_round
        shown = _shown(self.run, self.closed)
        yield from self.refusals
        yield from (round_line(self.run, one) for one in shown if one.round < first)
        yield from self.chosen
        yield from (round_line(self.run, one) for one in shown if one.round >= first)
        yield from self.waits


def _shown(run: Run, closed: Sequence[Round]) -> list[Round]:
    """The rounds without those between two evaluations, as trees have hundreds of such rounds."""
    is_evaluated = run.spec.evaluate_every > 1 and any(one.metrics for one in run.history)
    return [one for one in closed if one.metrics or not is_evaluated]


class Progress:
    """Returns the changes of a run at each call of `step`."""

    def __init__(self) -> None:
        self._rounds = self._refusals = self._num_waits = 0
        self._refused: set[tuple[str, str]] = set()
        self._waits: tuple[str, ...] = ()
        self._chosen: tuple[str, ...] = ()

    def step(self, run: Run, fleet: Callable[[], Fleet]) -> Step:
        """The changes since the last call. `fleet` is called only if it is needed."""
        refusals = tuple(self._new_refusals(run, fleet))
        closed = run.history[self._rounds :]
        self._rounds = len(run.history)
        is_first = run.state is RunState.WAITING and not run.history
        self._num_waits = self._num_waits + 1 if is_first or waits_for_peers(run) else 0
        is_long = self._num_waits and self._num_waits % WAIT_POLLS == 0
        chosen = tuple(line for line in choice_lines(run) if line not in self._chosen)
        self._chosen += chosen
        waits = self._new_waits(run, fleet()) if is_long else ()
        return Step(run, refusals, closed, waits, chosen)

    def _new_refusals(self, run: Run, fleet: Callable[[], Fleet]) -> Iterator[str]:
        if run.refusals > self._refusals:
            last = {run.last_refused: run.last_refusal}  # it may have answered since
            for refused in {**_refusals(run), **last}.items():
                if refused not in self._refused:
                    self._refused.add(refused)
                    peer, text = refused
                    yield f"refused {_name(peer, fleet().peers)}: {text}"
        self._refusals = run.refusals

    def _new_waits(self, run: Run, fleet: Fleet) -> tuple[str, ...]:
        """What the run waits for and who gets no work, if this has changed since the last call."""
        waits = tuple(waiting_lines(run, fleet))
        is_new, self._waits = waits != self._waits, waits
        return waits if is_new else ()


def follow(remote: Remote, run_id: str, every_s: float = POLL_S) -> Iterator[Step]:
    """Ask for a run until it has ended; the last step has the ended run.

    Only once if its coordinator is not running.
    """
    progress = Progress()
    while True:
        step = progress.step(remote.run(run_id), remote.fleet)
        yield step
        if step.run.ended or remote.is_stopped:
            return
        time.sleep(every_s)


def best(run: Run) -> str:
    """The best round so far and its metric; a dash if there is none."""
    from coordinator.runs import best_version

    if run.best is None:
        return "–"
    name = best_version.metric_of(run.spec, run.best.metrics)
    value, decides = run.best.metrics.get(name), run.best.decisive.get(name)
    if value is None:
        return f"round {run.best.round}"
    middle = f" ({decides:.4f} over the peers in the middle)" if decides is not None else ""
    return f"round {run.best.round} {name} {value:.4f}{middle}"


def _refusals(run: Run) -> Mapping[str, str]:
    """By peer, why it takes no part. If all have answered since, the last refusal."""
    last = {run.last_refused: run.last_refusal} if run.refusals else {}
    return run.refusal_texts or last


def waits_for_peers(run: Run) -> bool:
    """True if the run waits for peers that could get work, not for the work of those it asked."""
    if run.cohort is not None:
        return True  # a sum takes a moment unless a peer is missing
    is_open = run.state in (RunState.WAITING, RunState.TRAINING)
    return is_open and not run.pending and not run.assignments


def waiting_lines(run: Run, fleet: Fleet) -> Iterator[str]:
    """What a run waits for; and if that is more peers, why each of the others gets no work."""
    from coordinator.fleet import remedies

    shown = fleet.runs.get(run.id)
    if run.ended or shown is None or not shown.changed.waiting_for:
        return
    if before := run_before(run.id, fleet):
        yield f"waits for the end of run {before}; to end it: commonweight run stop {before}"
        return
    yield f"waits for {shown.changed.waiting_for}"
    if not waits_for_peers(run):
        return
    reasons = remedies.absent_peers(fleet, fleet.at)
    for peer in list(reasons)[:_MAX_ABSENT]:
        yield f"  {_name(peer, fleet.peers)}: {reasons[peer]}"
    if len(reasons) > _MAX_ABSENT:
        yield f"  and {len(reasons) - _MAX_ABSENT} more: commonweight peers list"


def run_before(run_id: str, fleet: Fleet) -> str:
    """The run that continues while this one waits for its turn; empty if there is none."""
    from coordinator.runs.messages import ITS_TURN

    active = [
        name
        for name, run in fleet.runs.items()
        if run.changed.state not in ENDED and run.changed.waiting_for != ITS_TURN
    ]
    shown = fleet.runs.get(run_id)
    is_queued = shown is not None and shown.changed.waiting_for == ITS_TURN
    return active[0] if active and is_queued else ""


def buffer_lines(run: Run, peers: Mapping[str, Peer]) -> Iterator[str]:
    """Peers that get no work; for a buffered run its settings and how far behind each peer is."""
    from coordinator.runs import buffered

    spec = run.spec
    for peer in sorted(run.excluded):
        yield f"{_name(peer, peers)} gets no work: fewer than {spec.min_examples} examples"
    if not run.buffered:
        return
    yield (
        f"buffered: {spec.buffer} updates a version, at most {spec.max_staleness} versions behind, "
        f"{spec.concurrency or 'all'} peers at a time, server learning rate {spec.server_lr:g}"
    )
    behind = {_name(p, peers): buffered.staleness(run, w) for p, w in run.assignments.items()}
    if behind:
        counts = ", ".join(f"{name} {count}" for name, count in sorted(behind.items()))
        yield f"working peers, versions behind: {counts}"


def fairness(closed: Round, peers: Mapping[str, Peer]) -> Iterator[str]:
    """For each metric: its spread over the peers, and the peer with the worst value; and the peers
    that count less."""
    for peer, times in sorted(closed.limited.items()):
        name = _name(peer, peers)
        yield f"round {closed.round}: {name} counts less, at {times:.3g} times the median peer"
    for name, (least, median, most) in sorted(closed.spread.items()):
        peer = closed.worst.get(name, "")
        worst = f"; worst: {_name(peer, peers)}" if peer else ""
        spread = f"{least:.4f} … {median:.4f} … {most:.4f}"
        yield f"round {closed.round}: {name} {spread} over the peers{worst}"


def _name(peer: str, peers: Mapping[str, Peer]) -> str:
    from coordinator.fleet.readings import display_name

    return display_name(peers[peer]) if peer in peers else peer
