"""A fleet in one process: the real run loop, strategies, Grid, codecs, validation and trainer.

It leaves out HTTP, TLS, MQTT and the trainer's child process: an agent is an object that takes its
message from Flower's LinkState and answers it. So a hundred rounds take about a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from flwr.app import Message
from msgspec.structs import replace

from agent.clientapp import secure_rules
from agent.clientapp.app import Client
from agent.clientapp.interfaces import PeerIdentity, Transport
from agent.clientapp.outbox import Outbox
from agent.clientapp.owner_rules import OwnerRules
from agent.clientapp.privacy_budget import PrivacyBudget
from agent.clientapp.secure_turns import SecureTurns
from agent.data.settings import DataSettings
from agent.home.secure_store import TurnStore
from agent.home.settings_schema import AgentSettings
from agent.trainer.in_process import InProcessTrainer
from agent.transport.coordinator_client import pack_message, unpack_message
from benchmarks.quality.liars import Liar, Lie
from coordinator.runs import state, transitions
from coordinator.runs.context import RunContext
from coordinator.runs.loop import RunLoop
from coordinator.runs.state import Run
from coordinator.storage import run_events
from coordinator.storage.run_events import RunSpec
from coordinator.storage.sqlite_ledger import SqliteLedger
from coordinator.storage.weight_store import WeightStore
from coordinator.transport.flower import Superlink
from coordinator.transport.flower_grid import InProcessGrid
from coordinator.transport.weights import WeightTransfer
from protocols.enrollment import identity
from protocols.enrollment.identity import SigningKey
from protocols.errors import CommonweightError
from protocols.messages.work import PollRequest, Work
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.privacy.secagg.turn import Me

#: A folder in memory, if there is one, because this data need not survive a power cut.
MEMORY = Path("/dev/shm")
FLEET = "quality"


class Peer(Transport):
    """An agent as an object: keys, client, trainer."""

    def __init__(
        self,
        name: str,
        folder: Path,
        transfer: WeightTransfer,
        coordinator: SigningKey,
        trainer: InProcessTrainer,
        sign_key: SigningKey | None = None,
    ) -> None:
        self.sign_key, self.name = sign_key or identity.new_signing_key(), name
        self._transfer = transfer
        #: The digest of the last upload.
        self.uploaded = ""
        folder.mkdir()
        me = PeerIdentity(name, self.sign_key.sign, identity.public_bytes(coordinator), FLEET)
        self.owner = AgentSettings(tasks=("*",))
        self.ledger = folder / "privacy.db"
        self.client = Client(
            me,
            trainer,
            self,
            Outbox(folder, me),
            OwnerRules(lambda: self.owner, budget=PrivacyBudget(self.ledger, lambda: self.owner)),
            secure_turns=lambda: self._secure_turns(folder),
        )

    def _secure_turns(self, folder: Path) -> SecureTurns:
        me = Me(self.name, identity.public_bytes(self.sign_key), self.sign_key.sign)
        return SecureTurns(me, TurnStore(folder), lambda: secure_rules.pins(self.owner))

    def fetch(self, work: Work) -> Path:
        return self._transfer.store.version_path(work.base)

    def send(self, digest: str, path: Path) -> None:
        """Store an upload as the coordinator does, without the HTTP request."""
        uploads = self._transfer.store.uploads
        if self.uploaded:
            uploads.drop(self.name, self.uploaded)
        self.uploaded = digest
        with uploads.begin(self.name, digest) as part:
            shutil.copyfile(path, part.path)
            part.finish()
        self._transfer.bytes_up += path.stat().st_size


class InProcessFleet:
    """A coordinator's parts and its peers, over one folder. `parts[i]` are peer i's data, and
    `attack[i]` is how it lies. `secure`: the peers have the ids of their keys, and their owners
    trust each other, as secure runs need."""

    def __init__(
        self,
        folder: Path,
        parts: Sequence[DataSettings],
        threads: int = 1,
        attack: Mapping[int, Lie] = MappingProxyType({}),
        *,
        secure: bool = False,
    ) -> None:
        self.lane = WeightStore(folder)
        self.transfer = WeightTransfer(self.lane)
        self.ledger = SqliteLedger(folder / "ledger.db")
        self.superlink = Superlink()
        self.grid = InProcessGrid(self.superlink)
        self._sign_key = identity.new_signing_key()
        # Flower draws random node ids; they are sorted, so that a seed selects the same peers.
        nodes = sorted(
            self.superlink.register_node(identity.node_public_pem(identity.new_node_key()))
            for _ in parts
        )
        self.peers: dict[str, Peer] = {}
        self._node_of: dict[str, int] = {}
        for number, (data, node) in enumerate(zip(parts, nodes, strict=True)):
            key = identity.new_signing_key()
            name = identity.peer_id(identity.public_bytes(key)) if secure else f"peer{number:02}"
            self.superlink.state.activate_node(node, 1e6)
            self._node_of[name] = node
            others = partial(self._uploads_of_others, name)
            lie = attack.get(number)
            trainer = (
                InProcessTrainer(data, threads) if lie is None else Liar(data, threads, lie, others)
            )
            self.peers[name] = Peer(
                name, folder / name, self.transfer, self._sign_key, trainer, key
            )
        if secure:
            for peer in self.peers.values():
                others = dict.fromkeys(self.peers.keys() - {peer.name}, "")
                peer.owner = replace(peer.owner, trust=others)
        self._peer_of = {node: name for name, node in self._node_of.items()}
        self._rung: asyncio.Queue[str] = asyncio.Queue()

    def _uploads_of_others(self, name: str) -> list[Weights]:
        """The updates that others have sent in this round. Peers work in the order of their names,
        so the last one sees all."""
        others = [peer for peer in self.peers.values() if peer.name != name]
        return [weights.load(self.lane.uploads.path(one.name, one.uploaded)) for one in others]

    def close(self) -> None:
        self.ledger.close()

    def run(
        self,
        spec: RunSpec,
        on_round: Callable[[state.Round], None] = lambda closed: None,
        first: Weights | None = None,
    ) -> Run:
        """Run from the weights `first` to the end. Raises CommonweightError if the run fails."""
        random.seed(spec.seed)  # Flower samples from here
        run_id = f"run{spec.seed}"
        begun: list[run_events.RunEvent] = [run_events.RunStarted(spec)]
        if first is not None:
            begun.append(run_events.WeightsInitialised(self.lane.save(first), "file"))
        self.ledger.append(run_id, [run_events.encode(fact) for fact in begun])
        ended = asyncio.run(self._driven(transitions.replay(run_id, begun), on_round))
        if len(ended.history) < spec.rounds and not ended.ended:
            raise CommonweightError(f"the run ended early: {ended.ended_because}")
        return ended

    async def _driven(self, run: Run, on_round: Callable[[state.Round], None]) -> Run:
        self._rung = asyncio.Queue()
        told = 0

        def publish(_: Any) -> None:
            nonlocal told
            for closed in loop.run.history[told:]:
                told += 1
                on_round(closed)

        loop = RunLoop(run, self._fleetwork(publish), frozenset)
        working = asyncio.create_task(self._work(loop))
        driving = asyncio.create_task(loop.drive())
        done, _ = await asyncio.wait({working, driving}, return_when=asyncio.FIRST_COMPLETED)
        if working in done:
            driving.cancel()
            working.result()
        working.cancel()
        return await driving

    def _fleetwork(self, publish: Callable[[Any], None]) -> RunContext:
        def ring(peers: Sequence[str]) -> None:
            for peer in peers:
                self._rung.put_nowait(peer)

        return RunContext(
            fleet=FLEET,
            ledger=self.ledger,
            store=self.lane,
            transfer=self.transfer,
            grid=self.grid,
            sign=self._sign_key.sign,
            verify=lambda peer, signature, signed: identity.verify(
                identity.public_bytes(self.peers[peer].sign_key), signature, signed
            ),
            is_own_signature=partial(identity.verify, identity.public_bytes(self._sign_key)),
            eligible=lambda: frozenset(self.peers),
            online=lambda: frozenset(self.peers),
            node_of=self._node_of.get,
            peer_of=lambda node: self._peer_of[node],
            name_of=lambda peer: peer,
            ring=ring,
            publish=publish,
            refused=Counter(),
        )

    async def _work(self, loop: RunLoop) -> None:
        """Peers work one after the other, each after its doorbell."""
        while True:
            peer = await self._rung.get()
            await asyncio.to_thread(self._answer, self.peers[peer], self._node_of[peer])
            if self._rung.empty():
                loop.changed.set()

    def _answer(self, peer: Peer, node: int) -> None:
        given = self.superlink.poll(node, PollRequest(wants_work=True)).work
        if given is not None:
            reply: Message = peer.client.handle(unpack_message(given))
            self.superlink.poll(node, PollRequest(reply=pack_message(reply), wants_work=False))


@contextlib.contextmanager
def fleet_of(
    parts: Sequence[DataSettings],
    threads: int = 1,
    attack: Mapping[int, Lie] = MappingProxyType({}),
    *,
    secure: bool = False,
) -> Iterator[InProcessFleet]:
    """A fleet in a temporary folder."""
    memory = str(MEMORY) if MEMORY.is_dir() else None
    with TemporaryDirectory(prefix="commonweight-quality-", dir=memory) as folder:
        fleet = InProcessFleet(Path(folder), parts, threads, attack, secure=secure)
        try:
            yield fleet
        finally:
            fleet.close()
