"""A simulated peer: the agent's own ClientApp over a folder, in the process of a worker."""

from __future__ import annotations

import hashlib
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property, lru_cache
from pathlib import Path

import msgspec
from flwr.app import Error, Message
from msgspec import Struct
from msgspec.structs import replace

from agent.clientapp import secure_rules
from agent.clientapp.app import Client
from agent.clientapp.interfaces import PeerIdentity, Transport
from agent.clientapp.outbox import Outbox
from agent.clientapp.owner_rules import OwnerRules
from agent.clientapp.privacy_budget import PrivacyBudget
from agent.clientapp.secure_turns import SecureTurns
from agent.data.settings import DataSettings
from agent.home import privacy_ledger, settings
from agent.home.secure_store import TurnStore
from agent.home.settings_schema import AgentSettings
from agent.tasks.work import Describe, Done
from agent.tasks.work import Work as TrainerWork
from agent.trainer.in_process import InProcessTrainer
from agent.transport.coordinator_client import pack_message, unpack_message
from commonweight.simulation.plan import Plan
from protocols.enrollment import identity
from protocols.errors import CommonweightError, TrainerFailed
from protocols.messages.envelope import strip_controls
from protocols.messages.refusals import AGENT_FAILED, Refusal
from protocols.messages.work import FlowerMessage, Work
from protocols.privacy.secagg.turn import Me

#: A hint for owners; in a simulation it is an option.
_POLICY = re.compile(r"commonweight-agent policy set (\S+) (\S+)")
#: Peers whose data a worker keeps in memory for their next message.
MAX_KEPT_PEERS = 32


class Job(Struct, frozen=True, kw_only=True):
    """A message to a peer. `number`: how many it has got, this one included."""

    index: int
    number: int
    message: FlowerMessage


class Answer(Struct, frozen=True, kw_only=True):
    """A peer's reply. `base`: the version that it read; `upload`: the digest of the update that it
    sent before; both may be empty."""

    reply: FlowerMessage
    base: str = ""
    upload: str = ""


class Descriptions:
    """The peers' descriptions of their data and models; a peer gives the same at each request.

    Their data do not change during a simulation, so a peer need not load them to compare its
    schema card with that of a run.
    """

    def __init__(self) -> None:
        self._by_peer: dict[int, tuple[bytes, Done]] = {}
        #: Most descriptions are equal, and stored once.
        self._alike: dict[bytes, Done] = {}

    def find(self, index: int, work: Describe) -> Done | None:
        asked, told = self._by_peer.get(index, (b"", None))
        return told if asked == _asked(work) else None

    def keep(self, index: int, work: Describe, told: Done) -> None:
        self._by_peer[index] = _asked(work), self._alike.setdefault(encode(told), told)


def _asked(work: Describe) -> bytes:
    """The digest of what a description depends on."""
    settings = {name: one for name, one in work.settings.items() if name not in ("round", "seed")}
    return hashlib.sha256(msgspec.json.encode([work.task, settings], order="sorted")).digest()


class PeerTrainer(InProcessTrainer):
    """The trainer of one peer, and later of another one, as the same task and model serve both."""

    def __init__(self, data: DataSettings, source: str, descriptions: Descriptions) -> None:
        super().__init__(data, source=source)
        self._descriptions = descriptions

    def use(self, data: DataSettings) -> None:
        """Work on the data of this peer from now on."""
        self._data = data

    def run(self, work: TrainerWork) -> Done:
        if not isinstance(work, Describe):
            return super().run(work)
        told = self._descriptions.find(self._data.index, work)
        if told is None:
            told = super().run(work)
            self._descriptions.keep(self._data.index, work, told)
        return told


#: The same message goes to many peers.
_verify = lru_cache(4)(identity.verify)


class Identity(PeerIdentity):
    """The identity of one peer."""

    def is_coordinators(self, signature: bytes, signed: bytes) -> bool:
        return _verify(self.coordinator_public, signature, signed)


