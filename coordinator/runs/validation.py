"""Validates updates before they are aggregated. Pure.

Each refusal has a short fixed reason, which is a key in the ledger and in `/metrics`, and a text.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from coordinator import strategies
from coordinator.runs import best_version, buffered
from coordinator.runs.state import TOO_FEW, TOO_STALE, Assignment, Run
from protocols.codecs import sums
from protocols.codecs.registry import DecodedUpdate
from protocols.errors import BadWeights, UpdateRefused
from protocols.messages.envelope import Metrics, Verify
from protocols.messages.states import RunState
from protocols.messages.work import SIGNED_CLAIM, UpdateClaim
from protocols.model import weights
from protocols.model.bfloat16 import difference
from protocols.model.schema_card import Description
from protocols.model.weights import Array, Schema, WeightReader
from protocols.privacy.secagg.messages import STEPS
from protocols.tables import evaluation_counts
from protocols.tables.class_names import ClassCounts
from protocols.tables.model_scores import ModelScores
from protocols.tables.statistics import TableStatistics

R = TypeVar("R", bound=WeightReader)


_CACHED_BYTES = 256 * 1024
#: Squares that are summed in float32 before the sums continue in float64.
_ROW_ELEMENTS = 512
#: Below this sum, float32 has lost digits of the squares.
_MIN_FLOAT32_SQUARES = 1e-25

#: The most examples that a peer may declare; a peer may stand for a whole fleet.
_MAX_DECLARED = 10**12
#: The most metrics of an update. Each is in the ledger and on every monitor.
MAX_METRICS = 32


#: In a secure run, the answers to all of its steps name the codec.
_WITH_CODEC = frozenset({"train", *STEPS})


class ExpectedReply(NamedTuple):
    """The reply that the run waits for: the claim's kind, its base version and the model's schema.

    `assignment`: the peer's own work, for buffered and late updates.
    """

    kind: str
    base: str
    schema: Schema
    assignment: Assignment | None = None


def check_claim(
    run: Run,
    expected: ExpectedReply,
    sender: str,
    claim: UpdateClaim,
    payload: bytes,
    signature: bytes,
    verify: Verify,
) -> None:
    """Raise UpdateRefused unless `sender` was asked for exactly this and signed it."""
    if claim.peer != sender or not verify(sender, signature, SIGNED_CLAIM.signed_bytes(payload)):
        raise UpdateRefused("bad signature", "the claim is not signed by the peer that sent it")
    if claim.run != run.id:
        raise UpdateRefused("another run", f"it belongs to run {claim.run}")
    work = expected.assignment
    number, turn = (work.round, work.turn) if work else (run.round, run.turn)
    if (claim.kind, claim.round, claim.turn) != (expected.kind, number, turn):
        raise UpdateRefused("late", f"it is for round {claim.round} ({claim.kind})")
    if work is None and run.peers.get(sender) == "answered":
        raise UpdateRefused("replay", "this peer's answer was counted already")
    if work is None and sender not in run.peers:
        raise UpdateRefused("not asked", "this peer was not asked in this round")
    if claim.base != expected.base:
        raise UpdateRefused("wrong base", f"it was trained on {claim.base[:12] or 'nothing'}")
    codec = run.spec.work_codec
    if claim.kind in _WITH_CODEC and claim.codec != codec:
        raise UpdateRefused("wrong codec", f"it is sent as {claim.codec}, not {codec}")
    if len(claim.metrics) > MAX_METRICS:
        raise UpdateRefused(
            "bad metrics", f"{len(claim.metrics)} metrics, the maximum is {MAX_METRICS}"
        )
    if claim.tallies and (fault := evaluation_counts.validate(claim.tallies, claim.num_examples)):
        raise UpdateRefused("bad metrics", fault)
    _check_metrics(run, claim.metrics)
    if claim.kind == "train":
        needed = strategies.find(run.spec.strategy).required_metric(run.spec.strategy_args)
        value = claim.metrics.get(needed)
        if needed and (value is None or value < 0):
            got = "none" if value is None else f"{value:g}"
            raise UpdateRefused(
                "bad metrics", f"{run.spec.strategy} needs a finite {needed!r}, at least 0; {got}"
            )
    minimum, cap = run.spec.min_examples, run.spec.max_examples
    if claim.kind == "train" and 0 < claim.num_examples < minimum:
        detail = f"it trains on {claim.num_examples}, the run needs at least {minimum}"
        raise UpdateRefused(TOO_FEW, detail)
    if claim.kind in ("train", "evaluate") and not 0 < claim.num_examples <= cap:
        raise UpdateRefused("bad example count", f"{claim.num_examples} is not in 1…{cap}")


def _check_metrics(run: Run, metrics: Metrics) -> None:
    for name, value in metrics.items():  # they decide which version is the best
        bounds = best_version.bounds_of(run.spec.task, name)
        if value is not None and not bounds[0] <= value <= bounds[1]:
            raise UpdateRefused("bad metrics", f"{_article(name)} {name} of {value:g}")


def declared_examples(description: Description, claim: UpdateClaim) -> tuple[int, int]:
    """The examples that a peer has for the run, to train on and held out, by its description.

    Raises UpdateRefused if the numbers make no sense.
    """
    declared = claim.num_examples, claim.num_held_out
    if not all(0 <= number <= _MAX_DECLARED for number in declared):
        raise UpdateRefused("bad example count", f"it declares {declared[0]} and {declared[1]}")
    match description:
        case TableStatistics():
            return description.rows, description.rows
        case ClassCounts():
            return (sum(description.counts.values()) + description.others,) * 2
        case _:
            return declared


def check_scores(run: Run, scores: ModelScores) -> None:
    """Raise UpdateRefused for a score that no model can have."""
    for metrics in scores.metrics.values():
        _check_metrics(run, metrics)


def bounded_examples(run: Run, claim: UpdateClaim) -> int:
    """The examples of a claim, at most as many as the peer has declared for this run."""
    train, held_out = run.declared.get(claim.peer, (0, 0))
    declared = held_out if claim.kind == "evaluate" else train
    return min(claim.num_examples, declared) if declared else claim.num_examples


def _article(word: str) -> str:
    return "an" if word[:1] in "aeio" else "a"


def check_weights(expected: ExpectedReply, open_update: Callable[[], R]) -> R:
    """The update's weights. Raises UpdateRefused: missing, another schema, not finite."""
    update = _of_schema(expected, open_update)
    try:
        weights.check_finite(update)
    except BadWeights as err:
        raise UpdateRefused("not finite", err.message) from err
    return update


