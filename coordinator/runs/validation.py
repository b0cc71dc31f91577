"""The gate: what an update must be before anything of it is summed. Pure.

Each refusal has a short fixed word (the ledger's and `/metrics`' key) and a sentence for a person.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from coordinator import strategies
from coordinator.runs import buffered
from coordinator.runs.state import TOO_FEW, TOO_STALE, Assignment, Run
from protocols.codecs.registry import DecodedUpdate
from protocols.errors import BadWeights, UpdateRefused
from protocols.messages.envelope import Verify
from protocols.messages.states import RunState
from protocols.messages.work import SIGNED_CLAIM, UpdateClaim
from protocols.model import weights
from protocols.model.weights import (
    FLOAT_DTYPES,
    Array,
    Schema,
    WeightReader,
    bf16_to_float32,
    split_into_pieces,
)
from protocols.tables import evaluation_counts, preprocessing

R = TypeVar("R", bound=WeightReader)


_CACHED_BYTES = 256 * 1024
#: So many squares are added up in float32 before float64 goes on.
_ROW_ELEMENTS = 512
#: Below it float32 has lost digits of what was added up.
_MIN_FLOAT32_SQUARES = 1e-25

#: Numbers that an update may carry, each named in the ledger and on every monitor.
MAX_METRICS = 32


class ExpectedReply(NamedTuple):
    """What the run waits for: the claim's kind, its base version and the model's schema.

    `given`: the work that is this peer's own, in a buffered run.
    """

    kind: str
    base: str
    schema: Schema
    given: Assignment | None = None


def check_claim(
    run: Run,
    expected: ExpectedReply,
    sender: str,
    claim: UpdateClaim,
    payload: bytes,
    signature: bytes,
    verify: Verify,
) -> None:
    """Raise UpdateRefused unless `sender` was asked for just this and signed it."""
    if claim.peer != sender or not verify(sender, signature, SIGNED_CLAIM.signed_bytes(payload)):
        raise UpdateRefused("bad signature", "the claim is not signed by the peer that sent it")
    if claim.run != run.id:
        raise UpdateRefused("another run", f"it belongs to run {claim.run}")
    number = expected.given.round if expected.given else run.round
    turn = expected.given.turn if expected.given else 0
    if (claim.kind, claim.round, claim.turn) != (expected.kind, number, turn):
        raise UpdateRefused("late", f"it is for round {claim.round} ({claim.kind})")
    if expected.given is None and run.peers.get(sender) == "answered":
        raise UpdateRefused("replay", "this peer's answer was counted already")
    if expected.given is None and sender not in run.peers:
        raise UpdateRefused("not asked", "this peer was not asked in this round")
    if claim.base != expected.base:
        raise UpdateRefused("wrong base", f"it was trained on {claim.base[:12] or 'nothing'}")
    if claim.kind == "train" and claim.codec != run.spec.codec:
        raise UpdateRefused("wrong codec", f"it is sent as {claim.codec}, not {run.spec.codec}")
    if len(claim.metrics) > MAX_METRICS:
        raise UpdateRefused("bad metrics", f"{len(claim.metrics)} of them; {MAX_METRICS} may be")
    if claim.tallies and (fault := evaluation_counts.validate(claim.tallies, claim.num_examples)):
        raise UpdateRefused("bad metrics", fault)
    accuracy = claim.metrics.get("accuracy")
    if accuracy is not None and not 0.0 <= accuracy <= 1.0:  # it decides which version is best
        raise UpdateRefused("bad metrics", f"an accuracy of {accuracy:g}")
    if claim.kind == "train":
        needed = strategies.find(run.spec.strategy).required_metric(run.spec.strategy_args)
        value = claim.metrics.get(needed)
        if needed and (value is None or value < 0):
            told = "none" if value is None else f"{value:g}"
            raise UpdateRefused(
                "bad metrics", f"{run.spec.strategy} needs a finite {needed!r}, 0 or more; {told}"
            )
    least, cap = run.spec.min_examples, run.spec.max_examples
    if claim.kind == "train" and 0 < claim.num_examples < least:
        raise UpdateRefused(TOO_FEW, f"it trains on {claim.num_examples}; the run wants {least}")
    if claim.kind in ("train", "evaluate") and not 0 < claim.num_examples <= cap:
        raise UpdateRefused("bad example count", f"{claim.num_examples} is not in 1…{cap}")


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
    """The `distance` of an update from its base. Raises UpdateRefused as `check_weights` does.

    Both in one pass, where the difference tells enough of the update.
    """
    update = _of_schema(expected, open_update)
    if isinstance(update, DecodedUpdate):  # finite when it is rounded to the base's dtype, too
        check_weights(expected, lambda: update)
    return update_norm(update, base)


def check_norm(run: Run, claim: UpdateClaim, norm: float) -> None:
    """Raise UpdateRefused if what the strategy makes of an update so far away is no number."""
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
    """What an answer to the run's present question must be, or to this peer's own.

    Raises UpdateRefused for an answer to work that this peer does not have, or that is too old.
    """
    if run.buffered and kind == "train":
        return _own(run, schema, peer)
    if run.recalling:
        return ExpectedReply(run.kind, run.target_version.digest if run.target_version else "", {})
    if run.state is RunState.WAITING:
        card = run.card.schema if run.card and run.kind == "init" else {}
        base = preprocessing.digest(run.preprocessing) if run.kind == "describe" else ""
        return ExpectedReply(run.kind, base, card)
    if run.state is RunState.TRAINING:
        return ExpectedReply("train", run.parent, schema)
    return ExpectedReply("evaluate", run.head, schema)


def _own(run: Run, schema: Schema, peer: str) -> ExpectedReply:
    given = run.assignments.get(peer)
    if given is None:
        raise UpdateRefused("late", "this peer has no such work any more")
    if buffered.is_over(run):
        raise UpdateRefused("late", f"the run's last version, {run.num_versions}, is made")
    if buffered.is_stale(run, given):
        behind, most = buffered.staleness(run, given), run.spec.max_staleness
        raise UpdateRefused(
            TOO_STALE,
            f"trained on version {given.round - 1}, {behind} behind the newest; {most} may be",
        )
    return ExpectedReply("train", given.base, schema, given)


def update_norm(update: WeightReader, base: WeightReader) -> float:
    """Euclidean norm of the update's floating-point tensors minus the base's.

    What is beyond float64 counts as its largest number: the ledger has no infinity. In pieces that
    stay in the processor's cache, and not by BLAS, which wakes its threads for each of them.
    float32 is right to about 1e-7 of the norm, the rest to float64. Raises UpdateRefused: an update
    that is not finite.
    """
    total = 0.0
    for piece in split_into_pieces(update.schema, _CACHED_BYTES):
        for part in piece:
            dtype = update.schema[part.name].dtype
            if dtype not in FLOAT_DTYPES:
                continue
            new: Array
            old: Array | float = 0.0
            if isinstance(update, DecodedUpdate):  # as it was sent, not rounded by way of the base
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
            if dtype == "BF16":
                new, old = bf16_to_float32(new), bf16_to_float32(np.asarray(old))
            with np.errstate(over="ignore"):
                difference = np.subtract(new, old, dtype=np.float64)
                total += float(np.einsum("i,i->", difference, difference))
    return math.sqrt(min(total, sys.float_info.max))


def _float32_squares(new: Array, old: Array | float) -> float | None:
    """The sum of squared differences of float32; None where float32 is too narrow for it.

    A sum that is a number is of numbers alone.
    """
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        difference = np.subtract(new, old, dtype=np.float32)
        whole = len(difference) // _ROW_ELEMENTS * _ROW_ELEMENTS
        rows = difference[:whole].reshape(-1, _ROW_ELEMENTS)
        total = float(np.einsum("ij,ij->i", rows, rows).sum(dtype=np.float64))
        rest = difference[whole:]
        total += float(np.einsum("i,i->", rest, rest))
    return total if _MIN_FLOAT32_SQUARES < total < math.inf or not difference.any() else None
