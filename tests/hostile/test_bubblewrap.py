"""The sandbox on a Linux without Landlock: bubblewrap limits the files."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from msgspec.structs import replace

from agent.policy import bubblewrap, landlock, sandbox
from protocols.errors import TrainerFailed
from tests.hostile.test_sandbox_memory import FORKS, ROWS, evaluate, told
from tests.support.fleet_harness import alive
from tests.support.hostile_task import Owner, own
from tests.support.waiting import wait_for

pytestmark = pytest.mark.attack("20.sandbox")
needs_bwrap = pytest.mark.skipif(
    sys.platform != "linux" or not bubblewrap.works(), reason="bubblewrap does not work here"
)

ATTACKS = {
    "tcp": "socket.create_connection(('127.0.0.1', 9), 5)",
    "ssh key": "open(HOME / '.ssh' / 'id_ed25519').read()",
    "agent's key": "open(HOME / 'agent' / 'sign.key').read()",
    "memory": "os.unlink(HOME / 'agent/told/told.db')",
    "accounts": "open('/etc/shadow').read()",
    "write its data": "open(HOME / 'data.csv', 'a')",
    "write a package": "open(os.__file__, 'a')",
    "link for the agent": "os.symlink(HOME / 'agent' / 'sign.key', 'update')",
    "pipe for the agent": "os.mkfifo('update')",
    "mount": "call(165, 0, 0, 0, 0, 0)",
    "agent's memory": "open(f'/proc/{AGENT}/mem')",
    "signal": "os.kill(AGENT, 0)",
    "new session": "pid = os.fork() or os._exit(TRY(os.setsid));"
    "OUGHT(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0)",
}


def in_bwrap(folder: Path, **more: object) -> Owner:
    """An owner's trainer under bubblewrap, although there may be Landlock too."""
    made = own(folder, "auto", f"AGENT = {os.getpid()}", **more)  # type: ignore[arg-type]
    program = made.trainer._program
    assert program.rules is not None
    made.trainer._program = program._replace(rules=replace(program.rules, bwrap=True))
    return made


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    made = in_bwrap(tmp_path_factory.mktemp("owner"), rows=ROWS)
    yield made
    made.trainer.stop()


@needs_bwrap
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_from_a_task_fail_in_bubblewrap(owner: Owner, name: str) -> None:
    """Attack: a task reaches for network, files, keys and processes, where there is no Landlock."""
    if name == "write a package" and Path(sys.prefix).is_relative_to(owner.folder):
        pytest.skip("the environment is in the owner's folder")
    with pytest.raises(TrainerFailed):
        owner.run(ATTACKS[name])
    assert (owner.folder / "agent" / "sign.key").read_text() == "secret"
    owner.run("open('result', 'w').write('x'); tempfile.NamedTemporaryFile().write(b'x')")


@needs_bwrap
def test_what_was_told_is_remembered_from_bubblewrap(tmp_path: Path) -> None:
    """Control: the helper keeps the memory of rows, and honest work goes on."""
    made = in_bwrap(tmp_path, rows=ROWS)
    try:
        evaluate(made)
        made.run("import multiprocessing as m; m.get_context('fork').Queue().put(1)")
    finally:
        made.trainer.stop()
    assert told(made) == [list(range(ROWS))]


@needs_bwrap
def test_no_process_of_a_task_outlives_bubblewrap(tmp_path: Path) -> None:
    """Attack: a task forks twice under bubblewrap, to go on after its trainer."""
    made = in_bwrap(tmp_path)
    family: list[psutil.Process] = []

    def is_whole() -> bool:
        # A snapshot of all processes can miss one that gets another parent meanwhile.
        family[:] = psutil.Process(made.trainer.pid).children(recursive=True)
        return len(family) >= 3

    try:
        made.run(FORKS.replace("str(os.getpid())", "'ready'"))
        wait_for((tmp_path / "work" / "pid").exists, "the task's process")
        wait_for(is_whole, "the helper, the trainer, and what it has started")
        assert "bwrap" in {process.name() for process in family}
    finally:
        made.trainer.stop()
    wait_for(lambda: not alive(family), "the end of all")


@pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is of Linux")
def test_bubblewrap_is_for_a_linux_without_landlock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: Landlock comes first; without both, doctor says what to install."""
    monkeypatch.setattr(landlock, "version", lambda: 6)
    assert not sandbox.support().bwrap
    monkeypatch.setattr(landlock, "version", lambda: 0)
    monkeypatch.setattr(bubblewrap, "works", lambda: True)
    found = replace_seccomp(sandbox.support())
    assert found.bwrap
    assert found.lacks() == []
    assert sandbox.describe("auto", found)[1] == ""
    monkeypatch.setattr(bubblewrap, "works", lambda: False)
    detail, fix = sandbox.describe("auto", replace_seccomp(sandbox.support()))
    assert "apt install bubblewrap" in detail
    assert fix


def replace_seccomp(found: sandbox.Support) -> sandbox.Support:
    return found._replace(seccomp=True)
