"""A complete coordinator in this process, and agents in threads that train a small numpy model.

There is no MQTT broker, because training does not need one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from flwr.app import Error, Message
from msgspec.structs import replace

from agent.clientapp import secure_rules
from agent.clientapp.app import Client
from agent.clientapp.inference_jobs import InferenceJobs
from agent.clientapp.interfaces import Observer, PeerIdentity, Queries, Transport
from agent.clientapp.jobs import Jobs
from agent.clientapp.outbox import Outbox
from agent.clientapp.owner_rules import OwnerRules
from agent.clientapp.recovery import Recall
from agent.clientapp.secure_turns import SecureTurns
from agent.clientapp.told_scores import ToldScores
from agent.home.credentials import Credentials
from agent.home.enrollment_file import Enrollment, write_enrollment
from agent.home.secure_store import TurnStore
from agent.home.settings_schema import AgentSettings
from agent.tasks.work import Done
from agent.transport import version_proofs
from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.followed_log import FollowedLog
from agent.transport.version_store import VersionStore
from agent.transport.weight_transfer import SessionLost
from coordinator.daemon.coordinator import Coordinator
from coordinator.runs.state import Run
from coordinator.storage import run_events as facts
from coordinator.storage import settings
from coordinator.storage.run_events import RunEvent, RunSpec
from coordinator.storage.settings import Settings
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.enrollment import certificates, identity, tickets
from protocols.errors import CommonweightError, Unreachable
from protocols.messages.jobs import ANSWER_PATH, INPUT_PATH, Private, Scatter
from protocols.messages.mqtt import MqttAddress
from protocols.messages.refusals import refusal_of
from protocols.messages.work import Work
from protocols.model import schema_card, weights
from protocols.model.setting_specs import SettingSpec
from protocols.model.weights import Weights
from protocols.privacy.secagg.turn import Me
from tests.support.https_site import HOST, Machine
from tests.support.in_process_trainer import ByKind
from tests.support.waiting import until

Floats = npt.NDArray[np.float32]
CLASSES = 3
LR = 0.1


# --- softmax regression in float32 -----------------------------------------------------------


class Data(NamedTuple):
    """Features float32[n, d] and labels int64[n]."""

    x: Floats
    y: npt.NDArray[np.int64]


def some_data(examples: int, seed: int, features: int = 5) -> Data:
    """Data whose labels depend on the features; different for each seed."""
    rng = np.random.default_rng(seed)
    x = rng.normal(seed, 1.0, (examples, features)).astype(np.float32)
    return Data(x, (np.abs(x).argmax(1) + seed) % CLASSES)


def first_weights(features: int, seed: int = 0) -> Weights:
    rng = np.random.default_rng(seed)
    w = rng.normal(0, 0.1, (features, CLASSES)).astype(np.float32)
    return Weights({"w": w, "b": np.zeros(CLASSES, np.float32)})


def gradient_step(model: Weights, data: Data, lr: float = LR) -> Weights:
    """One step of gradient descent on all of `data`."""
    w, b = np.asarray(model["w"]), np.asarray(model["b"])
    scores = data.x @ w + b
    odds = np.exp(scores - scores.max(1, keepdims=True))
    error = odds / odds.sum(1, keepdims=True)
    error[np.arange(len(data.y)), data.y] -= 1
    error /= np.float32(len(data.y))
    step = np.float32(lr)
    return Weights({"w": w - step * (data.x.T @ error), "b": b - step * error.sum(0)})


def loss_of(model: Weights, data: Data) -> float:
    scores = data.x @ np.asarray(model["w"]) + np.asarray(model["b"])
    scores -= scores.max(1, keepdims=True)
    chosen = scores[np.arange(len(data.y)), data.y]
    return float(np.mean(np.log(np.exp(scores).sum(1)) - chosen))


# --- agents ----------------------------------------------------------------------------------


NO_TALLIES: dict[str, list[float]] = {}


class Trainer(ByKind):
    """A trainer without a process. Work waits while its `door` is closed.

    `before` is called with kind and round before each piece of work; an exception in it fails the
    work. `made` has the updates by round.
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self.step: Callable[[Weights, Data], Weights] = gradient_step
        self.first: Callable[[int], Weights] = lambda seed: first_weights(data.x.shape[1], seed)
        self.loss: Callable[[Weights, Data], float] = loss_of
        self.before: Callable[[str, int], None] = lambda kind, number: None
        self.made: dict[int, Weights] = {}
        self.version = "1"
        self.traits: dict[str, tuple[str, ...]] = {"classes": ("a", "b", "c")}
        self.settings: dict[str, SettingSpec] = {}
        self.worked: list[tuple[str, int]] = []

    def _begin(self, kind: str, number: int) -> None:
        self.worked.append((kind, number))
        self.before(kind, number)

    def _save(self, model: Weights, out: Path) -> Done:
        digest = weights.save(model, out)
        return Done(num_examples=len(self.data.y), digest=digest, nbytes=out.stat().st_size)

    def describe(self, task: str, settings: Any) -> bytes:
        self._begin("describe", 0)
        return schema_card.encode(
            schema_card.make_card(
                task, self.version, self.first(0).schema, self.traits, self.settings
            )
        )

    def init(self, task: str, settings: Any, seed: int, out: Path) -> Done:
        self._begin("init", 0)
        return self._save(self.first(seed), out)

    def train(self, task: str, settings: Any, base: Path, out: Path) -> Done:
        number = int(settings["round"])
        self._begin("train", number)
        self.made[number] = self.step(weights.load(base), self.data)
        saved = self._save(self.made[number], out)
        return replace(saved, metrics={"train_loss": 1.0})

    def predict(self, task: str, settings: Any, base: Path, sources: Any, out: Path) -> Done:
        """Predict scores of the first class for CSV files of features."""
        self._begin("predict", len(self.worked))
        model, done = weights.load(base), 0
        with out.open("w") as file:
            file.write('["row","score"]\n')
            for source in sources:
                x = np.loadtxt(source, delimiter=",", skiprows=1, ndmin=2, dtype=np.float32)
                for number, score in enumerate(x @ np.asarray(model["w"])[:, 0]):
                    file.write(f"[{number},{float(score)!r}]\n")
                done += len(x)
        return Done(num_examples=done, digest=weights.file_digest(out), nbytes=out.stat().st_size)

    def evaluate(self, task: str, settings: Any, base: Path) -> Done:
        self._begin("evaluate", int(settings["round"]))
        loss = self.loss(weights.load(base), self.data)
        return Done(num_examples=len(self.data.y), metrics={"loss": loss})


