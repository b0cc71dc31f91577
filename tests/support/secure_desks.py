"""Real ClientApps in secure runs, and a coordinator in a few lines that asks what it likes.

Each agent has its turns, its files and its audit log on disk. Messages are signed Flower messages.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from msgspec.structs import replace

from agent.clientapp import secure_rules
from agent.clientapp.app import CLAIM, DESCRIPTION, Client
from agent.clientapp.interfaces import Observer, PeerIdentity, Transport
from agent.clientapp.outbox import Outbox
from agent.clientapp.owner_rules import OwnerRules
from agent.clientapp.privacy_budget import PrivacyBudget
from agent.clientapp.secure_turns import SecureTurns
from agent.clientapp.secure_work import REQUEST
from agent.home import audit_log
from agent.home.secure_store import TurnStore
from agent.home.settings_schema import AgentSettings
from agent.tasks.work import Done
from protocols.enrollment import identity
from protocols.messages.jobs import Score
from protocols.messages.work import SIGNED_CLAIM, SIGNED_WORK, SecureStep, UpdateClaim, Work
from protocols.model import schema_card, weights
from protocols.model.weights import TensorSpec, Weights
from protocols.model.weights_file import WeightsFile
from protocols.privacy.secagg import masked_file, messages, tails
from protocols.privacy.secagg.aggregator import Aggregator, CohortFixed
from protocols.privacy.secagg.messages import (
    AgreeRequest,
    Answer,
    MaskRequest,
    Plan,
    Request,
    ShareRequest,
    SumKind,
    UnmaskRequest,
    encode,
    masked_codec,
)
from protocols.privacy.secagg.recovery import recover
from tests.support.in_process_trainer import ByKind
from tests.support.secure_cohort import FLEET, me, signing_key

COORDINATOR = signing_key(999)
STEP_OF: dict[type[Request], SecureStep] = {
    ShareRequest: "share",
    MaskRequest: "mask",
    AgreeRequest: "agree",
    UnmaskRequest: "unmask",
}
RUN, TASK = "mnist-1", "mnist"
SHAPES = {"w": (40, 3), "b": (7,)}


def model(seed: int, scale: float = 1.0) -> Weights:
    draw = np.random.default_rng(seed)
    return Weights(
        {n: draw.normal(0, scale, shape).astype(np.float32) for n, shape in SHAPES.items()}
    )


class Trainer(ByKind):
    """Adds a change of its own to the version, and measures a loss of its own."""

    def __init__(self, number: int) -> None:
        self.number, self.did = number, list[str]()
        self.change = model(1000 + number, 0.05)
        self.loss, self.tallies = 0.1234567 + number, {"hits": [3.0, float(number)]}
        self.before: Callable[[str], None] = lambda kind: None

    def _begin(self, kind: str) -> None:
        self.did.append(kind)
        self.before(kind)

    def describe(self, task: str, settings: Any) -> bytes:
        self._begin("describe")
        schema = {name: TensorSpec("F32", shape) for name, shape in SHAPES.items()}
        return schema_card.encode(schema_card.make_card(task, "1", schema, {}))

    def train(self, task: str, settings: Any, base: Path, out: Path) -> Done:
        self._begin("train")
        old = weights.load(base)
        digest = weights.save(Weights({n: old[n] + self.change[n] for n in old}), out)
        examples = 20 * (self.number + 1)
        metrics = {"train_loss": self.loss}
        return Done(
            digest=digest, nbytes=out.stat().st_size, num_examples=examples, metrics=metrics
        )

    def evaluate(self, task: str, settings: Any, base: Path) -> Done:
        self._begin("evaluate")
        return Done(
            num_examples=10 * (self.number + 1),
            metrics={"loss": self.loss},
            tallies=self.tallies,
        )


class Where(NamedTuple):
    """A coordinator: the id of its fleet, and its signing key."""

    fleet: str = FLEET
    key: identity.SigningKey = COORDINATOR


class Desk(Observer, Transport):
    """One agent: its home, its ClientApp, and what it has sent."""

    def __init__(self, folder: Path, number: int, versions: Path, site: Where) -> None:
        self.site = site
        self.home, self.number, self._versions = folder / f"peer{number}", number, versions
        self.home.mkdir(exist_ok=True)
        self.peer, self.trainer = me(number).peer, Trainer(number)
        self.owner = AgentSettings(tasks=(TASK,))
        #: The owner's privacy ledger; None: nothing is charged.
        self.budget = PrivacyBudget()
        #: Everything that has left this agent, as bytes.
        self.left: list[bytes] = []
        #: Called with each answer before it is sent.
        self.on_answer: Callable[[Work, bytes], None] = lambda work, answer: None
        self.uploads: dict[str, bytes] = {}
        self.scores: list[Score] = []
        self.client = self.made_again()

    def made_again(self) -> Client:
        """A ClientApp over the same home, as after a restart."""
        own = PeerIdentity(
            self.peer,
            me(self.number).sign,
            identity.public_bytes(self.site.key),
            self.site.fleet,
        )
        self.client = Client(
            own,
            self.trainer,
            self,
            Outbox(self.home / "outbox", own),
            OwnerRules(lambda: self.owner, budget=self.budget),
            observer=self,
            secure_turns=self.turns,
        )
        return self.client

    def turns(self) -> SecureTurns:
        store = TurnStore(self.home)
        return SecureTurns(me(self.number), store, lambda: secure_rules.pins(self.owner))

    # --- its transport and its observer ---

    def fetch(self, work: Work) -> Path:
        return self._versions / work.base

    def send(self, digest: str, path: Path) -> None:
        data = path.read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
        self.uploads[digest] = data
        self.left.append(data)

    def on_leaving(self, claim: UpdateClaim, task: str, description: bytes) -> None:
        audit_log.write_update(self.home, claim, task, description)

    def on_evaluated(self, work: Work, score: Score) -> None:
        self.scores.append(score)

    # --- the coordinator's side ---

    def ask(self, work: Work, request: bytes = b"") -> tuple[UpdateClaim, bytes]:
        """The claim and the answer's bytes. Raises what the ClientApp raises."""
        if request and not work.request:
            work = replace(work, request=hashlib.sha256(request).hexdigest())
        reply = self.client.handle(message(work, request, self.site.key))
        claim = reply.content.config_records[CLAIM]
        payload, signature = claim["claim"], claim["signature"]
        assert isinstance(payload, bytes)
        assert isinstance(signature, bytes)
        signed = SIGNED_CLAIM.signed_bytes(payload)
        assert identity.verify(me(self.number).public, signature, signed)
        description = reply.content.config_records.get(DESCRIPTION, {}).get("description", b"")
        assert isinstance(description, bytes)
        self.on_answer(work, description)
        self.left += [payload, signature, description]
        told = SIGNED_CLAIM.decode(payload)
        if work.kind not in ("init", "describe"):
            assert (told.kind, told.round, told.turn) == (work.kind, work.round, work.turn)
            assert told.digest == hashlib.sha256(description).hexdigest()
            assert (told.metrics, told.tallies, told.codec) == ({}, {}, work.codec)
        return told, description


