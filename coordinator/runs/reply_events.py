"""Turns the reply of a peer into an event of the run: an accepted update, or a refusal."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from flwr.app import Message
from msgspec.structs import replace

from coordinator.runs import buffered, late_updates, recovery, retention, validation
from coordinator.runs.context import RunContext
from coordinator.runs.in_flight import Request
from coordinator.runs.model import RunModel
from coordinator.runs.secure import answers
from coordinator.runs.state import Run
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent, Update
from coordinator.transport.flower_records import (
    read_answer,
    read_claim,
    read_description,
    read_proof,
)
from protocols.codecs import registry
from protocols.errors import BadMessage, BadWeights, UpdateRefused
from protocols.messages import refusals
from protocols.messages.refusals import AGENT_FAILED
from protocols.messages.work import UpdateClaim
from protocols.model.fragments import Fragment
from protocols.model.weights_file import WeightsFile
from protocols.tables.model_scores import ModelScores


@contextlib.contextmanager
def refused_as(reason: str) -> Iterator[None]:
    """Raise UpdateRefused if a reply lacks a record or has a wrong one."""
    try:
        yield
    except (BadMessage, KeyError, TypeError, ValueError) as err:
        raise UpdateRefused(reason, str(err)) from err


async def validate_reply(
    run: Run, ctx: RunContext, model: RunModel, request: Request, reply: Message
) -> RunEvent:
    """The event that follows from a reply. Raises UpdateRefused."""
    peer = request.peer
    if reply.has_error():
        # Flower's own errors say that the node is gone. From a peer that is online they are false,
        # and the request would be repeated without end.
        if reply.error.code != AGENT_FAILED:
            ctx.refresh_online()
            if peer not in ctx.eligible():
                return run_events.PeerLost(peer, "went away")
        refusal = refusals.decode(reply.error.reason or "")
        raise UpdateRefused(refusal.kind, refusal.text)
    if request.kind == "train" and not run.buffered and late_updates.is_late(run, request.round):
        late = late_updates.late_assignment(run, peer, request.round)
        expected = validation.ExpectedReply("train", late.base, model.schema, late)
    else:
        expected = validation.expected_reply(run, model.schema, peer, request.kind)
    claim = checked_claim(run, ctx, peer, reply, expected)
    if expected.kind == "describe":
        with refused_as("bad description"):
            description = read_description(reply, claim)
            if isinstance(description, ModelScores) is not run.comparing:
                raise BadMessage("it answers another request than this one")
        if isinstance(description, ModelScores):
            validation.check_scores(run, description)
            return run_events.ModelsCompared(peer, description)
        return run_events.PeerDescribed(
            peer, description, *validation.declared_examples(description, claim)
        )
    if expected.kind == "holdings":
        with refused_as("bad proof"):
            holding = recovery.verify_proof(run, read_proof(reply), ctx.is_own_signature, ctx.fleet)
            return run_events.HoldingTold(peer, holding)
    norm, num_examples = 0.0, validation.bounded_examples(run, claim)
    if run.spec.secure and expected.kind in ("train", "evaluate"):
        with refused_as("bad card"):
            card = read_answer(reply, claim)
        answers.check_card(run, ctx.fleet, claim, card)
        await asyncio.to_thread(ctx.store.uploads.write, peer, claim.digest, card)
    elif expected.kind != "evaluate":
        fragment = Fragment.of_round(run.spec.fragments, run.round)
        norm = await asyncio.to_thread(
            _measure, ctx, model, expected, peer, claim.digest, num_examples, fragment
        )
        validation.check_norm(run, claim, norm)
        if expected.kind in ("init", "recall"):
            ctx.store.promote_upload(peer, claim.digest)
            model.set_version(claim.digest)
            if run.target_version:
                state = retention.state_of(run, run.target_version, ctx.store)
                return run_events.VersionRecalled(run.target_version, peer, state)
            return run_events.WeightsInitialised(claim.digest, peer)
    is_bounded = num_examples < claim.num_examples
    factor = num_examples / claim.num_examples
    update = Update(
        digest=claim.digest,
        nbytes=claim.nbytes,
        num_examples=num_examples,
        claimed=claim.num_examples if is_bounded else 0,
        metrics=claim.metrics,
        tallies={name: [factor * n for n in tally] for name, tally in claim.tallies.items()}
        if is_bounded
        else claim.tallies,
        norm=norm,
        seconds=request.seconds,
    )
    if (work := expected.assignment) is None:
        return run_events.UpdateAccepted(run.round, peer, update)
    staleness = buffered.staleness(run, work)
    update = replace(update, base=work.base, turn=work.turn, staleness=staleness)
    return run_events.UpdateAccepted(work.round, peer, update)


def checked_claim(
    run: Run,
    ctx: RunContext,
    peer: str,
    reply: Message,
    expected: validation.ExpectedReply,
) -> UpdateClaim:
    """The claim in a reply, if it is what the run waits for. Raises UpdateRefused."""
    with refused_as("bad claim"):
        claim, payload, signature = read_claim(reply)
    validation.check_claim(run, expected, peer, claim, payload, signature, ctx.verify)
    with refused_as("another fleet"):
        ctx.check_fleet(peer, claim.fleet)
    return claim


def _measure(
    ctx: RunContext,
    model: RunModel,
    expected: validation.ExpectedReply,
    peer: str,
    digest: str,
    rows: int,
    fragment: Fragment,
) -> float:
    """The norm of an upload's change, if the upload of `rows` rows is valid; 0 for one of sums.
    An update of training has this fragment. Raises UpdateRefused."""
    with contextlib.ExitStack() as stack:

        def uploaded() -> WeightsFile:
            return stack.enter_context(ctx.store.uploads.open(peer, digest))

        if expected.kind == "recall" and digest != expected.base:
            raise UpdateRefused("bad weights", f"these are {digest[:12]}, not {expected.base[:12]}")
        if expected.kind in ("init", "recall"):
            validation.check_weights(expected, uploaded)
            return 0.0
        base = stack.enter_context(_open_base(ctx, expected))
        if model.codec.name == registry.SUMS:
            validation.check_sums(uploaded, base, rows)
            return 0.0
        with refused_as("bad weights"):
            seen = fragment.of(model.codec.base(base))
        if seen is not base:
            expected = expected._replace(schema=seen.schema)
        return validation.check_update(
            expected, lambda: registry.open_update(model.codec, uploaded(), seen), seen
        )


def _open_base(ctx: RunContext, expected: validation.ExpectedReply) -> WeightsFile:
    """The version that an update was trained on. Raises UpdateRefused."""
    try:
        return WeightsFile(ctx.store.version_path(expected.base))
    except (FileNotFoundError, BadWeights) as err:
        if expected.assignment is None:
            raise
        raise UpdateRefused(
            "base is gone", f"version {expected.base[:12]} is missing or damaged"
        ) from err