class Proving(Observer):
    """Stores the coordinator's signature beside each version in the cache, and keeps the works."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self.works: list[Work] = []

    def on_work(self, work: Work | None) -> None:
        self.works += [work] if work is not None else []

    def on_version(self, work: Work, payload: bytes, signature: bytes) -> None:
        version_proofs.save_proof(self._cache, work, payload, signature)


class Agent(Transport):
    """An agent's coordinator client in a thread: it works until `stop`, and reconnects."""

    def __init__(
        self, folder: Path, machine: Machine, credentials: Credentials, data: Data
    ) -> None:
        self.machine, self.peer = machine, machine.peer
        self.trainer = Trainer(data)
        self.failures: list[BaseException] = []
        #: Called before each answer; a CommonweightError in it is the answer.
        self.before_answer: Callable[[Message], None] = lambda message: None
        self.notices: list[str] = []
        self.owner = AgentSettings(
            jobs_scatter="on", jobs_private_models=("*",), tasks=("softmax",)
        )
        self._folder, self._credentials = folder, credentials
        (folder / "cache").mkdir(parents=True, exist_ok=True)
        self.seen = Proving(folder / "cache")
        self.versions = VersionStore(folder / "cache", self._open_link)
        self._stopping = threading.Event()
        self.link: CoordinatorClient | None = None
        self.client: Client | None = None
        self._thread = threading.Thread(target=self._run, name=machine.name)

    def start(self, enrollment: Enrollment) -> None:
        public, fleet = enrollment.coordinator_public, self.machine.fleet
        me = PeerIdentity(self.peer, self.machine.sign_key.sign, public, fleet)
        write_enrollment(self._folder, enrollment)
        self.log = FollowedLog(
            self._folder,
            enrollment,
            self._credentials,
            lambda start: self._open_link().log_page(start),
            lambda: enrollment.certificate,
        )
        self.client = Client(
            me,
            self.trainer,
            self,
            Outbox(self._folder, me),
            OwnerRules(lambda: self.owner),
            observer=self.seen,
            queries=Queries(
                Recall(me, self._folder / "cache", self.send, lambda *_: None).answer,
                self.jobs(me).answer,
            ),
            secure_turns=self._secure_turns,
        )
        self._thread.start()

    def _secure_turns(self) -> SecureTurns:
        key = self.machine.sign_key
        me = Me(self.peer, identity.public_bytes(key), key.sign)
        return SecureTurns(me, TurnStore(self._folder), lambda: secure_rules.pins(self.owner))

    def fetch(self, work: Work) -> Path:
        if work.patch_bytes:
            self.versions.rebuild(work)
        return self.versions.fetch(work.base, work.nbytes)

    def send(self, digest: str, path: Path) -> None:
        self._open_link().upload(digest, path)

    def check_log(self, work: Work, head: bytes, page: bytes) -> None:
        self.log.check_work(work, head, page)

    def jobs(self, me: PeerIdentity) -> Jobs:
        inferring = InferenceJobs(
            self.trainer,
            OwnerRules(lambda: self.owner),
            lambda model: self.versions.fetch(model.digest, model.nbytes),
            lambda digest, nbytes, to: self._open_link().download(digest, nbytes, to, INPUT_PATH),
            self._folder / "jobs",
            self._folder / "predictions",
            ToldScores(self._folder / "told" / "scores.db"),
            lambda digest: False,
        )
        return Jobs(
            me,
            self._folder / "answers",
            send=lambda digest, path: self._open_link().upload(digest, path, ANSWER_PATH),
            handlers={Scatter: inferring.scatter, Private: inferring.private},
        )

    def stop(self) -> None:
        self._stopping.set()

    def join(self) -> None:
        self._stopping.set()
        self._thread.join(30)
        assert not self._thread.is_alive(), f"{self.machine.name} does not stop"
        self.log.close()
        assert self.failures == []

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def _open_link(self) -> CoordinatorClient:
        assert self.link is not None
        return self.link

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self.link = CoordinatorClient(self._credentials)
                self.link.log_statement = self.log.statement
                self.link.on_log_news = self.log.news
                self.link.on_notice = self.notices.append
                with suppress(Unreachable, SessionLost):
                    self.link.open()
                    self._work(self.link)
                self.link.close()
                self._stopping.wait(0.05)
        except BaseException as err:  # shown by `join`, in the test's own thread
            self.failures.append(err)
            raise

    def _work(self, link: CoordinatorClient) -> None:
        # As the real agent does: a reply that asks for no more work is that of a peer that pauses.
        message = self._pull(link)
        while not self._stopping.is_set():
            if message is None:
                self._stopping.wait(0.01)
                message = self._pull(link)
            else:
                message = link.exchange(self.answer(message))

    def _pull(self, link: CoordinatorClient) -> Message | None:
        assert self.client is not None
        open_sum = self.client.secure.open_sum()
        message = link.pull(open_sum=open_sum)
        if open_sum is not None and link.sum_is_over:
            self.client.end_sum()
        return message

    def answer(self, message: Message) -> Message:
        assert self.client is not None
        try:
            self.before_answer(message)
            return self.client.handle(message)
        except (Unreachable, SessionLost):
            raise
        except CommonweightError as err:
            return Message(Error(2, refusal_of(err).encode()), reply_to=message)