def message(
    work: Work, request: bytes = b"", key: identity.SigningKey = COORDINATOR, node: int = 9
) -> Message:
    """A signed message to a node, in the Flower run of this process."""
    if TaskIdentity._task_id is None:
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3
    payload, signature = SIGNED_WORK.seal(work, key.sign)
    content = RecordDict({"config": ConfigRecord({"work": payload, "signature": signature})})
    if request:
        content[REQUEST] = ConfigRecord({"request": request})
    kind = work.kind if work.kind in ("train", "evaluate") else f"query.{work.kind}"
    return Message(content, node, kind, group_id=work.run)


class Room:
    """Some agents, whose owners trust each other, and one version of a run."""

    def __init__(
        self, folder: Path, peers: int = 3, codec: str = "fp32", site: Where = Where()
    ) -> None:
        self.site = site
        versions = folder / "versions"
        versions.mkdir(exist_ok=True)
        self.start = model(0)
        unnamed = versions / "unnamed"
        self.base = weights.save(self.start, unnamed)
        unnamed.rename(versions / self.base)
        self.codec, self._folder, self._versions = masked_codec(codec), folder, versions
        self.desks: dict[str, Desk] = {}
        self.task = TASK
        for _ in range(peers):
            self.add()
        self.first = next(iter(self.desks.values()))

    def add(self) -> Desk:
        """One more agent; all trust each other."""
        desk = Desk(self._folder, len(self.desks), self._versions, self.site)
        self.desks[desk.peer] = desk
        self.trust_all()
        return desk

    def trust_all(self, *, secure_min: int = 0, only: Iterable[str] | None = None) -> None:
        """The owners trust these agents, or all."""
        trusted = set(self.desks if only is None else only)
        for desk in self.desks.values():
            others = dict.fromkeys(sorted(trusted - {desk.peer}), "")
            desk.owner = replace(desk.owner, trust=others, secure_min=secure_min)

    def work(self, kind: Any, **changed: Any) -> Work:
        nbytes = (self._versions / self.base).stat().st_size
        work = Work(
            run=RUN,
            round=1,
            kind=kind,
            task=self.task,
            base=self.base,
            nbytes=nbytes,
            codec=self.codec,
            fleet=self.site.fleet,
        )
        return replace(work, **changed)

    def plan(self, kind: SumKind = "train", **changed: Any) -> Plan:
        train = kind == "train"
        with WeightsFile(self._versions / self.base) as base:
            sizes = masked_file.layout(base.schema) if train else ()
        names = tails.names({"train_loss": 0.0} if train else {"loss": 0.0}, {})
        if not train:
            names = tails.names({"loss": 0.0}, {"hits": [0.0, 0.0]})
        whole = Plan(
            fleet=self.site.fleet,
            run=RUN,
            round=1,
            kind=kind,
            base=self.base,
            ring=messages.ring_of(self.codec),  # type: ignore[arg-type]
            sizes=sizes,
            limits=(1.0,) * len(sizes),
            names=names,
            max_weight=4,
            clip=10.0,
        )
        return replace(whole, **changed)

    def cards(self, kind: SumKind = "train", turn: int = 0) -> ShareRequest:
        """All agents do their work; the cohort of their cards."""
        answers = [
            messages.decode_ready(desk.ask(self.work(kind, turn=turn))[1])
            for desk in self.desks.values()
        ]
        return ShareRequest(
            plan=encode(self.plan(kind)), cards=tuple(answer.card for answer in answers)
        )

    def step(self, desk: Desk, request: Request, turn: int = 0, **changed: Any) -> Answer:
        """An agent's answer to a request of a step."""
        step = STEP_OF[type(request)]
        data = desk.ask(self.work(step, turn=turn, **changed), encode(request))[1]
        return messages.decode_answer(step, data)

    def play(
        self, state: Aggregator, desks: Iterable[Desk] | None = None, turn: int = 0
    ) -> Aggregator:
        """Ask these agents for all that the sum needs from them now."""
        for desk in list(desks if desks is not None else self.desks.values()):
            if (request := state.request_for(desk.peer)) is not None:
                state.take(desk.peer, self.step(desk, request, turn))
        return state

    def sum(self, kind: SumKind = "train", turn: int = 0) -> Aggregator:
        """A whole secure sum of all agents."""
        state = Aggregator(CohortFixed(request=self.cards(kind, turn)))
        self.play(state, turn=turn)
        state.apply(state.fix_sharers())
        self.play(state, turn=turn)
        state.apply(state.fix_survivors())
        self.play(state, turn=turn)
        self.play(state, turn=turn)
        assert state.can_recover()
        return state

    def mean(self, state: Aggregator, folder: Path) -> tuple[Weights, Any]:
        """The version that the coordinator makes of a sum, and the mean metrics."""
        files = {}
        for peer in state.survivors:
            path = folder / f"{peer}.masked"
            path.write_bytes(self.desks[peer].uploads[state.uploads[peer]])
            files[peer] = WeightsFile(path)
        with WeightsFile(self._versions / self.base) as base:
            total = masked_file.SecureMean(state.cohort, recover(state), files, base)
            metrics = tails.means(state.cohort.plan.names, total.metrics())
            found = Weights(
                {
                    name: total.read(weights.Part(name, 0, math.prod(spec.shape))).reshape(
                        spec.shape
                    )
                    for name, spec in base.schema.items()
                }
                if state.cohort.plan.kind == "train"
                else {}
            )
        for file in files.values():
            file.close()
        return found, metrics


def _whole(total: masked_file.SecureMean, name: str, shape: tuple[int, ...]) -> Any:
    return total.read(weights.Part(name, 0, math.prod(shape))).reshape(shape)
