"""Uploads belong to a run: what another run or nobody needs is deleted."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.storage.spool import Spool


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool", ".bytes")


def digest(number: int) -> str:
    return f"{number:064x}"


def upload(spool: Spool, peer: str, number: int, *, whole: bool = True) -> Path:
    with spool.begin(peer, digest(number)) as part:
        part.path.write_bytes(b"x" * number)
        if whole:
            part.finish()
            part.sync()
    return spool.path(peer, digest(number))


def files(spool: Spool) -> list[str]:
    root = spool._root
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_the_end_of_a_run_deletes_its_uploads_and_stops_those_in_progress(spool: Spool) -> None:
    spool.begin_run("first")
    upload(spool, "A-1", 1)
    upload(spool, "B-2", 2, whole=False)
    with spool.begin("C-3", digest(3)) as part:
        part.path.write_bytes(b"x")
        assert part.is_current()
        spool.end_run()
        assert not part.is_current()
        spool.begin_run("second")
        assert not part.is_current()
    assert files(spool) == []
    assert spool.uncounted("A-1", frozenset()) == []


def test_a_run_continues_with_its_uploads_after_a_restart(spool: Spool) -> None:
    spool.begin_run("first")
    path = upload(spool, "A-1", 1)
    upload(spool, "B-2", 5, whole=False)
    again = Spool(spool._root, ".bytes")
    again.keep_runs({"first": []})
    assert again.uncounted("A-1", frozenset()) == [], "they are not those of another run"
    again.begin_run("first")
    assert again.uncounted("A-1", frozenset()) == [path]
    assert again.begin("B-2", digest(5)).nbytes == 5


def test_a_start_deletes_the_uploads_of_runs_that_have_ended(spool: Spool) -> None:
    spool.begin_run("ended")
    upload(spool, "A-1", 1)
    spool.begin_run("waits")
    upload(spool, "A-1", 2)
    again = Spool(spool._root, ".bytes")
    again.keep_runs({"waits": [], "new": []})
    assert files(again) == [f"waits/A-1-{digest(2)}.bytes"]


def test_uploads_of_an_older_version_are_moved_to_their_run(spool: Spool) -> None:
    for number in (1, 2, 3):
        upload(spool, "A-1", number, whole=number < 3)
    again = Spool(spool._root, ".bytes")
    again.keep_runs({"run": [("A-1", digest(2)), ("B-2", digest(9))]})
    assert files(again) == [f"run/A-1-{digest(2)}.bytes"]


def test_uploads_that_do_not_count_are_listed_oldest_first(spool: Spool) -> None:
    spool.begin_run("run")
    paths = [upload(spool, "A-1", number) for number in (3, 1, 2)]
    upload(spool, "B-2", 4)
    upload(spool, "A-1", 5, whole=False)
    assert spool.uncounted("A-1", frozenset()) == paths
    assert spool.uncounted("A-1", {digest(1)}) == [paths[0], paths[2]]
    spool.delete(paths[:1])
    assert spool.uncounted("A-1", {digest(1)}) == [paths[2]]
