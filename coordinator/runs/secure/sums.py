"""Carries out secure sums: asks peers, takes their answers, records each decision.

Answers to the steps share, agree and unmask are in memory. After a restart they are asked for
again, and agents repeat the same bytes. Data that cannot be repeated are in a file that is durable
before its event: the cards, the sealed shares of all, the masked updates.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

from flwr.app import Message

from coordinator.runs import reply_events, steps, validation
from coordinator.runs.aggregation import CommittedVersion, Evaluation
from coordinator.runs.in_flight import Request
from coordinator.runs.parts import RunParts
from coordinator.runs.secure import answers, decisions, fold, plans, progress
from coordinator.runs.secure.decisions import Progress
from coordinator.runs.secure.sum_files import SumFiles, step_of
from coordinator.runs.state import Run
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent
from coordinator.strategies.state import StateStore
from coordinator.transport.flower_records import read_answer
from protocols.codecs import registry, sums
from protocols.errors import BadMessage, BadWeights, CohortLost, CommonweightError, UpdateRefused
from protocols.local.failpoints import failpoint
from protocols.messages import refusals
from protocols.messages.refusals import AGENT_FAILED
from protocols.messages.work import MAX_MESSAGE_BYTES, SecureStep
from protocols.model.weights_file import WeightsFile
from protocols.privacy.secagg.aggregator import Aggregator
from protocols.privacy.secagg.messages import (
    STEPS,
    AgreeRequest,
    MaskAnswer,
    MaskRequest,
    ReadyAnswer,
    ShareRequest,
    SumKind,
    decode_answer,
    decode_ready,
    encode,
)

T = TypeVar("T")

#: A request without an answer is sent again after this time, as it may be lost.
_ASK_AGAIN_S = 30.0
#: Leaves room for the signed work beside the request.
_MAX_REQUEST_BYTES = MAX_MESSAGE_BYTES - 128 * 1024
_STEP_OF: dict[type, SecureStep] = {
    ShareRequest: "share",
    MaskRequest: "mask",
    AgreeRequest: "agree",
}


class SecureSums:
    """The sums of one secure run, one after the other."""

    def __init__(self, parts: RunParts) -> None:
        self._parts, self._ctx, self._store = parts, parts.ctx, parts.ctx.store
        self._recorder, self._requests, self._timer = parts.recorder, parts.requests, parts.timer
        self._files = SumFiles(self._store.uploads)
        #: A version, and the largest change of each tensor on the way to it.
        self._largest: tuple[str, list[float]] = ("", [])

    @property
    def _run(self) -> Run:
        return self._recorder.run

    def _open_sum(self) -> Aggregator:
        """The state of the open cohort."""
        assert self._run.cohort is not None, "steps of a sum have a cohort"
        return self._files.open(self._run.cohort)

    # --- what is missing ---

    def progress(self, *, waits_for_absent: bool) -> Progress | None:
        """How far the open cohort is. `waits_for_absent`: as after a restart."""
        if (cohort := self._run.cohort) is None:
            return None
        return progress.measure(
            self._run,
            self._files.open(cohort),
            None if waits_for_absent else self._ctx.online(),
            self._timer.phase_s,
            self._store.uploads.is_receiving,
        )

    # --- asking ---

    async def ask(self) -> None:
        """Send each online peer what it is asked next, unless it has got that already."""
        run = self._run
        if (cohort := run.cohort) is None:
            return
        state, uploads = self._files.open(cohort), self._store.uploads
        self._requests.cancel(
            lambda r: (
                r.kind in STEPS and r.seconds > _ASK_AGAIN_S and not uploads.is_receiving(r.peer)
            )
        )
        asked, answered = step_of(cohort, state)
        skipped = self._requests.asked(STEPS) | answered.keys()
        online = self._ctx.online()
        groups: dict[tuple[SecureStep, bytes], list[str]] = {}
        whole = encode(state.cohort.request) if cohort.step == "share" else b""
        for peer in asked:
            if peer in skipped or peer not in online or run.peers.get(peer) == "refused":
                continue
            if (request := state.request_for(peer)) is not None:
                step = _STEP_OF.get(type(request), "unmask")
                groups.setdefault((step, whole or encode(request)), []).append(peer)
        for (step, data), peers in groups.items():
            await self._requests.send_step(run, step, data, peers)

    # --- answers ---

    async def take(self, request: Request, reply: Message) -> RunEvent | None:
        """Take the answer to a step; the event to record, if it has one. Raises UpdateRefused."""
        run = self._run
        if reply.has_error():
            if reply.error.code != AGENT_FAILED:
                return None  # the peer is gone; it is asked again when it is back
            refusal = refusals.decode(reply.error.reason or "")
            raise UpdateRefused(refusal.kind, refusal.text)
        if run.cohort is None or request.kind not in run.open_kinds:
            if request.kind == "mask":
                raise UpdateRefused("late", "the sum has begun without this masked update")
            return None
        expected = validation.ExpectedReply(request.kind, run.head, {})
        claim = reply_events.checked_claim(run, self._ctx, request.peer, reply, expected)
        state = self._open_sum()
        with reply_events.refused_as("bad answer"):
            answer = decode_answer(request.kind, read_answer(reply, claim))  # type: ignore[arg-type]
            if not isinstance(answer, MaskAnswer):
                state.take(request.peer, answer)
                return None
            if answer.cohort != state.cohort.id:
                raise BadMessage("it is for another cohort")
        await asyncio.to_thread(
            answers.check_masked, self._store, state.cohort, request.peer, answer
        )
        return run_events.MaskedUpdateAccepted(
            run.round, request.peer, answer.digest, answer.nbytes
        )

    # --- decisions ---

    async def fix_cohort(self) -> None:
        """Begin a sum over the peers whose cards are here."""
        run, uploads = self._run, self._store.uploads
        kind: SumKind = "evaluate" if run.evaluating else "train"
        cards = {
            peer: decode_ready(uploads.read(peer, update.digest))
            for peer, update in run.updates.items()
        }
        chosen = plans.choose(run, cards)
        left_out = [
            run_events.UpdateRefused(run.round, peer, reason, text, kind)
            for peer, (reason, text) in chosen.left_out.items()
        ]
        if len(chosen.peers) < decisions.needs(run):
            await self._recorder.record(*left_out)
            await self._give_up(f"only {len(chosen.peers)} of {len(cards)} peers fit together")
            return
        data = await asyncio.to_thread(self._request_data, run, kind, cards, chosen)
        if len(data) > _MAX_REQUEST_BYTES:
            raise CommonweightError(
                f"the cards of {len(chosen.peers)} peers and the plan for the model have "
                f"{len(data):,} bytes, and a message has at most {_MAX_REQUEST_BYTES:,}",
                "ask fewer peers: --select 1x with a smaller quorum",
            )
        event = run_events.CohortFixed(
            run.round, run.turn, kind, chosen.peers, await self._files.write("request", data)
        )
        await self._recorder.record(*left_out, event)
        self._timer.open_phase()

    def _request_data(
        self, run: Run, kind: SumKind, cards: Mapping[str, ReadyAnswer], chosen: plans.Choice
    ) -> bytes:
        schema = self._parts.model.schema
        if run.spec.codec == registry.SUMS:
            with WeightsFile(self._store.version_path(run.head)) as head:
                schema = sums.schema_of(head)
        limits = plans.tensor_limits(run, schema, self._largest_changes(run))
        request = plans.make_request(
            run,
            kind,
            self._ctx.fleet,
            cards,
            chosen,
            schema,
            limits,
        )
        return encode(request)

    def _largest_changes(self, run: Run) -> list[float]:
        """Of each tensor, the largest change of the last mean; empty if it is not known."""
        if self._largest[0] == run.head:
            return self._largest[1]
        own = run.own_rounds
        if not own or self._parts.adapter.slots(self._parts.strategy):
            return []  # a server optimizer's step says nothing about the mean
        before = own[-2].digest if len(own) > 1 else run.first
        try:
            with (
                WeightsFile(self._store.version_path(run.head)) as new,
                WeightsFile(self._store.version_path(before)) as old,
            ):
                return plans.largest_changes(new, old)
        except (FileNotFoundError, BadWeights):
            return []

    async def fix_sharers(self) -> None:
        """Keep the sealed shares of all on disk, and continue with those peers."""
        run, state = self._run, self._open_sum()
        sharers = state.fix_sharers().sharers
        data = encode({peer: state.shares[peer] for peer in sharers})
        event = run_events.SharersFixed(run.round, sharers, await self._files.write("shares", data))
        await self._next_step(event)

    async def fix_survivors(self) -> None:
        """Continue with the peers whose masked updates are here."""
        survivors = self._open_sum().fix_survivors().survivors
        await self._next_step(run_events.SurvivorsFixed(self._run.round, survivors))

    async def _next_step(self, event: RunEvent) -> None:
        await self._recorder.record(event)
        self._requests.cancel(lambda request: request.kind in STEPS)
        self._timer.open_phase()

    async def lose(self, because: str) -> None:
        """Give the open cohort up."""
        run = self._run
        await self._recorder.record(run_events.CohortLost(run.round, because[:400]))
        self._requests.cancel(lambda request: request.round == run.round)
        self._requests.clear_work()
        self._store.uploads.clear()
        failpoint("secure.cleared")
        self._timer.open_phase()
        what = (
            f"round {run.round} is trained again, with new keys"
            if self._run.state is not run.state
            else f"round {run.round} closes without an evaluation"
        )
        self._recorder.report("warning", f"secure: cohort lost: {because}; {what}")

    # --- the sum ---

    async def commit(self, states: StateStore) -> CommittedVersion | None:
        """Make the version. None if the cohort was lost: that is recorded."""
        made = await self._unless_lost(fold.commit, self._run, self._store, states)
        if made is None:
            return None
        self._largest = made.version.digest, made.largest
        self._report_false(made.false_shares)
        return made.version

    async def evaluate(self) -> Evaluation | None:
        """The metrics of the open evaluation. None if the cohort was lost: that is recorded."""
        return await self._unless_lost(fold.evaluate, self._run, self._store)

    async def _unless_lost(self, make: Callable[..., T], *given: object) -> T | None:
        """What `make` makes of the sum in a thread. None if the cohort was lost."""
        try:
            return await asyncio.to_thread(make, *given, self._parts.strategy, self._open_sum())
        except CohortLost as err:
            await self._give_up(err.message)
            return None

    async def _give_up(self, because: str) -> None:
        """Record that the sum is void. Raises CommonweightError after too many of them."""
        step = decisions.lose(self._run, because)
        if isinstance(step, steps.EndRun):
            raise CommonweightError(step.because)
        await self.lose(because)

    def _report_false(self, false_shares: frozenset[tuple[str, str]]) -> None:
        for owner, holder in sorted(false_shares):
            name = self._ctx.name_of
            self._recorder.report(
                "warning",
                f"secure: a share of {name(owner)}'s secret from {name(holder)} is false: one of "
                "the two has sent wrong data; other shares replaced it",
            )
