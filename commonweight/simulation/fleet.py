"""The coordinator's side of a simulation: its real runs over peers that a pool of workers plays."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from flwr.app import Error, Message
from msgspec.structs import replace

from agent.clientapp.outbox import UPDATE
from agent.transport.coordinator_client import pack_message, unpack_message
from commonweight.simulation.peer import Answer, Job
from commonweight.simulation.peer_queues import PeerQueues
from commonweight.simulation.plan import Plan
from commonweight.simulation.pool import Worker
from coordinator.fleet import fleet_events
from coordinator.fleet.fleet_events import PeerJoined
from coordinator.fleet.reducer import reduce
from coordinator.fleet.registry import Registry
from coordinator.fleet.state import Fleet
from coordinator.remote.recording import Recorder
from coordinator.runs.context import RunContext
from coordinator.runs.manager import RunManager
from coordinator.runs.state import Run
from coordinator.storage.settings import Keys
from coordinator.storage.sqlite_ledger import SqliteLedger
from coordinator.storage.weight_store import WeightStore
from coordinator.transport.flower import Superlink
from coordinator.transport.flower_grid import InProcessGrid
from coordinator.transport.weights import WeightTransfer
from protocols.enrollment import identity
from protocols.errors import CommonweightError
from protocols.local.background_unlink import unlink
from protocols.messages.envelope import CoordinatorBody, RoundClosed
from protocols.messages.fleet_names import FleetNames
from protocols.messages.mqtt import SequencedSigner
from protocols.messages.refusals import AGENT_FAILED, refusal_of
from protocols.messages.states import PeerState, RunState
from protocols.messages.topics import COORDINATOR
from protocols.messages.work import FlowerMessage, PollRequest

HEARTBEAT_S = 5.0
#: The interval of the checks whether a round needs the peers that dropped out.
_AWAY_S = 0.2
#: The interval of a run's look at replies while others are on their way; and the addition for each
#: of these.
_WAKE_S, _WAKE_S_PER_MESSAGE = 0.05, 2e-4
#: A worker gets as many messages at a time as take about this long.
_BATCH_S = 0.1
#: Flower's nodes stay online for this long (s).
_FOREVER_S = 1e9


class SimulatedFleet:
    """A coordinator over `home` with the peers of `plan`, all online. It has no network.

    `dropout`: the share of the peers that a round asks to train and that leave before they answer,
    until the round is closed. `on_round` is called after a round was closed.
    """

    def __init__(
        self,
        plan: Plan,
        keys: Keys,
        *,
        dropout: float = 0.0,
        on_round: Callable[[Run], None] = lambda run: None,
    ) -> None:
        home = Path(plan.home)
        self._plan, self._dropout, self._on_round = plan, dropout, on_round
        self._ledger = SqliteLedger(home / "ledger.db", synced=False)
        self.store = WeightStore(home)
        self._transfer = WeightTransfer(self.store)
        self._superlink = Superlink()
        # Flower draws random node ids; they are sorted, so that a seed selects the same peers.
        public = [plan.public(index) for index in range(len(plan.keys))]
        nodes = sorted(map(self._superlink.register_node, public))
        for node in nodes:
            self._superlink.state.activate_node(node, _FOREVER_S)
        names = list(map(identity.peer_id, public))
        self._index_of = {name: index for index, name in enumerate(names)}
        self._node_of = dict(zip(names, nodes, strict=True))
        self._peer_of = dict(zip(nodes, names, strict=True))
        self._enroll(public)
        self._registry = Registry(self._ledger)
        self._away: set[str] = set()
        self._all = self._online = frozenset(names)
        self._queues = PeerQueues(self._index_of, 0)
        #: How many messages each peer got.
        self._numbers: Counter[str] = Counter()
        #: The version that each peer has.
        self._bases: dict[str, str] = {}
        self._working = 0
        self._wakes = False
        self._shown = Fleet(fleet=keys.fleet, name=socket.gethostname())
        self._sequencer = SequencedSigner(COORDINATOR, keys.sign_key.sign)
        self._recorder: Recorder | None = None
        shutil.rmtree(plan.uploads, ignore_errors=True)  # of a simulation that was killed
        plan.uploads.mkdir()
        self._publish_peers()
        self.runs = RunManager(self._context(keys), self._registry, lambda: {plan.task})

    def _enroll(self, public: Sequence[bytes]) -> None:
        """Record the peers as members, unless an earlier simulation in this home did."""
        if next(self._ledger.entries(fleet_events.SUBJECT), None) is not None:
            return
        joined = [
            PeerJoined(
                peer=identity.peer_id(key),
                name=f"peer{index:05}",
                labels={},
                sign_public=key,
                node_public=key,
                standing="enrolled",
            )
            for index, key in enumerate(public)
        ]
        self._ledger.append(fleet_events.SUBJECT, list(map(fleet_events.encode, joined)))

    def _publish_peers(self) -> None:
        for peer in self._registry.enrolled():
            self._publish(replace(peer.changed(has_session=True), state=PeerState.IDLE))

    def _context(self, keys: Keys) -> RunContext:
        public = identity.public_bytes(keys.sign_key)
        return RunContext(
            ledger=self._ledger,
            store=self.store,
            transfer=self._transfer,
            grid=InProcessGrid(self._superlink),
            sign=keys.sign_key.sign,
            verify=self._registry.verify,
            is_own_signature=partial(identity.verify, public),
            eligible=lambda: self._online,
            node_of=self._node_of.get,
            peer_of=self._peer_of.__getitem__,
            name_of=lambda peer: self._registry.peers[peer].name,
            ring=lambda peers: self._queues.add(peers),
            publish=self._publish,
            refused=Counter(),
            enrolled=lambda: self._all,
            online=lambda: self._online,
            fleet=keys.fleet,
            check_fleet=FleetNames(keys.fleet).check,
        )

    def close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
        self._ledger.close()

    # --- the run ---

    async def finish(self, run_id: str, workers: Sequence[Worker]) -> Run:
        """Work until the run has ended; return it."""
        self._recorder = Recorder(_free_name(self._plan.folder / "recording.cwrec"))
        self._recorder.snapshot(self._shown)
        driving = asyncio.create_task(self.runs.work(resume=True, until=run_id))
        self._queues = PeerQueues(self._index_of, len(workers))
        helping = [asyncio.create_task(self._work(*one)) for one in enumerate(workers)]
        helping.append(asyncio.create_task(self._send_heartbeats()))
        try:
            # An error of a helper ends the simulation; the run continues with the next one.
            await asyncio.wait([driving, *helping], return_when=asyncio.FIRST_COMPLETED)
            for task in helping:
                if task.done():
                    task.result()
            await driving
        finally:
            for task in (driving, *helping):
                task.cancel()
            await asyncio.gather(driving, *helping, return_exceptions=True)
            for worker in workers:
                await worker.close()
        return self.runs.find(run_id)

    async def _send_heartbeats(self) -> None:
        while True:
            self._superlink.heartbeat()
            await asyncio.sleep(HEARTBEAT_S)

    def _publish(self, body: CoordinatorBody) -> None:
        envelope = self._sequencer.next_envelope(body)
        reduce(self._shown, envelope, time.time())
        if self._recorder is None:
            return
        self._recorder.message(envelope)
        if isinstance(body, RoundClosed) and self.runs.current is not None:
            self._return_all()
            run = self.runs.current.run
            for peer in run.history[-1].contributors:
                self._delete_update(peer)
            self._on_round(run)

    def _delete_update(self, peer: str) -> None:
        """Its version is on disk, so the peer's update is not requested again."""
        unlink(self._plan.peer_folder(self._index_of[peer]) / UPDATE)

    # --- the peers ---

    async def _work(self, place: int, worker: Worker) -> None:
        """Give this worker messages of any peers, as many at a time as take about `_BATCH_S`."""
        job_s = _BATCH_S
        while True:
            rung = await self._queues.next(place, int(_BATCH_S / job_s))
            given = [(peer, job) for peer in rung if (job := self._job_of(peer)) is not None]
            if not given:
                continue
            peers, jobs = zip(*given, strict=True)
            begun = time.monotonic()
            self._working += len(jobs)
            try:
                for peer, answer in zip(peers, await self._answer(worker, jobs), strict=True):
                    self._take(peer, answer)
            finally:
                self._working -= len(jobs)
            job_s = (time.monotonic() - begun) / len(jobs)
            self._wake_soon()

    def _job_of(self, peer: str) -> Job | None:
        """The message of a peer; None if it was canceled, or if the peer drops out."""
        given = self._superlink.poll(self._node_of[peer], PollRequest(wants_work=True)).work
        if given is None:
            return None
        if self._drops_out(peer):
            self._leave(peer)
            return None
        self._numbers[peer] += 1
        return Job(index=self._index_of[peer], number=self._numbers[peer], message=given)

    def _wake_soon(self) -> None:
        """Let the run look at replies: now if no other will come, else at some of them together.
        A look takes longer with more messages on their way."""
        left = self._working + len(self._queues)
        if not left:
            self.runs.wake()
        elif not self._wakes:
            self._wakes = True
            delay_s = _WAKE_S + _WAKE_S_PER_MESSAGE * left
            asyncio.get_running_loop().call_later(delay_s, self._wake)

    def _wake(self) -> None:
        self._wakes = False
        self.runs.wake()

    async def _answer(self, worker: Worker, jobs: Sequence[Job]) -> list[Answer]:
        try:
            return await worker.answer(jobs)
        except CommonweightError as err:
            if len(jobs) > 1:  # one of them may be the cause
                return [one for job in jobs for one in await self._answer(worker, [job])]
            return [Answer(reply=_failure(jobs[0].message, err))]

    def _take(self, peer: str, answer: Answer) -> None:
        """Store an update as the coordinator does, then the reply that names it."""
        if answer.base and self._bases.get(peer) != answer.base:
            self._bases[peer] = answer.base
            self._transfer.bytes_down += self.store.nbytes(answer.base)
        if answer.upload:
            source = self._plan.upload_path(peer, answer.upload)
            self._transfer.bytes_up += source.stat().st_size
            uploads = self.store.uploads
            if not uploads.path(peer, answer.upload).exists():
                with uploads.begin(peer, answer.upload) as part:
                    os.replace(source, part.path)
                    part.finish()
        self._superlink.poll(self._node_of[peer], PollRequest(reply=answer.reply, wants_work=False))

    def _drops_out(self, peer: str) -> bool:
        """Draw whether a peer leaves instead of training; the same for the same seed."""
        loop = self.runs.current
        if not self._dropout or loop is None or loop.run.kind != "train":
            return False
        run = loop.run
        drawn = hashlib.sha256(f"dropout {run.spec.seed} {run.round} {run.turn} {peer}".encode())
        return int.from_bytes(drawn.digest()[:8]) < self._dropout * 2**64

    def _leave(self, peer: str) -> None:
        """The peer is gone: the run asks another one in its place, if there is one."""
        self._away.add(peer)
        self._online = self._all - self._away
        self._wake_soon()
        asyncio.get_running_loop().call_later(_AWAY_S, self._return_if_stuck)

    def _return_if_stuck(self) -> None:
        """Let the peers return if a round needs them: no peer works, and no other peer can."""
        loop = self.runs.current
        waits = loop is not None and loop.run.state is RunState.TRAINING and not loop.run.pending
        if waits and not self._working and not self._queues:
            self._return_all()
        elif self._away:
            asyncio.get_running_loop().call_later(_AWAY_S, self._return_if_stuck)

    def _return_all(self) -> None:
        if self._away:
            self._away.clear()
            self._online = self._all
            self.runs.wake()


def _failure(given: FlowerMessage, err: CommonweightError) -> FlowerMessage:
    error = Error(AGENT_FAILED, refusal_of(err).encode())
    return pack_message(Message(error, reply_to=unpack_message(given)))


def _free_name(path: Path) -> Path:
    """The path with a number, if there is such a file already."""
    number, free = 2, path
    while free.exists():
        free, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return free
