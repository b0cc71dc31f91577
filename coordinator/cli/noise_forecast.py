"""Lines of `run start` before a run with noise: how much noise there is, and how to get less.

The noise of a step is compared with the clip norm, the longest that a gradient or change can be. As
a vector over all weights, noise of the same length costs little accuracy. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from protocols.privacy import gaussian
from protocols.privacy.private_training import MAX_EPSILON
from protocols.privacy.user_level import FEW_PEERS

if TYPE_CHECKING:
    from coordinator.runs.state import Run
    from coordinator.storage.run_events import RunSpec
    from protocols.privacy.private_training import PrivateTraining

#: Noise longer than this many clip norms costs much accuracy (docs/privacy.md has measurements).
MAX_LENGTH = 3.0
#: A task's defaults (`agent.tasks.training.hyperparameters`).
_BATCH_SIZE, _EPOCHS = 10, 5
#: By task: what peers send before round 1, the setting with which they do not, and its option.
_STATISTICS = {
    "tabular": ("statistics of their columns", "preprocessing", "--preprocessing FILE"),
    "images": ("the size of each class", "classes", "--set classes=cat,dog"),
}
_FULL_BATCHES = "--set batch_size=all --set epochs=1"


class Known(NamedTuple):
    """The sizes in an earlier run of the task: its id, the rows of each peer that it trained on,
    and the number of weights. Empty and 0 if there is none."""

    run: str = ""
    rows: tuple[int, ...] = ()
    num_weights: int = 0


def known_from(run: Run | None) -> Known:
    """The sizes of this run."""
    if run is None:
        return Known()
    rows = tuple(sorted(trained for trained, _ in run.declared.values() if trained))
    tensors = run.card.schema.values() if run.card is not None else ()
    return Known(run.id, rows, sum(math.prod(spec.shape) for spec in tensors))


def lines(spec: RunSpec, peers: int, known: Known) -> Iterator[str]:
    """Lines about the noise of a run; `peers`: those of the fleet. Raises UsageError if no noise
    is enough."""
    yield from _of_rows(spec, known)
    yield from _of_statistics(spec)
    yield from _of_peers(spec, peers, known)


def _of_rows(spec: RunSpec, known: Known) -> Iterator[str]:
    """About noise that each peer adds."""
    private = spec.private
    if private is None:
        return
    if private.is_shared:
        yield from _of_sums(spec, private, known)
        return
    is_full = spec.settings.get("batch_size") in ("all", 0)
    batch = 0 if is_full else _whole(spec, "batch_size", _BATCH_SIZE)
    epochs = _whole(spec, "epochs", _EPOCHS)
    if not known.rows:
        sigma = private.event(1.0, epochs).noise
        yield (
            f"noise with full batches: σ = {sigma:.3g} times the clip norm {private.clip:g} on "
            f"each sum of a peer's gradients, for ε {private.epsilon:g} in {private.rounds} rounds"
        )
        yield "the peers' rows, which decide how much that is, are known after a run of this task"
        return
    events = [private.event(*_sampling(rows, batch, epochs)) for rows in known.rows]
    sigmas = [event.noise for event in events]
    yield (
        f"noise: σ = {_range(sigmas)} times the clip norm {private.clip:g} on each sum of a peer's "
        f"gradients, for ε {private.epsilon:g} in {private.rounds} rounds"
    )
    total = sum(known.rows)
    of_mean = math.sqrt(
        sum(
            (rows / total * event.noise / (event.rate * rows)) ** 2
            for rows, event in zip(known.rows, events, strict=True)
        )
    )
    length = of_mean * math.sqrt(known.num_weights)
    yield (
        f"by run {known.run}, {len(known.rows)} peers have {_range(known.rows)} rows: the noise of "
        f"their mean gradient is {length:.3g} clip norms long"
    )
    if length <= MAX_LENGTH:
        return
    if any(event.rate < 1 for event in events) or epochs > 1:
        yield f"the model will learn little; larger batches need less noise: {_FULL_BATCHES}"
        return
    yield _needs(spec, length, max(sigmas), "--dp", f"{_times(length)} as many rows")


def _of_sums(spec: RunSpec, private: PrivateTraining, known: Known) -> Iterator[str]:
    """About noise that the peers of a sum share."""
    sigma, m = private.event(1.0, 1).noise, private.shared
    yield (
        f"noise: σ = {sigma:.3g} times the clip norm {private.clip:g} on the sum of all peers' "
        f"gradients, for ε {private.epsilon:g} in {private.rounds} rounds; {m} honest peers share "
        "it, and a sum of fewer trusted peers is not unmasked"
    )
    yield (
        f"ε holds if {m} of the trusted peers in a sum add their noise and keep it secret; "
        "--dp-shared 1 relies on no other peer"
    )
    if not known.rows:
        return
    peers, total = len(known.rows), sum(known.rows)
    of_all = sigma * math.sqrt(max(1.0, peers / m))
    length = of_all / total * math.sqrt(known.num_weights)
    yield (
        f"by run {known.run}, {peers} peers have {_range(known.rows)} rows: the noise of their "
        f"mean gradient is {length:.3g} clip norms long"
    )
    if length > MAX_LENGTH:
        yield _needs(spec, length, sigma, "--dp", f"{_times(length)} as many rows")


def _of_statistics(spec: RunSpec) -> Iterator[str]:
    """About what peers send without noise before round 1, which ε does not cover."""
    what, setting, instead = _STATISTICS.get(spec.task, ("", "", ""))
    if spec.private is not None and what and not spec.settings.get(setting):
        yield (
            f"before round 1, peers send {what} without noise, which ε does not cover; peers with "
            f"privacy.max_epsilon take no part. With {instead}, no peer sends them"
        )


def _of_peers(spec: RunSpec, peers: int, known: Known) -> Iterator[str]:
    """About noise that the coordinator adds."""
    allowed = spec.private_versions
    if allowed is None or not spec.clip_norm:
        return
    sigma, peers = allowed.noise, max(peers, 1)
    yield (
        f"noise: σ = {sigma:.3g} times the clip norm {spec.clip_norm:g} on the sum of all changes, "
        f"for ε {allowed.epsilon:g} in {allowed.rounds} rounds; with {peers} peers "
        f"{sigma * spec.clip_norm / peers:.3g} on each weight"
    )
    length = sigma * math.sqrt(known.num_weights) / peers
    if length > MAX_LENGTH:
        yield _needs(spec, length, sigma, "--dp-user", f"{_times(length)} as many peers")
    if peers < FEW_PEERS:
        yield (
            f"with fewer than {FEW_PEERS} peers, noise for whole peers usually hides the model; "
            "--dp protects single rows, with noise of each peer"
        )


def _whole(spec: RunSpec, name: str, default: int) -> int:
    """A setting of the task, at least 1; the default for what each agent will refuse."""
    value = spec.settings.get(name, default)
    return value if type(value) is int and value >= 1 else default


def _sampling(rows: int, batch: int, epochs: int) -> tuple[float, int]:
    """The part of the rows in a step, and the steps of a round."""
    size = min(batch or rows, rows)
    return size / rows, epochs * -(-rows // size)


def _needs(spec: RunSpec, length: float, sigma: float, option: str, more: str) -> str:
    """The changes that would make the noise `MAX_LENGTH` clip norms long."""
    less, rounds = MAX_LENGTH / length, spec.rounds - spec.first_round + 1
    ways = [more]
    mu = math.sqrt(rounds) / (sigma * less)
    epsilon = gaussian.epsilon_of(mu, spec.dp_delta)
    if epsilon <= MAX_EPSILON:
        ways.insert(0, f"{option} {math.ceil(10 * epsilon) / 10:g}")
    if (fewer := int(rounds * less**2)) >= 1:
        ways.insert(0, f"--rounds {fewer}")
    return (
        f"the model will learn little: the noise of each step is {length:.2g} clip norms long. For "
        f"{MAX_LENGTH:g} clip norms, it takes one of: {'; '.join(ways)}"
    )


def _times(length: float) -> str:
    return f"{math.ceil(10 * length / MAX_LENGTH) / 10:g} times"


def _range(values: tuple[int, ...] | list[float]) -> str:
    """The least and the largest value, or the one that all have."""
    low, high = (
        f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
        for value in (min(values), max(values))
    )
    return low if low == high else f"{low} to {high}"
