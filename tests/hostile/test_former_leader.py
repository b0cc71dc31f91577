"""A coordinator that another one has replaced shows its agents an honest log of its past."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from protocols.errors import FormerLeader, HomeError
from tests.support.version_logs import Authority, Follower, Shown


class Leader(Shown):
    """`leads(term)`: sign with this term from now on, as over a ledger in PostgreSQL."""

    def leads(self, term: int) -> Leader:
        self.ledger.term = term
        return self


class Scene:
    """A leader that stood still after version 3, and its successor, which made another version."""

    def __init__(self, folder: Path) -> None:
        self.authority = Authority(folder / "authority")
        self.former = Leader(self.authority, folder / "former").leads(1_700_000_000)
        self.former.start()
        for number in (1, 2, 3):
            self.former.version(number)
        copy = self.former.copy(folder / "successor")
        copy.close()
        self.successor = Leader(self.authority, folder / "successor").leads(1_700_000_009)
        self.former.leads(1_700_000_000)  # the copy has opened it again
        self.ada = Follower(self.authority, folder / "ada", self.former)
        self.bob = Follower(self.authority, folder / "bob", self.former)
        for agent in (self.ada, self.bob):
            agent.train(3)
        self.ada.shown = self.successor
        self.successor.version(4)
        self.ada.train(4)

    def close(self) -> None:
        for agent in (self.ada, self.bob):
            agent.log.close()
        self.former.close()
        self.successor.close()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.close()


@pytest.mark.attack("11")
def test_a_former_leader_gives_no_work(scene: Scene) -> None:
    """Attack: give work on a version of the past, as a coordinator that was replaced."""
    scene.ada.shown = scene.former
    for _ in range(2):
        with pytest.raises(FormerLeader, match="another coordinator leads the fleet now"):
            scene.ada.train(3)
        scene.ada.restart()
    assert not scene.ada.forks, "the log of the past is no lie"


@pytest.mark.attack("11")
def test_a_peer_tells_of_the_new_leader(scene: Scene) -> None:
    """Attack: the same, to an agent that has not reached the successor."""
    scene.bob.train(3)
    scene.bob.hear(scene.ada)
    with pytest.raises(FormerLeader):
        scene.bob.train(3)


@contextmanager
def no_room(file: Path) -> Iterator[None]:
    """No file of this process grows beyond the size of this one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.attack("11")
def test_a_new_leader_is_remembered_also_after_a_full_disk(scene: Scene) -> None:
    """Attack: the same, to an agent whose disk was full when it first met the successor."""
    bob = scene.bob
    bob.shown = scene.successor
    with no_room(bob.home / "log.db-wal"), pytest.raises(HomeError):
        bob.train(4)
    bob.train(4)
    bob.restart()
    bob.shown = scene.former
    with pytest.raises(FormerLeader):
        bob.train(3)


@pytest.mark.attack("11")
def test_another_version_of_a_former_leader_is_a_proof(scene: Scene) -> None:
    """Attack: make another version after the successor has made one."""
    scene.ada.log.news(scene.former.news())
    assert not scene.ada.forks
    scene.former.version(4, "of the former leader")
    scene.ada.log.news(scene.former.news())
    assert len(scene.ada.forks) == 1


@pytest.mark.attack("11")
def test_whoever_leads_without_a_term_is_followed(scene: Scene) -> None:
    """Control: an older coordinator, or one whose ledger was moved to a file, has no term."""
    scene.ada.shown = scene.successor.leads(0)
    scene.ada.train(4)
    scene.ada.shown = scene.successor.leads(1_800_000_000)
    scene.ada.train(4)
    assert not scene.ada.forks