class SimulatedPeer(Transport):
    """A peer as after a restart of its agent: its state of earlier rounds is in its folder."""

    def __init__(
        self,
        plan: Plan,
        index: int,
        owner: AgentSettings,
        peers: Mapping[str, str],
        make_trainer: Callable[[DataSettings], PeerTrainer],
    ) -> None:
        key = plan.key(index)
        public = identity.public_bytes(key)
        self.peer, self._plan = identity.peer_id(public), plan
        self._base = self._upload = ""
        home = plan.peer_folder(index)
        if plan.trusts or owner.privacy_max_epsilon:  # for their databases
            home.mkdir(mode=0o700, parents=True, exist_ok=True)
        if plan.trusts:
            owner = replace(owner, trust={**peers, **owner.trust})
            owner.trust.pop(self.peer, None)
        data = replace(settings.data_settings(owner, plan.cache), is_shared=plan.is_shared)
        self.trainer = make_trainer(data)
        me = Identity(self.peer, key.sign, plan.coordinator_public, plan.fleet)
        self.client = Client(
            me,
            self.trainer,
            self,
            Outbox(home, me, is_durable=False),
            OwnerRules(lambda: owner, settings.floors(owner), _budget(owner, home, plan.fleet)),
            secure_turns=lambda: SecureTurns(
                Me(self.peer, public, key.sign), TurnStore(home), lambda: secure_rules.pins(owner)
            ),
        )

    def answer(self, given: FlowerMessage) -> Answer:
        """The reply to a message. Everything that the peer keeps is in its folder afterwards."""
        message, self._base, self._upload = unpack_message(given), "", ""
        try:
            reply = self.client.handle(message)
        except CommonweightError as err:
            refusal = _refusal_of(err).encode()
            reply, self._upload = Message(Error(AGENT_FAILED, refusal), reply_to=message), ""
        return Answer(reply=pack_message(reply), base=self._base, upload=self._upload)

    # --- the client's transport ---

    def fetch(self, work: Work) -> Path:
        """The file of the version in the coordinator's home."""
        self._base = work.base
        return self._plan.version_path(work.base)

    def send(self, digest: str, path: Path) -> None:
        """Hand an update over without a copy: its peer deletes it before it writes the next."""
        target = self._plan.upload_path(self.peer, digest)
        target.unlink(missing_ok=True)
        os.link(path, target)
        self._upload = digest


def _refusal_of(err: CommonweightError) -> Refusal:
    """The whole error: the user of a simulation is the owner, too, and has no log of an agent."""
    kind = err.kind if isinstance(err, TrainerFailed) else err.code
    text = f"{err.message} ({err.hint})" if err.hint else err.message
    return Refusal(kind, strip_controls(_POLICY.sub(r"--owner \1=\2", text)))


def _budget(owner: AgentSettings, home: Path, fleet: str) -> PrivacyBudget:
    """The owner's privacy ledger. Without a limit nothing is recorded, as it is not read then."""
    if not owner.privacy_max_epsilon:
        return PrivacyBudget()
    return PrivacyBudget(privacy_ledger.ledger_file(home), lambda: owner, fleet)


class Worker:
    """Answers for any peer of the plan. Keeps some peers between calls, if there is no other
    worker."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        plan.cache.mkdir(parents=True, exist_ok=True)
        self._descriptions = Descriptions()
        self._spare: list[PeerTrainer] = []
        self._kept: OrderedDict[int, tuple[int, SimulatedPeer]] = OrderedDict()

    @cached_property
    def _peers(self) -> dict[str, str]:
        """The ids of all peers, with the names that their owners have for them."""
        count = len(self._plan.keys) if self._plan.trusts else 0
        return {identity.peer_id(self._plan.public(index)): "" for index in range(count)}

    @cached_property
    def _owner_of(self) -> Callable[[int], AgentSettings]:
        return self._plan.owners()

    def _make(self, index: int) -> SimulatedPeer:
        owner = self._owner_of(index)
        return SimulatedPeer(self._plan, index, owner, self._peers, self._trainer_for)

    def _trainer_for(self, data: DataSettings) -> PeerTrainer:
        """The trainer of a peer that is kept no longer, or a new one."""
        if not self._spare:
            return PeerTrainer(data, self._plan.source, self._descriptions)
        self._spare[-1].use(data)
        return self._spare.pop()

    def keeps(self, job: Job) -> bool:
        """True if no other worker has answered for this peer since it did here."""
        return job.index in self._kept and self._kept[job.index][0] == job.number

    def work(self, job: Job) -> Answer:
        is_kept, (_, peer) = self.keeps(job), self._kept.pop(job.index, (0, None))
        if peer is None or not is_kept:
            peer = self._make(job.index)
        answer = peer.answer(job.message)
        self._kept[job.index] = job.number + 1, peer
        if len(self._kept) > MAX_KEPT_PEERS:
            self._spare.append(self._kept.popitem(last=False)[1][1].trainer)
        return answer


encode = msgspec.msgpack.encode
decode_jobs = msgspec.msgpack.Decoder(list[Job]).decode
decode_answers = msgspec.msgpack.Decoder(list[Answer]).decode
decode_plan = msgspec.msgpack.Decoder(Plan).decode
