"""Requests to peers: the strategy chooses the peers, the work is signed, messages are sent.

Replies and cancellation: `in_flight`.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp.strategy import Strategy
from msgspec.structs import replace

from coordinator.runs import late_updates, messages
from coordinator.runs.context import RunContext
from coordinator.runs.in_flight import Request, RequestsInFlight
from coordinator.runs.model import RunModel
from coordinator.runs.state import Assignment, Run
from coordinator.storage.run_events import RunSpec
from coordinator.strategies import personal
from coordinator.strategies.adapter import StrategyAdapter
from coordinator.strategies.failures import strategy_errors
from coordinator.transport.flower_records import REQUEST, InMemoryRecord, shared_config
from protocols.errors import UpdateRefused
from protocols.messages.envelope import Settings
from protocols.messages.refusals import AGENT_FAILED
from protocols.messages.states import RunState
from protocols.messages.work import SIGNED_WORK, Work
from protocols.model import schema_card, weights
from protocols.model.schema_card import SchemaCard
from protocols.tables.model_scores import is_open

#: Added to the seed for each further turn on a version. A prime, so that seeds of runs rarely meet.
_SEED_STRIDE = 7919


class PendingRequests(RequestsInFlight):
    """The requests in flight of one run, by message id. `late`: see `Run`."""

    def __init__(
        self,
        ctx: RunContext,
        adapter: StrategyAdapter,
        strategy: Strategy,
        model: RunModel,
        late: Mapping[str, int],
    ) -> None:
        super().__init__(ctx)
        #: By peer, the round of a training whose request was lost with its session or was `late`
        #: when the coordinator last stopped; and those of these peers that may have a new session.
        self._interrupted = dict(late)
        self._are_back: set[str] = set()
        self.use(adapter, strategy, model)

    def use(self, adapter: StrategyAdapter, strategy: Strategy, model: RunModel) -> None:
        """Prepare requests by this strategy from now on."""
        self._adapter, self._strategy, self._model = adapter, strategy, model
        #: The open request of the round.
        self._content: RecordDict | None = None

    # --- sending ---

    async def configure(
        self, run: Run, eligible: Sequence[str], opening: int = 0
    ) -> tuple[str, ...]:
        """Let the strategy choose among `eligible` and set the round's request; the chosen peers.

        Raises StrategyFailed, CommonweightError.
        """
        kind = "train" if opening or run.state is RunState.TRAINING else "evaluate"
        work = Assignment(opening or run.round, run.head, run.turn)
        nodes, extra = await self._ask_strategy(run, kind, work, eligible)
        self._content = self._content_of(run, kind, work, extra) if nodes else None
        return tuple(sorted(map(self._ctx.peer_of, nodes)))

    async def _ask_strategy(
        self, run: Run, kind: str, work: Assignment, eligible: Sequence[str]
    ) -> tuple[list[int], dict[str, int | float]]:
        """The nodes that the strategy chooses, and its settings for the task."""
        ctx = self._ctx
        ctx.grid.eligible = {n for p in eligible if (n := ctx.node_of(p)) is not None}
        configure = getattr(self._strategy, f"configure_{kind}")

        def call() -> list[Message]:
            path, reads_weights = ctx.store.version_path(work.base), self._adapter.reads_weights
            # FedAvg passes the record on without reading it.
            base = InMemoryRecord(weights.load(path) if reads_weights else {})
            with strategy_errors(self._adapter.flower):
                return list(configure(work.round - run.begun, base, ConfigRecord(), ctx.grid))

        messages = await asyncio.to_thread(call)
        with strategy_errors(self._adapter.flower):
            nodes = [message.metadata.dst_node_id for message in messages]
            return nodes, shared_config(messages) if messages else {}

    def _content_of(
        self, run: Run, kind: str, work: Assignment, extra: Mapping[str, int | float]
    ) -> RecordDict:
        return RecordDict({"config": self._work_record(run, kind, work, extra)})

    def _work_record(
        self,
        run: Run,
        kind: Any,
        assignment: Assignment,
        extra: Mapping[str, int | float] = MappingProxyType({}),
        request: bytes = b"",
    ) -> ConfigRecord:
        """The signed work. `extra`: the strategy's settings, which win over the run's. `request`:
        of a step of a secure sum.

        Each further turn on a version has another seed, so it does not repeat the same training.
        """
        spec = run.spec
        for_trainers = personal.trainer_settings(spec)
        parent, patch_bytes = self._model.patch_to(assignment.base)
        shared = {"preprocessing": run.preprocessing} if run.preprocessing else {}
        noise = spec.private.settings() if spec.private else {}
        work = Work(
            run=run.id,
            since=run.since,
            round=assignment.round,
            kind=kind,
            task=spec.task,
            base=assignment.base,
            nbytes=self._model.nbytes,
            parent=parent,
            patch_bytes=patch_bytes,
            codec=spec.work_codec,
            turn=assignment.turn,
            seed=spec.seed + assignment.turn * _SEED_STRIDE,
            settings={**_settings_of(run), **extra, **for_trainers, **shared, **noise},
            card=schema_card.encode(_for_peers(run.card)).decode()
            if run.card and not request
            else "",
            deadline_s=spec.deadline_s,
            # A buffer may have several updates of one peer.
            cohort=1 if run.buffered else spec.quorum,
            fleet=self._ctx.fleet,
            request=hashlib.sha256(request).hexdigest() if request else "",
            scores=kind == "evaluate" and _takes_scores(spec),
            choice=messages.owners_text(run) if not request else "",
            fragments=spec.fragments if spec.fragments > 1 else 0,
            ahead=kind == "train" and spec.overlap > 0 and assignment.round < spec.rounds,
            begun=run.begun,
        )
        payload, signature = SIGNED_WORK.seal(work, self._ctx.sign)
        log = self._ctx.log_head()
        return ConfigRecord(
            {"work": payload, "signature": signature, "head": log.head, "log": log.page}
        )

    def clear_work(self) -> None:
        """Forget the round's request: the next one is different."""
        self._content = None

    async def send_pending(self, run: Run) -> None:
        """Send the open request to every pending peer that has not got it yet."""
        if run.folds_late:
            await self._send_late(run)
        if run.state is RunState.AGGREGATING:  # pending peers are late now: ask nothing more
            return
        reached = {request.peer for request in self._in_flight.values() if request.is_of(run)}
        eligible = self._ctx.eligible()
        # Training goes first: a second reply would replace it in the peer's outbox.
        waiting = run.assignments.keys() - {peer for peer, _ in self._in_training()}
        peers = [p for p in run.pending if p not in reached and p in eligible and p not in waiting]
        if not peers:
            return
        if run.kind not in ("train", "evaluate"):
            if run.kind in ("init", "recall"):
                self._model.expect_first_weights()
            query = Assignment(run.round, _base_of_query(run), run.turn)
            content = RecordDict({"config": self._work_record(run, run.kind, query)})
            await self._send(run, content, f"query.{run.kind}", peers, run.round)
            return
        if self._content is None:  # after a restart
            await self.configure(run, sorted(eligible))
        if self._content is not None:
            await self._send(run, self._content, run.kind, peers, run.round)

    def asked(self, kinds: Collection[str]) -> set[str]:
        """Peers with a request of one of these kinds in flight."""
        return {request.peer for request in self._in_flight.values() if request.kind in kinds}

    async def send_step(self, run: Run, kind: str, request: bytes, peers: Sequence[str]) -> None:
        """Ask these peers for one step of a secure sum."""
        work = Assignment(run.round, run.head, run.turn)
        config = self._work_record(run, kind, work, request=request)
        content = RecordDict({"config": config, REQUEST: ConfigRecord({"request": request})})
        await self._send(run, content, f"query.{kind}", peers, run.round)

    def _in_training(self) -> set[tuple[str, int]]:
        """The training in flight: peer and round."""
        return {(r.peer, r.round) for r in self._in_flight.values() if r.kind == "train"}

    async def send_assignments(self, run: Run) -> None:
        """Buffered: send each peer its assignment, if it has not got it yet."""
        reached, eligible = self._in_training(), self._ctx.eligible()
        peers_of: dict[Assignment, list[str]] = {}
        for peer, assignment in sorted(run.assignments.items()):
            is_new = (peer, assignment.round) not in reached
            if is_new and not assignment.lost and peer in eligible:
                peers_of.setdefault(assignment, []).append(peer)
        for assignment, peers in peers_of.items():
            await self._send_training(run, assignment, peers)

    async def _send_training(self, run: Run, work: Assignment, peers: Sequence[str]) -> None:
        # The peers are chosen already: only the strategy's settings count.
        _, extra = await self._ask_strategy(run, "train", work, peers)
        content = self._content_of(run, "train", work, extra)
        await self._send(run, content, "train", peers, work.round)

    async def take_replies(self) -> list[tuple[str, Request, Message]]:
        taken = await super().take_replies()
        for _, request, reply in taken:  # Flower's own errors say that the session has ended
            if request.kind == "train" and reply.has_error() and reply.error.code != AGENT_FAILED:
                self._interrupted[request.peer] = request.round
        return taken

    def cancel_from(self, peer: str) -> None:
        before = self._in_training()
        super().cancel_from(peer)
        lost = before - self._in_training()
        self._interrupted |= dict(sorted(lost, reverse=True))  # the older of two
        self._are_back.add(peer)

    async def _send_late(self, run: Run) -> None:
        """Repeat requests for late updates to peers with a new session. A part of such an update
        may be here already."""
        at_work, eligible = dict(self._in_training()), self._ctx.eligible()
        for peer, number in list(self._interrupted.items()):
            if peer in at_work:  # it was asked for something else
                del self._interrupted[peer]
            elif late_updates.is_late(run, number):
                try:
                    assignment = late_updates.late_assignment(run, peer, number)
                except UpdateRefused:  # it counts already, or is too late
                    del self._interrupted[peer]
                    continue
                if peer in self._are_back & eligible:
                    self._are_back.discard(peer)
                    await self._send_training(run, assignment, [peer])

    async def _send(
        self, run: Run, content: RecordDict, message_type: str, peers: Sequence[str], number: int
    ) -> None:
        """Send one request to these peers."""
        outgoing: list[tuple[Request, Message]] = []
        for peer in peers:
            if (node := self._ctx.node_of(peer)) is not None:
                request = Request(peer, number, message_type.removeprefix("query."))
                outgoing.append((request, Message(content, node, message_type, group_id=run.id)))
        await self.push(outgoing)

    def late_bases(self, run: Run) -> dict[str, str]:
        """The base of each peer that still trains for a closed round."""
        waiting = self._interrupted if run.folds_late else {}
        rounds = waiting | dict(self._in_training())
        return {
            peer: late_updates.base_of(run, number)
            for peer, number in rounds.items()
            if late_updates.is_late(run, number)
        }


def _for_peers(card: SchemaCard) -> SchemaCard:
    """The card as peers compare it: each knows the settings of its own task."""
    return replace(card, settings={})


def _settings_of(run: Run) -> Settings:
    """The run's settings as peers get them. Only the request that compares models names `auto`,
    which older agents do not know."""
    settings = run.spec.settings
    if run.comparing or not is_open(run.spec.task, settings):
        return settings
    return {name: value for name, value in settings.items() if name != "model"}


def _base_of_query(run: Run) -> str:
    """The version, or the digest of the preprocessing, that a query is about; else empty."""
    if run.kind == "recall" and run.target_version:
        return run.target_version.digest
    return run.described_base if run.kind == "describe" else ""


def _takes_scores(spec: RunSpec) -> bool:
    """False for a secure sum that may include agents of older versions, which send no scores: all
    peers of a sum have the same tallies."""
    return not spec.secure or spec.settings.get("class_weights") == "balanced"
