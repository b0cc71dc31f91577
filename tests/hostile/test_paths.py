"""Names from the network never lead out of a folder: work, units, patches, versions, uploads."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from msgspec.structs import replace

from agent.clientapp.app import Client
from agent.clientapp.inference_jobs import InferenceJobs, _unzip, find_version
from agent.clientapp.interfaces import PeerIdentity, Queries, Transport
from agent.clientapp.jobs import Jobs
from agent.clientapp.outbox import Outbox
from agent.clientapp.owner_rules import OwnerRules
from agent.clientapp.told_scores import ToldScores
from agent.home.settings_schema import AgentSettings
from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.version_proofs import VersionIndex, save_proof
from agent.transport.version_store import VersionStore
from coordinator.storage.spool import Spool
from coordinator.storage.versions import Versions
from protocols.errors import BadMessage, CommonweightError
from protocols.local.safe_paths import path_in
from protocols.messages.jobs import SIGNED_UNIT, ModelRef, Private, Scatter, Unit
from protocols.messages.work import SIGNED_WORK, Work
from protocols.model import weights
from protocols.model.weights import Weights
from tests.hostile.tools import LyingCoordinator
from tests.support.https_site import Machine
from tests.support.in_process_fleet import Trainer, some_data

pytestmark = pytest.mark.attack("20.4")

MODEL = Weights({"w": np.arange(15, dtype=np.float32).reshape(5, 3), "b": np.zeros(3, np.float32)})
DIGEST = weights.digest(MODEL)
#: Each leads, or could lead, from `home/cache` to `victim` beside the home, or elsewhere.
WAYS_OUT = [
    "../../victim",
    "/tmp/victim",
    "..",
    "a/../../../victim",
    "..\\..\\victim",
    "%2e%2e/%2e%2e/victim",
    "a" * 63 + "/",
    f"{DIGEST}/../../../victim",
    f"{DIGEST}\n",
    DIGEST.upper(),
    DIGEST[:-1] + "\N{FULLWIDTH DIGIT ONE}",
    "\N{FULLWIDTH FULL STOP}\N{FULLWIDTH FULL STOP}/victim",
    "~/victim",
    "C:victim",
    ".ssh",
    "victim\x00",
]


class Victim(Transport):
    """An agent's client with a real version store, linked to a coordinator that lies."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        (self.home / "cache").mkdir(parents=True)
        for name in ("victim.safetensors", "victim.part", "victim.parquet"):
            (folder / name).write_bytes(b"the owner's")
        self.liar = LyingCoordinator(folder.parent / f"{folder.name}-liar", self._answer)
        machine = Machine()
        self.link = CoordinatorClient(self.liar.credentials(machine))
        self.versions = VersionStore(self.home / "cache", lambda: self.link)
        me = PeerIdentity(machine.peer, machine.sign_key.sign, self.liar.public)
        self.refusals: list[CommonweightError] = []
        self.trainer = Trainer(some_data(20, 0))
        (self.home / "data.csv").write_text("a,b,c,d,e\n1,2,3,4,5\n")
        inferring = InferenceJobs(
            self.trainer,
            OwnerRules(
                lambda: AgentSettings(
                    jobs_scatter="on", tasks=("softmax",), data=str(self.home / "data.csv")
                )
            ),
            lambda model: find_version(
                self.home / "cache",
                model,
                lambda digest, nbytes: self.versions.fetch(digest, nbytes),
            ),
            lambda digest, nbytes, target: self.link.download(digest, nbytes, target),
            self.home / "jobs",
            self.home / "predictions",
            ToldScores(self.home / "told" / "scores.db"),
            lambda digest: True,
        )
        jobs = Jobs(
            me,
            self.home / "answers",
            send=lambda digest, path: None,
            handlers={Scatter: inferring.scatter, Private: inferring.private},
        )
        self.client = Client(
            me,
            self.trainer,
            self,
            Outbox(self.home / "outbox", me),
            OwnerRules(lambda: AgentSettings(tasks=("softmax",))),
            queries=Queries(lambda work: RecordDict(), jobs.answer),
        )

    def _answer(self, head: bytes, send: Callable[[bytes], None]) -> None:
        send(b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nspoilt")

    # --- the client's transport ---

    def fetch(self, work: Work) -> Path:
        if work.patch_bytes:
            self.versions.rebuild(work)
        return self.versions.fetch(work.base, work.nbytes)

    def send(self, digest: str, path: Path) -> None:
        """No upload is needed."""

    # --- the attacker ---

    def order(self, action: str, name: str, payload: bytes, signature: bytes) -> None:
        """Let the agent handle a signed message. It may refuse, and raises nothing else."""
        key = "config" if name == "work" else name
        content = RecordDict({key: ConfigRecord({name: payload, "signature": signature})})
        try:
            self.client.handle(Message(content, 9, action))
        except CommonweightError as err:
            self.refusals.append(err)

    def work(self, **fields: Any) -> None:
        order = Work(run="r", round=1, kind="evaluate", task="softmax", nbytes=6)
        order = replace(order, **fields)
        payload, signature = SIGNED_WORK.seal(order, self.liar.sign_key.sign)
        self.order(order.kind, "work", payload, signature)

    def unit(self, **fields: Any) -> None:
        unit = Unit(job="j", unit=0, question=Private(min_group=1), task="softmax")
        payload, signature = SIGNED_UNIT.seal(replace(unit, **fields), self.liar.sign_key.sign)
        self.order("query.infer", "unit", payload, signature)


def tree(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 2, 3
    made = Victim(tmp_path / "machine")
    with made.liar.up():
        yield made
        made.link.close()


def outside(victim: Victim) -> dict[Path, bytes]:
    """All files around the home, and those in it that are not the agent's own new ones."""
    everything = tree(victim.home.parent)
    return {path: data for path, data in everything.items() if victim.home not in path.parents}


@pytest.mark.attack("20.4")
@pytest.mark.parametrize("name", WAYS_OUT)
@pytest.mark.parametrize("field", ["base", "parent", "run", "codec"])
def test_no_name_in_work_leaves_the_cache(victim: Victim, field: str, name: str) -> None:
    """Attack: a coordinator signs work whose base or parent is a path, to delete or write a file.

    A file with another digest was deleted; the download wrote its `.part` beside it.
    """
    before = outside(victim)
    victim.work(**{field: name})
    victim.work(**{field: name}, patch_bytes=6)
    victim.work(**({"base": DIGEST, "parent": DIGEST} | {field: name}), patch_bytes=6)
    assert outside(victim) == before
    assert {path.parent for path in victim.home.rglob("*.part")} <= {victim.home / "cache"}


@pytest.mark.attack("20.4")
@pytest.mark.parametrize("name", WAYS_OUT)
@pytest.mark.parametrize("kind", ["job", "model", "suffix", "input"])
def test_no_name_in_a_unit_leaves_its_folder(victim: Victim, kind: str, name: str) -> None:
    """Attack: a job's id, its model, the digest or the suffix of its rows is a path.

    Predictions were written to `predictions/JOB-…`, wherever that was.
    """
    weights.save(MODEL, victim.home / "cache" / f"{DIGEST}.safetensors")
    before = outside(victim)
    model = ModelRef(DIGEST, MODEL.nbytes)
    match kind:
        case "job":
            if name == DIGEST.upper():
                pytest.skip("an honest id, though no digest")
            victim.unit(job=name, models=(model,))
        case "model":
            victim.unit(models=(ModelRef(name, 6),))
        case "suffix":
            rows = Scatter(input=DIGEST, sizes=(6,), rows=(1,), suffix="." + name)
            victim.unit(models=(model,), question=rows)
        case "input":
            rows = Scatter(input=name, sizes=(6,), rows=(1,), suffix=".csv")
            victim.unit(models=(model,), question=rows)
    assert outside(victim) == before
    assert not (victim.home / "predictions").exists()


@pytest.mark.attack("20.4")
@pytest.mark.parametrize("name", [name for name in WAYS_OUT if not name.startswith(".ssh")])
def test_no_store_makes_a_path_of_such_a_name(tmp_path: Path, name: str) -> None:
    """Attack: a name gets past the type check, from a file, a ledger or a later message.

    The stores check each name again before it becomes a path.
    """
    folder = tmp_path / "store"
    folder.mkdir()
    versions, spool = Versions(folder / "versions"), Spool(folder / "spool", ".bytes")
    index = VersionIndex(folder, bytes(32), "")
    makers: list[Callable[[], object]] = [
        lambda: path_in(folder, name),
        lambda: path_in(folder, name, ".safetensors"),
        lambda: versions.version_path(name),
        lambda: versions.patch_path(name),
        lambda: versions.drop(name),
        lambda: spool.path("AAAA", name),
        lambda: spool.path(name, DIGEST),
        lambda: spool.begin_run(name),
        lambda: spool.delete_run(name),
        lambda: index.path(name),
        lambda: index.proof(name),
        lambda: save_proof(
            folder, Work(run="r", round=1, kind="train", task="t", base=name), b"", b""
        ),
    ]
    if name == DIGEST.upper():
        pytest.skip("an honest file name, though no digest")
    for number, make in enumerate(makers):
        with pytest.raises(BadMessage):
            raise AssertionError(f"maker {number} made {make()} of {name!r}")


@pytest.mark.attack("20.4")
def test_a_block_does_not_unpack_to_more_files_than_it_has_rows(tmp_path: Path) -> None:
    """Attack: a zip file of empty files that is small, and uses up the inodes of the disk."""
    block = tmp_path / "block.zip"
    with zipfile.ZipFile(block, "w") as packed:
        for number in range(1000):
            packed.writestr(f"{number}.png", b"")
    with pytest.raises(BadMessage, match="members"):
        _unzip(block, 10)
    assert list(tmp_path.iterdir()) == [block]


def test_honest_names_are_paths_in_their_folder(tmp_path: Path) -> None:
    """Control: honest names are paths in their folder."""
    digest = hashlib.sha256(b"x").hexdigest()
    for name in (digest, f"AAAA-BBBB-{digest}", "softmax-a1b2c3", "v1.2_x"):
        assert path_in(tmp_path, name, ".part").parent == tmp_path
    with pytest.raises(BadMessage):
        path_in(tmp_path, "a" * 300)
