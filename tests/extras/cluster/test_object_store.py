"""Versions in an object store: moto's server speaks S3, and a folder needs no server."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from coordinator.storage.object_store import ObjectStore
from coordinator.storage.run_events import VersionLost
from coordinator.storage.settings import Settings
from coordinator.storage.weight_store import WeightStore
from protocols.errors import HomeError, StoreUnreachable, UsageError
from tests.support import in_process_fleet
from tests.support.fault_proxy import CLEAR, Fault, Proxy
from tests.support.in_process_fleet import Fleet, first_weights, some_data
from tests.support.waiting import until

FLEET = "ABCDEFGH"


@pytest.fixture(scope="module")
def s3() -> Iterator[ThreadedMotoServer]:
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture(params=["s3", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "file":
        (tmp_path / "shared").mkdir()
        return (tmp_path / "shared").as_uri()
    host, port = request.getfixturevalue("s3").get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    bucket = hashlib.sha256(os.fsencode(tmp_path)).hexdigest()[:20]
    boto3.client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}/fleets/a"


def some_file(folder: Path, content: bytes) -> tuple[str, Path]:
    digest = hashlib.sha256(content).hexdigest()
    path = folder / digest
    path.write_bytes(content)
    return digest, path


def test_files_come_back_with_their_bytes(url: str, tmp_path: Path) -> None:
    store = ObjectStore(url, FLEET)
    digest, path = some_file(tmp_path, os.urandom(20_000_000))  # in three parts
    store.put(digest, path)
    store.put(digest, path)
    assert store.digests() == {digest}
    assert store.get(digest, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert not store.get("0" * 64, tmp_path / "none")
    wrong = hashlib.sha256(b"other").hexdigest()
    store.put(wrong, path)
    assert not store.get(wrong, tmp_path / "wrong"), "its bytes are not those of its name"
    assert not (tmp_path / "wrong").exists()
    store.delete(wrong)
    store.delete(digest)
    store.put(digest, path)  # in order: after its deletion
    store.close()
    assert ObjectStore(url, FLEET).digests() == {digest}


def test_a_large_file_takes_little_memory(url: str, tmp_path: Path) -> None:
    store = ObjectStore(url, FLEET)
    if url.startswith("s3"):
        pytest.skip("the server is in this process, and has the file in memory")
    digest, path = some_file(tmp_path, os.urandom(1_000_000) * 400)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    store.put(digest, path)
    assert store.get(digest, tmp_path / "again")
    grown_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kb < 150_000, "of 400 MB"
    store.close()


def test_what_cannot_be_used_is_told_before_anything_is_changed(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for wrong in ("ftp://host/x", "s3://", "s3://key:secret@bucket/x", "s3://bucket/x?key=secret"):
        with pytest.raises(UsageError) as told:
            ObjectStore(wrong, FLEET)
        assert "secret" not in told.value.message + told.value.hint or "?" in wrong
    store = ObjectStore(url, FLEET)
    store.put(*some_file(tmp_path, b"a version"))
    with pytest.raises(HomeError, match=f"versions of another fleet, {FLEET}"):
        ObjectStore(url, "OTHER")
    assert len(store.digests()) == 1
    store.close()
    if url.startswith("s3"):
        with pytest.raises(UsageError, match="no bucket"):
            ObjectStore("s3://nobody-has-this-bucket/x", FLEET)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        with pytest.raises(StoreUnreachable, match="cannot be read"):
            ObjectStore(url, FLEET)
    else:
        with pytest.raises(HomeError, match="is not there"):
            ObjectStore(f"{url}/nothing", FLEET)


def test_another_home_gets_the_versions(url: str, tmp_path: Path) -> None:
    homes = [tmp_path / "first", tmp_path / "second"]
    for home in homes:
        home.mkdir()
    mirror = ObjectStore(url, FLEET)
    first = WeightStore(homes[0], mirror)
    made = [first.save(first_weights(5, seed)) for seed in range(3)]
    first.drop(made[0])
    mirror.close()
    second = WeightStore(homes[1], again := ObjectStore(url, FLEET))
    assert [second.verify_digest(digest) for digest in made] == [False, True, True]
    # What was made without the store is there at the next start.
    third = WeightStore(homes[0]).save(first_weights(5, 9))
    WeightStore(homes[0], again)
    assert again.digests() == {made[1], made[2], third}
    again.close()


async def test_a_run_survives_the_loss_of_its_versions_and_of_the_store(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_store(**chosen: Any) -> Settings:
        return Settings(versions=url, **chosen)

    monkeypatch.setattr(in_process_fleet, "Settings", with_store)
    target = int(os.environ["AWS_ENDPOINT_URL"].rpartition(":")[2]) if "s3:" in url else 0
    with Proxy(target) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        fleet = Fleet(tmp_path)
        try:
            async with fleet.up():
                for seed in range(2):
                    fleet.join(f"agent{seed}", some_data(20, seed))
                await fleet.online(2)
                run = fleet.start(rounds=25, quorum=2, strategy="fedadam")
                await until(lambda: len(fleet.hub.runs.find(run).history) >= 2)
            for folder in ("versions", "states"):
                shutil.rmtree(fleet.home / folder)
            async with fleet.up():
                if target:
                    proxy.fault = Fault(refuse=True)
                    proxy.reset()
                    await until(lambda: fleet.waits_for(run) == "the store of the versions")
                    proxy.fault = CLEAR
                ended = await fleet.finished(run)
                assert len(ended.history) == 25
                assert not fleet.facts(run, VersionLost)
                folders = [fleet.home / folder for folder in ("versions", "states")]
                versions, states = ({p.stem for p in one.glob("*.safetensors")} for one in folders)
                await fleet.close()
        finally:
            await fleet.close()
        store = ObjectStore(url, fleet.keys.fleet)
        assert store.digests() == versions
        assert store.for_states().digests() == states != set()
        assert ended.head in versions
        store.close()
