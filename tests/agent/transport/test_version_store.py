"""The versions that an agent keeps: what a crash or a disk has spoilt is fetched again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from agent.transport.coordinator_client import CoordinatorClient
from agent.transport.version_store import VersionStore
from protocols.model import weights
from protocols.model.weights import Weights

MODEL = Weights({"w": np.arange(100, dtype=np.float32)})


class Source:
    """The coordinator's part: writes the model where it is asked to."""

    def __init__(self) -> None:
        self.fetched: list[str] = []

    def download(self, digest: str, nbytes: int, target: Path) -> None:
        self.fetched.append(digest)
        weights.save(MODEL, target)


@pytest.mark.parametrize("spoilt", [b"", b"x" * 50])
def test_a_damaged_version_is_fetched_again_by_the_next_process(
    tmp_path: Path, spoilt: bytes
) -> None:
    source, digest = Source(), weights.digest(MODEL)

    def life() -> VersionStore:
        return VersionStore(tmp_path, lambda: cast(CoordinatorClient, source))

    first = life()
    path = first.fetch(digest, MODEL.nbytes)
    assert first.fetch(digest, MODEL.nbytes) == path
    assert life().fetch(digest, MODEL.nbytes) == path
    assert source.fetched == [digest]
    path.write_bytes(spoilt or path.read_bytes()[:-1] + b"?")
    assert weights.file_digest(life().fetch(digest, MODEL.nbytes)) == digest
    assert source.fetched == [digest, digest]


def test_what_is_needed_stays_when_room_is_made(tmp_path: Path) -> None:
    versions = VersionStore(tmp_path, lambda: cast(CoordinatorClient, Source()))
    for age, name in enumerate(("newest", "old", "older")):
        file = tmp_path / f"{name}.safetensors"
        file.write_bytes(bytes(100))
        os.utime(file, (1000 - age, 1000 - age))
    (tmp_path / "cut.part").write_bytes(bytes(30))
    (tmp_path / "newest.work.json").write_bytes(bytes(10))

    def here() -> list[str]:
        return sorted(path.name for path in tmp_path.iterdir())

    assert versions.shrink(20, ()) == 30
    assert versions.shrink(20, ()) == 100
    assert here() == ["newest.safetensors", "newest.work.json", "old.safetensors"]
    assert versions.shrink(10_000, {"newest"}) == 100
    assert here() == ["newest.safetensors", "newest.work.json"]