def check_update(
    expected: ExpectedReply, open_update: Callable[[], WeightReader], base: WeightReader
) -> float:
    """The norm of an update's change. Raises UpdateRefused as `check_weights` does.

    It checks and measures in one pass if the change alone shows that the update is finite.
    """
    update = _of_schema(expected, open_update)
    if isinstance(update, DecodedUpdate):  # it must also be finite in the base's dtype
        check_weights(expected, lambda: update)
    return update_norm(update, base)


def check_sums(open_update: Callable[[], WeightReader], base: WeightReader, rows: int) -> None:
    """Raise UpdateRefused unless the update has the sums that `base` asks for, and an honest peer
    with `rows` rows can have such sums."""
    update = _of_schema(ExpectedReply("train", "", sums.schema_of(base)), open_update)
    if why := sums.objection(update, base, rows, masked=False):
        raise UpdateRefused("bad sums", why)


def check_norm(run: Run, claim: UpdateClaim, norm: float) -> None:
    """Raise UpdateRefused if the strategy cannot use an update of this norm."""
    if claim.kind == "train":
        adapter = strategies.find(run.spec.strategy)
        if fault := adapter.update_error(run.spec.strategy_args, claim.metrics, norm):
            raise UpdateRefused("bad metrics", fault)


def _of_schema(expected: ExpectedReply, open_update: Callable[[], R]) -> R:
    try:
        update = open_update()
        if expected.schema:
            weights.check_schema(update.schema, expected.schema)
    except BadWeights as err:
        raise UpdateRefused("bad weights", err.message) from err
    return update


