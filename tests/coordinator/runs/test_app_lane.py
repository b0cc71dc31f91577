"""Replies that wait for a ServerApp, and what a crash leaves of its run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from coordinator.runs import transitions
from coordinator.runs.apps import frames, lane, leftovers, pushes, rules
from coordinator.runs.apps.frames import Content, Reply
from coordinator.runs.apps.lane import DROPPED, Lane
from coordinator.runs.retention import Retention
from coordinator.storage import run_events as facts
from coordinator.storage.weight_store import WeightStore
from protocols.errors import Refused
from protocols.messages import app_work
from protocols.messages.app_work import Arrays
from protocols.model import weights
from protocols.model.weights import Weights

SPEC = facts.RunSpec(task="flower:x", rounds=1, app="a" * 64)


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "run" / frames.IN
    folder.mkdir(parents=True)
    return folder


def _put(made: Lane, inbox: Path, *numbers: int) -> None:
    """Replies with files of 10 bytes."""
    for number in numbers:
        (inbox.parent / "upload").write_bytes(b"x" * 10)
        made.put_file(inbox.parent / "upload", number)
        made.put(Reply(id=number, told=b"told", has_arrays=True), 10)


def _files(inbox: Path) -> list[int]:
    return sorted(int(path.stem) for path in inbox.iterdir())


def test_a_reply_is_taken_once(inbox: Path) -> None:
    made = Lane(inbox.parent)
    _put(made, inbox, 1, 2)
    assert [reply.id for reply in made.take([2, 3])] == [2]
    assert made.take([2, 3]) == []
    assert [reply.id for reply in made.take([1])] == [1]
    assert made.waiting_bytes == 0
    assert _files(inbox) == [1, 2], "the ServerApp deletes what it has read"


@pytest.mark.attack("23.4")
@pytest.mark.parametrize(
    ("limit", "value"), [("MAX_WAITING", 3), ("MAX_WAITING_BYTES", 12), ("MAX_FILES_BYTES", 30)]
)
def test_replies_that_are_never_taken_have_bounds(
    limit: str, value: int, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attack: a ServerApp sends messages and takes no reply, until the coordinator's disk or memory
    is full."""
    monkeypatch.setattr(lane, limit, value)
    made = Lane(inbox.parent)
    _put(made, inbox, *range(1, 10))
    assert _files(inbox) == [7, 8, 9]
    assert made.waiting_bytes == 12
    told = made.take(range(1, 10))
    assert [reply.id for reply in told if not reply.error] == [7, 8, 9]
    assert {reply.error for reply in told if reply.id < 7} == {DROPPED}
    assert made.take(range(1, 10)) == []


def test_replies_that_nobody_awaits_are_deleted(inbox: Path) -> None:
    made = Lane(inbox.parent)
    _put(made, inbox, 1, 2)
    made.forget([1, 3, 4], sent=[3])
    _put(made, inbox, 3, 4)
    assert _files(inbox) == [2, 4]
    assert [reply.id for reply in made.take(range(5))] == [2, 4]


@pytest.mark.attack("23.4")
def test_a_link_in_place_of_the_inbox_is_not_followed(inbox: Path, tmp_path: Path) -> None:
    """Attack: a ServerApp puts a link in place of the folder of replies, or of its own arrays, so
    that the coordinator writes, or deletes, elsewhere."""
    home = tmp_path / "home"
    home.mkdir()
    store = WeightStore(home)
    digest = weights.save(Weights({"w": np.ones(3, np.float32)}), home / "model")
    (home / "model").rename(store.version_path(digest))
    made = Lane(inbox.parent)
    _put(made, inbox, 1)
    inbox.rename(tmp_path / "moved")
    inbox.symlink_to(store.folder)
    (store.folder / "1.safetensors").touch()
    (tmp_path / "upload").touch()
    with pytest.raises(OSError, match=r"directory|symbolic"):
        made.put_file(tmp_path / "upload", 2)
    made.forget([1], sent=[])
    (inbox.parent / frames.OUT).symlink_to(store.folder)
    content = Content(told=app_work.encode_told((Arrays("a", ("w",)),)), digest=digest)
    with pytest.raises(Exception, match="arrays cannot be sent"):
        pushes.store_arrays(store, inbox.parent, [content], set())
    assert {path.stem for path in store.folder.iterdir()} == {digest, "1"}


@pytest.mark.attack("23.4")
def test_a_file_larger_than_the_disk_is_not_copied(tmp_path: Path) -> None:
    """Attack: a ServerApp names a file that is larger than the disk, and takes no place on it, as
    its arrays: the copy would fill the disk."""
    store = WeightStore(tmp_path)
    out = tmp_path / "run" / frames.OUT
    out.mkdir(parents=True)
    with (out / f"{'a' * 64}{frames.SUFFIX}").open("wb") as file:
        file.truncate(shutil.disk_usage(tmp_path).total + 1)
    content = Content(told=app_work.encode_told((Arrays("a", ("w",)),)), digest="a" * 64)
    with pytest.raises(Refused, match="more than the whole disk"):
        pushes.store_arrays(store, out.parent, [content], set())


def test_versions_of_a_run_that_broke_off_are_deleted(tmp_path: Path) -> None:
    store = WeightStore(tmp_path)
    folder = rules.folder_of(tmp_path, "r1")
    (folder / frames.OUT).mkdir(parents=True)
    contents = []
    for number in range(3):
        file = folder / frames.OUT / "made"
        digest = weights.save(Weights({"w": np.full(3, number, np.float32)}), file)
        file.rename(file.with_name(digest + frames.SUFFIX))
        told = app_work.encode_told((Arrays("a", ("w",)),))
        contents.append(Content(told=told, digest=digest))
    kept, *lost = (content.digest for content in contents)
    pushes.store_arrays(store, folder, contents, set())
    # The coordinator is killed: the ledger has one of them, and another process starts.
    run = transitions.replay("r1", [facts.RunStarted(SPEC), facts.WeightsInitialised(kept, "x")])
    assert {path.stem for path in store.folder.iterdir()} == {kept, *lost}
    with os.fdopen(os.open(f"{folder}.versions", os.O_WRONLY | os.O_APPEND), "w") as file:
        file.write("0123")  # a line that was cut off
    leftovers.note_version(folder, "e" * 64)
    retention = Retention(run, WeightStore(tmp_path), set)
    assert "e" * 64 in retention.on_disk
    retention.prune(run)
    assert [path.stem for path in store.folder.iterdir()] == [kept]
    leftovers.delete(folder)
    assert not leftovers.exist(folder)
    assert list(folder.iterdir()) == []
