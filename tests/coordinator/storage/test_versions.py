"""Versions on disk: two writers of one folder, and what a killed writer leaves behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from coordinator.storage.versions import Versions
from protocols.errors import BadWeights
from protocols.model import weights
from protocols.model.weights import Array, Part, Weights

ONE = Weights({"w": np.arange(10, dtype=np.float32)})
OTHER = Weights({"w": np.full(1000, 7, np.float32)})


def test_two_writers_at_the_same_time_write_two_whole_versions(tmp_path: Path) -> None:
    folder = tmp_path / "versions"
    coordinator, command = Versions(folder), Versions(folder)

    def pieces() -> Iterator[dict[Part, Array]]:
        assert command.save(OTHER) == weights.digest(OTHER)
        for piece in weights.split_into_pieces(ONE.schema):
            yield {part: ONE.read(part) for part in piece}

    assert coordinator.write(ONE.schema, pieces()) == weights.digest(ONE)
    names = {path.name for path in folder.iterdir()}
    assert names == {f"{weights.digest(model)}.safetensors" for model in (ONE, OTHER)}
    assert all(weights.file_digest(folder / name) == name.partition(".")[0] for name in names)


def test_what_a_killed_writer_left_is_deleted_when_it_is_old(tmp_path: Path) -> None:
    folder = tmp_path / "versions"
    digest = Versions(folder).save(ONE)
    old, new = folder / ".new-1", folder / ".new-2"
    for path in (old, new):
        path.write_bytes(b"cut off")
    long_ago = time.time() - 7200
    os.utime(old, (long_ago, long_ago))
    os.utime(folder / f"{digest}.safetensors", (long_ago, long_ago))
    Versions(folder)
    assert {path.name for path in folder.iterdir()} == {new.name, f"{digest}.safetensors"}


@pytest.mark.attack("20.wire", by="task")
def test_a_file_of_another_program_is_copied(tmp_path: Path) -> None:
    """Attack: a ServerApp keeps its file of arrays open, and changes it after the check."""
    versions, source = Versions(tmp_path / "versions"), tmp_path / "source"
    for _ in range(2):  # the second time, the version is there
        digest = weights.save(ONE, source)
        with source.open("r+b") as file:
            versions.adopt(source, digest)
            file.seek(-4, os.SEEK_END)
            file.write(b"evil")
        assert not source.exists()
        assert weights.file_digest(versions.version_path(digest)) == digest
    weights.save(OTHER, source)
    for wrong in (digest, "0" * 64):  # one that is there, and one that is not
        with pytest.raises(BadWeights):
            versions.adopt(source, wrong)
    os.mkfifo(tmp_path / "pipe")  # which would be read for ever
    with pytest.raises(BadWeights, match="not a plain file"):
        versions.adopt(tmp_path / "pipe", "0" * 64)
    assert [path.stem for path in versions.folder.iterdir()] == [digest]
