"""Settings and fixtures that all tests share."""

from __future__ import annotations

import gc
import itertools
import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    import httpx

    from agent.transport.coordinator_client import CoordinatorClient
    from tests.support.https_site import Machine, Site

settings.register_profile(
    "default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")

_NUMBERS = itertools.count()

# Tests start hundreds of programs, which would all compile the same sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep what is imported and collected out of the garbage collector, as the programs do.

    A collection over the modules of all tests takes most of a second, and a coordinator collects
    after each run.
    """
    gc.disable()
    result = yield
    gc.collect()
    gc.freeze()
    gc.enable()
    return result


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give long tests ten minutes: they wait for several conditions, each with a bound of its own.

    On a machine with other work, three minutes ended a test of a fleet that was as it should be.
    """
    for item in items:
        if item.get_closest_marker("long") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> None:
    """Do the same with what the tests of other files have left."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Isolate tests from the COMMONWEIGHT_… variables and homes of this machine."""
    for name in list(os.environ):
        if name.startswith("COMMONWEIGHT_"):
            monkeypatch.delenv(name)
    data = tmp_path_factory.getbasetemp() / f"data{next(_NUMBERS)}"
    monkeypatch.setenv("XDG_DATA_HOME", str(data))


@pytest.fixture
def memory_path() -> Iterator[Path]:
    """A folder in memory, if this system has one, else on disk.

    Tests that commit to databases thousands of times wait for a disk most of their time. Not for
    tests of the sandbox, in which a task can use shared memory.
    """
    memory = Path("/dev/shm")
    place = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="commonweight-", dir=place) as folder:
        yield Path(folder)


@pytest.fixture
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator in this process publishes what peers wait for, and answers polls, at once."""
    monkeypatch.setattr("coordinator.daemon.peer_events.ONLINE_EVERY_S", 0.05)
    monkeypatch.setattr("coordinator.api.polls.LONG_POLL_S", 0.1)


@pytest.fixture
def coordinator_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The path of the coordinator's home, which does not exist yet."""
    home = tmp_path / "home"
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(home))
    return home


@pytest.fixture
def agent_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of an agent."""
    from protocols.local import homes

    monkeypatch.setenv("COMMONWEIGHT_AGENT_HOME", str(tmp_path / "home"))
    return homes.open_home("agent", create=True)


@pytest.fixture
def site(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Site]:
    """A coordinator's HTTPS server. Test files with other needs have a `site` of their own."""
    from tests.support.https_site import Site

    folder = tmp_path / "coordinator"
    folder.mkdir()
    has_flower = request.node.get_closest_marker("flower") is not None
    with Site(folder, flower=has_flower).up() as running:
        yield running


@pytest.fixture
def machine(site: Site) -> Machine:
    """A machine that is enrolled at `site`."""
    return site.enroll()


@pytest.fixture
def http(site: Site) -> Iterator[httpx.Client]:
    """An HTTP client for `site`, which trusts its CA."""
    with site.http() as client:
        yield client


@pytest.fixture
def link(site: Site, machine: Machine) -> Iterator[CoordinatorClient]:
    """The client of `machine` for `site`, without a session."""
    from agent.transport.coordinator_client import CoordinatorClient

    client = CoordinatorClient(site.credentials(machine))
    yield client
    client.close()