def expected_reply(run: Run, schema: Schema, peer: str = "", kind: str = "") -> ExpectedReply:
    """The expected reply to the run's open request, or to this peer's own assignment.

    Raises UpdateRefused if the peer has no such assignment, or if it is too old.
    """
    if run.buffered and kind == "train":
        return _expected_of_assignment(run, schema, peer)
    if run.recalling:
        return ExpectedReply(run.kind, run.target_version.digest if run.target_version else "", {})
    if run.state is RunState.WAITING:
        card = run.card.schema if run.card and run.kind == "init" else {}
        base = run.described_base if run.kind == "describe" else ""
        return ExpectedReply(run.kind, base, card)
    if run.state is RunState.TRAINING:
        return ExpectedReply("train", run.parent, schema)
    return ExpectedReply("evaluate", run.head, schema)


def _expected_of_assignment(run: Run, schema: Schema, peer: str) -> ExpectedReply:
    work = run.assignments.get(peer)
    if work is None:
        raise UpdateRefused("late", "this peer no longer has this assignment")
    if buffered.is_over(run):
        raise UpdateRefused("late", f"the run has its last version, {run.num_versions}")
    if buffered.is_stale(run, work):
        behind = f"{buffered.staleness(run, work)} behind the newest"
        limit = f"the maximum is {run.spec.max_staleness}"
        raise UpdateRefused(TOO_STALE, f"trained on version {work.round - 1}, {behind}; {limit}")
    return ExpectedReply("train", work.base, schema, work)


def update_norm(update: WeightReader, base: WeightReader) -> float:
    """The Euclidean norm of the update's change of the base's floating-point tensors.

    It is at most the largest float64, since the ledger has no infinity. Computed in pieces that
    stay in the CPU cache, and without BLAS, which would wake its threads for each piece. The
    relative error is about 1e-7 for float32. Raises UpdateRefused if the update is not finite.
    """
    total = 0.0
    for piece in weights.split_into_pieces(update.schema, _CACHED_BYTES):
        for part in piece:
            dtype = update.schema[part.name].dtype
            if dtype not in weights.FLOAT_DTYPES:
                continue
            new: Array
            old: Array | float = 0.0
            if isinstance(
                update, DecodedUpdate
            ):  # as it was sent, without rounding to the base's dtype
                new, dtype = update.change(part), "F32"
            else:
                new, old = update.read(part), base.read(part)
            quick = _float32_squares(new, old) if dtype == "F32" else None
            if quick is not None:
                total += quick
                continue
            if not weights.is_finite(new, dtype):
                reason = f"tensor {part.name!r} holds NaN or infinity"
                raise UpdateRefused("not finite", reason)
            with np.errstate(over="ignore"):
                change = difference(new, np.asarray(old), dtype)
                total += float(np.einsum("i,i->", change, change))
    return math.sqrt(min(total, sys.float_info.max))


def _float32_squares(new: Array, old: Array | float) -> float | None:
    """The sum of squared differences in float32; None if float32 is too narrow for it.

    If the sum is finite, so are all of its terms.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        difference = np.subtract(new, old, dtype=np.float32)
        whole = len(difference) // _ROW_ELEMENTS * _ROW_ELEMENTS
        rows = difference[:whole].reshape(-1, _ROW_ELEMENTS)
        total = float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))
        rest = difference[whole:]
        total += float(np.einsum("i,i->", rest, rest))
    return total if _MIN_FLOAT32_SQUARES < total < math.inf or not difference.any() else None