def node_certificate(keys: settings.Keys, machine: Machine) -> bytes:
    certificate = certificates.NodeCertificate(
        fleet=keys.fleet,
        peer=machine.peer,
        name=machine.name,
        sign_public=identity.public_bytes(machine.sign_key),
        node_public=identity.node_public_pem(machine.node_key),
        not_after=time.time() + 3600,
        issuer=keys.issuer,
    )
    return certificates.issue_certificate(keys.ca_key, certificate)


# --- the coordinator -------------------------------------------------------------------------


class Fleet:
    """A coordinator's home and its agents."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home, _ = settings.init([HOST])
        self.keys = settings.open_keys(self.home)
        self.agents: list[Agent] = []
        self.port = 0
        self.hub: Coordinator

    @asynccontextmanager
    async def up(self, *, resume: bool = True, metrics_port: int = 0) -> AsyncIterator[Coordinator]:
        """Start a coordinator in the home; a later one has the same port."""
        chosen = Settings(
            host=HOST, port=self.port, mqtt_url=f"mqtt://{HOST}:9", metrics_port=metrics_port
        )
        self.hub = Coordinator(self.home, self.keys, chosen)
        self.port = self.hub.port
        ready = asyncio.Event()
        serving = asyncio.create_task(self.hub.serve(ready.set, resume=resume))
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({serving, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        try:
            yield self.hub
        finally:
            self.hub.stop()
            await serving

    def join(self, name: str, data: Data) -> Agent:
        """Enroll and start an agent."""
        machine = Machine(name)
        machine.fleet = self.keys.fleet
        ticket = tickets.new_ticket(self.hub.addresses(), bytes(32))
        self.hub.registry.create_ticket(ticket, ttl_s=60, uses=1)
        self.hub.registry.join(machine.joining(ticket))
        credentials = Credentials(
            f"{HOST}:{self.port}",
            self.keys.ca_pem,
            machine.peer,
            machine.node_key,
            machine.sign_key,
            machine.fleet,
        )
        agent = Agent(self.folder / name, machine, credentials, data)
        self.agents.append(agent)
        agent.start(
            Enrollment(
                peer=machine.peer,
                name=name,
                fleet=machine.fleet,
                addresses=(credentials.address,),
                ca_pem=self.keys.ca_pem.decode(),
                certificate=node_certificate(self.keys, machine),
                coordinator_public=identity.public_bytes(self.keys.sign_key),
                mqtt=MqttAddress(host=HOST, port=9),
                card=self.hub.fleet_card(),
            )
        )
        return agent

    async def online(self, count: int) -> None:
        await until(lambda: len(self.hub._sessions.eligible()) == count)

    def start(self, **spec: Any) -> str:
        return self.hub.runs.start(RunSpec(task="softmax", **spec), "")

    async def finished(self, run_id: str, *, within_s: float = 150) -> Run:
        """Wait until the run has ended, and return it."""
        await until(lambda: self._is_ended(run_id), within_s)
        return self.hub.runs.find(run_id)

    def _is_ended(self, run_id: str) -> bool:
        for agent in self.agents:
            assert agent.failures == []
        return self.hub.runs.find(run_id).ended

    def facts(self, run_id: str, kind: type[Any] = object) -> list[Any]:
        """The events of a run in the ledger."""
        ledger = SqliteLedger(self.home / "ledger.db")
        found: list[RunEvent] = [facts.decode(entry.body) for entry in ledger.entries(run_id)]
        ledger.close()
        return [fact for fact in found if isinstance(fact, kind)]

    def refusals(self, run_id: str) -> list[tuple[int, str, str]]:
        """Round, peer and reason of each refusal."""
        return [(f.round, f.peer, f.reason) for f in self.facts(run_id, facts.UpdateRefused)]

    def waits_for(self, run_id: str) -> str:
        """What the run waits for, as text."""
        shown = self.hub.fleet.runs.get(run_id)
        return shown.changed.waiting_for if shown else ""

    def version(self, digest: str) -> Weights:
        return weights.load(self.hub.weight_store.version_path(digest))

    async def close(self) -> None:
        """Stop the agents, even if their work waits for a door."""
        for agent in self.agents:
            agent.stop()
            self.hub._polls._long_polls.wake(agent.peer)
        for agent in self.agents:
            await asyncio.to_thread(agent.join)


@asynccontextmanager
async def fleet_of(folder: Path, *data: Data) -> AsyncIterator[Fleet]:
    """A coordinator with one connected agent for each data set."""
    fleet = Fleet(folder)
    try:
        async with fleet.up():
            for number, part in enumerate(data):
                fleet.join(f"agent{number}", part)
            await fleet.online(len(data))
            yield fleet
            await fleet.close()
    finally:
        await fleet.close()


@asynccontextmanager
async def fleet_and_laptop(folder: Path, patch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    """A fleet of two agents, whose home commands find, and a home for an operator's machine."""
    patch.setenv("COMMONWEIGHT_HOME", str(folder / "home"))
    patch.setenv("COMMONWEIGHT_OPERATOR_HOME", str(folder / "laptop"))
    async with fleet_of(folder, some_data(20, 1), some_data(20, 2)) as fleet:
        yield fleet
