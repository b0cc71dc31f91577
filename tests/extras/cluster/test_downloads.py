"""A replica that waits sends versions to the members of the ledger alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psycopg
import pytest

from agent.home.credentials import Credentials
from agent.transport.download_replicas import MIN_BYTES
from agent.transport.weight_transfer import WeightTransfer
from coordinator.daemon import follower
from coordinator.daemon.follower import Follower, check_settings
from coordinator.fleet.registry import Registry
from coordinator.storage import settings, version_cache
from coordinator.storage.ledger_place import VARIABLE, open_ledger
from coordinator.storage.object_store import ObjectStore
from coordinator.storage.settings import Settings
from protocols.enrollment import certificates, tickets
from protocols.errors import PortInUse, Unreachable, UsageError
from protocols.messages.work import DOWNLOAD_PATH
from protocols.model.weights import file_digest
from tests.support import postgres
from tests.support.fleet_harness import HOST, free_port
from tests.support.https_site import Machine
from tests.support.waiting import wait_for


class Scene(NamedTuple):
    """The coordinator that leads, without a server, and a replica that waits, over one ledger."""

    registry: Registry
    store: ObjectStore
    keys: settings.Keys
    chosen: Settings
    home: Path
    folder: Path
    schema: str

    @property
    def place(self) -> str:
        return f"{HOST}:{self.chosen.download_port}"

    def enroll(self, name: str) -> Machine:
        machine = Machine(name)
        machine.fleet = self.keys.fleet
        ticket = tickets.new_ticket([self.place], certificates.ca_fingerprint(self.keys.ca_pem))
        self.registry.create_ticket(ticket, ttl_s=60, uses=1)
        self.registry.join(machine.joining(ticket))
        return machine

    def put(self, data: bytes) -> str:
        path = self.folder / "new"
        path.write_bytes(data)
        self.store.put(digest := file_digest(path), path)
        return digest

    def asks(self, machine: Machine, digest: str) -> httpx.Response:
        path = DOWNLOAD_PATH.format(digest=digest)
        (self.folder / "ca.pem").write_bytes(self.keys.ca_pem)
        headers = machine.headers("GET", path)
        return httpx.get(
            f"https://{self.place}{path}", verify=str(self.folder / "ca.pem"), headers=headers
        )

    def status(self, machine: Machine, digest: str) -> int:
        return self.asks(machine, digest).status_code


@pytest.fixture
def scene(tmp_path: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    monkeypatch.setenv(VARIABLE, address)
    monkeypatch.setattr(follower, "_COMPARE_EVERY_S", 0.5)
    logging.getLogger("uvicorn").setLevel(logging.CRITICAL)
    versions = tmp_path / "versions"
    versions.mkdir()
    home, _ = settings.init([HOST], at=tmp_path / "home")
    chosen = Settings(
        host=HOST, names=[HOST], versions=versions.as_uri(), download_port=free_port()
    )
    keys, ledger = settings.open_keys(home), open_ledger(home)
    store = ObjectStore(chosen.versions, keys.fleet)
    sender = Follower(home, keys, chosen)
    sender.start()
    made = Scene(
        Registry(ledger), store, keys, chosen, home, tmp_path, address.rpartition("%3D")[2]
    )
    member = made.enroll("member")
    wait_for(lambda: made.status(member, "0" * 64) == 404, "the replica knows the member")
    yield made
    sender.end()
    sender.join(30)
    assert not sender.is_alive()
    assert not (home / follower.FOLDER).exists()
    store.close()
    ledger.close()


def test_members_get_versions_until_they_are_removed(scene: Scene) -> None:
    digest, machine, stranger = scene.put(b"version"), scene.enroll("ann"), Machine("eve")
    stranger.fleet = scene.keys.fleet
    wait_for(lambda: scene.status(machine, digest) == 200, "a new member is known")
    assert scene.asks(machine, digest).content == b"version"
    assert scene.status(stranger, digest) == 401
    assert scene.status(machine, "../../ca.pem") == 404
    scene.registry.remove(machine.peer, "test")
    wait_for(lambda: scene.status(machine, digest) == 401, "a removed member is refused")


def test_an_agent_takes_a_large_version_from_a_replica_in_parts(scene: Scene) -> None:
    data = b"0123456789abcdef" * (MIN_BYTES // 8)
    digest, machine = scene.put(data), scene.enroll("ann")
    wait_for(lambda: scene.status(machine, digest) == 200, "a new member is known")
    link = WeightTransfer(credentials(scene, machine))
    link.replicas.use([scene.place])
    target = scene.folder / "version"
    target.with_suffix(".part").write_bytes(data[:1000])
    link.download(digest, len(data), target)  # the coordinator itself has no server
    assert target.read_bytes() == data
    assert link.bytes_down == len(data) - 1000
    assert b"".join(link.stream(digest, 5, 25, link.replicas.choose(len(data)))) == data[5:25]
    link.replicas.close()
    with pytest.raises(Unreachable):
        link.download(digest, len(data), scene.folder / "second")


def test_a_deleted_version_is_sent_no_more(scene: Scene) -> None:
    digest, machine = scene.put(b"deleted"), scene.enroll("ann")
    wait_for(lambda: scene.status(machine, digest) == 200, "the version is here")
    scene.store.delete(digest)
    wait_for(lambda: scene.status(machine, digest) == 404, "the version is gone")


def test_the_least_used_versions_go_and_are_fetched_again(scene: Scene) -> None:
    machine = scene.enroll("ann")
    digests = [scene.put(b"%d" % number) for number in range(version_cache.MAX_VERSIONS + 2)]
    wait_for(lambda: scene.status(machine, digests[0]) == 200, "a new member is known")
    for number, digest in enumerate((*digests, digests[0])):
        answer = scene.asks(machine, digest)
        assert answer.content == b"%d" % (number % len(digests))
    kept = list((scene.home / follower.FOLDER).iterdir())
    assert len(kept) == version_cache.MAX_VERSIONS


def test_without_the_ledger_nothing_is_sent(
    scene: Scene, server: postgres.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest, machine = scene.put(b"version"), scene.enroll("ann")
    wait_for(lambda: scene.status(machine, digest) == 200, "a new member is known")
    monkeypatch.setattr(follower, "STALE_S", 2.5)
    server.crash()
    try:
        wait_for(lambda: scene.status(machine, digest) == 503, "its members may be old")
    finally:
        server.start()
    wait_for(lambda: scene.status(machine, digest) == 200, "the ledger answers again")


def test_a_replica_stops_sending_once_the_ledger_was_set_back(
    scene: Scene, admin: psycopg.Connection[Any], caplog: pytest.LogCaptureFixture
) -> None:
    digest, machine = scene.put(b"version"), scene.enroll("ann")
    wait_for(lambda: scene.status(machine, digest) == 200, "a new member is known")
    schema = scene.schema
    (newest,) = admin.execute(f"SELECT max(seq) FROM {schema}.commonweight_log").fetchone() or (0,)
    admin.execute(f"DELETE FROM {schema}.commonweight_log WHERE seq = {newest}")
    # Another entry has its number: the older copy has continued, perhaps with a removal.
    row = "at, 'fleet', body, hash"
    admin.execute(
        f"INSERT INTO {schema}.commonweight_log (seq, at, subject, body, hash) "
        f"SELECT seq + 1, {row} FROM {schema}.commonweight_log ORDER BY seq DESC LIMIT 1"
    )
    wait_for(lambda: scene.status(machine, digest) == 503, "it sends nothing")
    assert "the ledger has lost entries" in caplog.text
    assert "restart this replica" in caplog.text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"versions": ""}, "versions that others can reach"),
        ({"download_port": 9092, "port": 9092}, "choose another"),
    ],
)
def test_settings_that_cannot_work_are_refused(changed: dict[str, int], message: str) -> None:
    chosen: Callable[..., Settings] = Settings
    with pytest.raises(UsageError) as caught:
        check_settings(chosen(**{"versions": "s3://bucket/a", **changed}))
    assert message in caught.value.message + caught.value.hint


def test_a_port_in_use_is_told_at_the_start(scene: Scene) -> None:
    with pytest.raises(PortInUse, match=str(scene.chosen.download_port)):
        Follower(scene.home, scene.keys, scene.chosen)


def credentials(scene: Scene, machine: Machine) -> Credentials:
    """Of a machine whose coordinator does not answer."""
    return Credentials(
        f"{HOST}:{free_port()}",
        scene.keys.ca_pem,
        machine.peer,
        machine.node_key,
        machine.sign_key,
        machine.fleet,
    )
