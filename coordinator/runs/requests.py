"""What peers are asked for: the strategy chooses them, the work is signed, questions go out.

A question is one message to one peer. It is under way until its answer is judged, or until it is
taken back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import Strategy

from coordinator.runs import late_updates
from coordinator.runs.context import RunContext
from coordinator.runs.model import RunModel
from coordinator.runs.state import Assignment, Run
from coordinator.strategies.adapter import StrategyAdapter
from coordinator.strategies.failures import strategy_errors
from coordinator.transport.flower_records import VersionRecord, one_config
from protocols.failpoints import failpoint
from protocols.messages.states import RunState
from protocols.messages.work import SIGNED_WORK, Work
from protocols.model import schema_card, weights
from protocols.tables import preprocessing

#: Flower's code for an exception in a ClientApp; agents use it for every failure of theirs.
AGENT_FAILED = 2
#: From turn to turn; a prime, so that no other run's seeds are met soon.
_SEED_STRIDE = 7919


class Request(NamedTuple):
    """A question that is under way: to whom, which, and since when (monotonic s)."""

    peer: str
    round: int
    kind: str
    at: float

    def is_of(self, run: Run) -> bool:
        """True for the question that the run has open now."""
        return (self.round, self.kind) == (run.round, run.kind)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.at


class PendingRequests:
    """Those of one run."""

    def __init__(
        self, ctx: RunContext, adapter: StrategyAdapter, strategy: Strategy, model: RunModel
    ) -> None:
        self._ctx, self._adapter, self._strategy = ctx, adapter, strategy
        self._model = model
        self._in_flight: dict[str, Request] = {}
        #: Answers to questions that were about to be taken back.
        self._arrived: list[Message] = []
        self._ack_futures: dict[str, asyncio.Future[bool]] = {}
        self._content: RecordDict | None = None

    # --- putting them ---

    async def configure(
        self, run: Run, eligible: Sequence[str], opening: int = 0
    ) -> tuple[str, ...]:
        """Let the strategy choose among `eligible` and say what they get; the chosen peers."""
        ctx = self._ctx
        ctx.grid.eligible = {n for p in eligible if (n := ctx.node_of(p)) is not None}
        kind = "train" if opening or run.state is RunState.TRAINING else "evaluate"
        number = opening or run.round
        model = None
        if self._adapter.reads_weights:
            model = weights.load(ctx.store.version_path(run.head))
        arrays = VersionRecord(run.head, model)
        nodes, extra = await asyncio.to_thread(self._configured, kind, number, arrays)
        self._content = None
        if nodes:
            config = self._work_record(run, kind, number, extra)
            self._content = RecordDict({"arrays": VersionRecord(run.head), "config": config})
        return tuple(sorted(map(ctx.peer_of, nodes)))

    def _configured(
        self, kind: str, number: int, base: VersionRecord
    ) -> tuple[list[int], dict[str, int | float]]:
        """The nodes that the strategy chooses, and what it tells the task.

        Raises StrategyFailed, CommonweightError.
        """
        configure = getattr(self._strategy, f"configure_{kind}")
        with strategy_errors(self._adapter.flower):
            chosen = list(configure(number, base, ConfigRecord(), self._ctx.grid))
            nodes = [message.metadata.dst_node_id for message in chosen]
            return nodes, one_config(chosen) if chosen else {}

    def _work_record(
        self,
        run: Run,
        kind: Any,
        number: int,
        extra: Mapping[str, int | float] = MappingProxyType({}),
        given: Assignment | None = None,
    ) -> ConfigRecord:
        """The signed work. `extra`: what the strategy tells the task, over the run's settings.

        `given` is a peer's own work. Another turn on a version has another seed, or it would be
        the same training once more.
        """
        spec = run.spec
        head, turn = (given.base, given.turn) if given else (run.head, 0)
        for_trainers = self._adapter.trainer_settings(spec.strategy_args)
        parent, patch_bytes = self._model.patch_to(head)
        shared = {"preprocessing": run.preprocessing} if run.preprocessing else {}
        work = Work(
            run=run.id,
            since=run.since,
            round=number,
            kind=kind,
            task=spec.task,
            base=given.base if given else _base(run, kind),
            nbytes=self._model.nbytes,
            parent=parent,
            patch_bytes=patch_bytes,
            codec=spec.codec,
            turn=turn,
            seed=spec.seed + turn * _SEED_STRIDE,
            settings={**spec.settings, **extra, **for_trainers, **shared},
            card=schema_card.encode(run.card).decode() if run.card else "",
            deadline_s=spec.deadline_s,
        )
        payload, signature = SIGNED_WORK.seal(work, self._ctx.sign)
        return ConfigRecord({"work": payload, "signature": signature})

    def clear_work(self) -> None:
        """The next question is another one."""
        self._content = None

    async def send_pending(self, run: Run) -> None:
        """Send the open question to every pending peer that has it not yet."""
        if run.state is RunState.AGGREGATING:  # who is still pending is late: nothing more is asked
            return
        reached = {asked.peer for asked in self._in_flight.values() if asked.is_of(run)}
        eligible = self._ctx.eligible()
        # Never before its training: another answer would push that one's out of its outbox.
        waits = run.assignments.keys() - {
            a.peer for a in self._in_flight.values() if a.kind == "train"
        }
        peers = [p for p in run.pending if p not in reached and p in eligible and p not in waits]
        if not peers:
            return
        is_query = run.kind not in ("train", "evaluate")
        if is_query:
            if run.kind in ("init", "recall"):
                self._model.expect_first_weights()
            content = RecordDict({"config": self._work_record(run, run.kind, run.round)})
        else:
            if self._content is None:  # after a restart
                await self.configure(run, sorted(eligible))
            if self._content is None:
                return
            content = self._content
        message_type = f"query.{run.kind}" if is_query else run.kind
        await self._send(run, content, message_type, peers, run.round)

    async def send_assignments(self, run: Run) -> None:
        """Buffered: put to each peer the training that it was given, if it has it not yet."""
        reached = {(a.peer, a.round) for a in self._in_flight.values() if a.kind == "train"}
        eligible = self._ctx.eligible()
        alike: dict[Assignment, list[str]] = {}
        for peer, given in sorted(run.assignments.items()):
            if not given.lost and peer in eligible and (peer, given.round) not in reached:
                alike.setdefault(given, []).append(peer)
        for given, peers in alike.items():
            content = await self._training(run, given, peers)
            await self._send(run, content, "train", peers, given.round)

    async def _training(self, run: Run, given: Assignment, peers: Sequence[str]) -> RecordDict:
        """What the strategy tells those who train on this version: the peers are chosen."""
        ctx = self._ctx
        ctx.grid.eligible = {n for p in peers if (n := ctx.node_of(p)) is not None}
        model = None
        if self._adapter.reads_weights:
            model = weights.load(ctx.store.version_path(given.base))
        base = VersionRecord(given.base, model)
        _, extra = await asyncio.to_thread(self._configured, "train", given.round, base)
        config = self._work_record(run, "train", given.round, extra, given)
        return RecordDict({"arrays": VersionRecord(given.base), "config": config})

    async def _send(
        self,
        run: Run,
        content: RecordDict,
        message_type: str,
        peers: Sequence[str],
        number: int,
    ) -> None:
        """Send one question to these peers."""
        outgoing: list[Message] = []
        for peer in peers:
            if (node := self._ctx.node_of(peer)) is not None:
                outgoing.append(Message(content, node, message_type, group_id=run.id))
        failpoint("work.pushing")
        sent = await asyncio.to_thread(self._ctx.grid.push_messages, outgoing)
        failpoint("work.pushed")
        nodes = {m.metadata.message_id: m.metadata.dst_node_id for m in outgoing}
        reached_now = {mid: self._ctx.peer_of(nodes[mid]) for mid in sent}
        question = (number, message_type.removeprefix("query."), time.monotonic())
        self._in_flight |= {mid: Request(peer, *question) for mid, peer in reached_now.items()}
        self._ctx.ring(list(reached_now.values()))

    def ring_again(self) -> None:
        """Doorbells were lost with the broker: ring at every peer whose answer is awaited."""
        self._ctx.ring(sorted({asked.peer for asked in self._in_flight.values()}))

    # --- their answers ---

    async def take_replies(self) -> list[tuple[str, Request, Message]]:
        """Answers that are there, with their questions, which are no longer under way."""
        if not self._in_flight:
            return []
        pulled = await asyncio.to_thread(self._ctx.grid.pull_messages, set(self._in_flight))
        # The arrived last: of a message that was taken back meanwhile Flower says that it is gone.
        replies = {m.metadata.reply_to_message_id: m for m in (*pulled, *self._arrived)}
        self._arrived = []
        if replies:
            failpoint("reply.pulled")
        # All at once: a session that opens meanwhile must not take back what is answered.
        found = {q: asked for q in replies if (asked := self._in_flight.pop(q, None))}
        return [(question, asked, replies[question]) for question, asked in found.items()]

    def ack_future(self, question: str) -> asyncio.Future[bool]:
        """Done when the answer to a question is in the ledger (True) or never will be (False)."""
        known = question in self._in_flight
        found: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if not known:
            found.set_result(False)
        return self._ack_futures.setdefault(question, found) if known else found

    def acknowledge(self, questions: Iterable[str], settled: bool) -> None:
        for question in questions:
            waiting = self._ack_futures.pop(question, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(settled)

    def late_bases(self, run: Run) -> dict[str, str]:
        """By peer that is still at the training of a round that has closed: its base."""
        return {
            asked.peer: late_updates.base_of(run, asked.round)
            for asked in self._in_flight.values()
            if asked.kind == "train" and late_updates.is_late(run, asked.round)
        }

    # --- taking them back ---

    def cancel_from(self, peer: str) -> None:
        self._cancel({q for q, asked in self._in_flight.items() if asked.peer == peer})

    def cancel_current(self, run: Run, peers: Sequence[str]) -> None:
        """The open question, from these peers: it is put to them anew."""
        found = self._in_flight.items()
        self._cancel({q for q, asked in found if asked.peer in peers and asked.is_of(run)})

    def cancel_expired(self, run: Run) -> None:
        """All of rounds that are too long ago."""
        found = self._in_flight.items()
        self._cancel(
            {q for q, asked in found if late_updates.is_expired(run, asked.kind, asked.round)}
        )

    def cancel_evaluations(self) -> None:
        """All of them: another version is to be evaluated."""
        self._cancel({q for q, asked in self._in_flight.items() if asked.kind == "evaluate"})

    def cancel_overdue(self, longer_s: float) -> None:
        """Training that is under way for longer: the question, or its answer, may be lost."""
        found = self._in_flight.items()
        self._cancel({q for q, a in found if a.kind == "train" and a.seconds > longer_s})

    def cancel_all(self) -> None:
        self._cancel(set(self._in_flight))

    def _cancel(self, questions: set[str]) -> None:
        """Forget questions, but for those that are answered: the ledger is to hear of each."""
        if not questions:
            return
        found = self._ctx.grid.pull_messages(questions)
        # Flower's own errors, of nodes that are gone, are nobody's answers.
        self._arrived += [m for m in found if not m.has_error() or m.error.code == AGENT_FAILED]
        questions -= {reply.metadata.reply_to_message_id for reply in self._arrived}
        self._ctx.grid.forget(questions)
        for question in questions:
            del self._in_flight[question]
        self.acknowledge(questions, False)


def _base(run: Run, kind: str) -> str:
    """The version, or preprocessing, that a question is about."""
    if kind == "describe":
        return preprocessing.digest(run.preprocessing)
    if kind == "recall":
        return run.target_version.digest if run.target_version else ""
    return run.head if kind in ("train", "evaluate") else ""
