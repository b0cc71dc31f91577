"""A task that attacks the memory of rows, or leaves processes behind when its trainer ends."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from agent.data.disclosed_sets import DisclosedSets
from agent.data.helper_requests import Admit, Divide, Register, Reply, Tell, encode
from agent.data.memory_service import MemoryService
from agent.policy import sandbox
from agent.tasks.work import Describe, Evaluate
from protocols.errors import NotAllowed, TrainerFailed
from protocols.model import schema_card, weights
from protocols.model.weights import Weights
from protocols.tables.statistics import TableStatistics
from tests.support.hostile_task import Owner, own
from tests.support.waiting import wait_for

LACKS = sandbox.support().lacks()
enforced = pytest.mark.skipif(bool(LACKS), reason=f"this machine lacks {' and '.join(LACKS)}")
pytestmark = [enforced, pytest.mark.attack("20.sandbox")]

ROWS, MIN = 30, 5
ATTACKS = {
    "delete": "os.unlink(HOME / 'agent/told/told.db')",
    "overwrite": "open(HOME / 'agent/told/told.db', 'r+b')",
    "truncate": "os.truncate(HOME / 'agent/told/told.db', 0)",
    "read": "open(HOME / 'agent/told/told.db', 'rb')",
    "journal": "open(HOME / 'agent/told/told.db-journal', 'wb')",
    "move the folder": "os.rename(HOME / 'agent/told', HOME / 'work/told')",
    "memory of the helper": "open(f'/proc/{HELPER}/mem', 'r+b')",
    "file of the helper": "[open(f'/proc/{HELPER}/fd/{n}', 'r+b') for n in range(99)]",
    "end of the helper": "os.kill(HELPER, signal.SIGKILL)",
    "pause of the helper": "os.kill(HELPER, signal.SIGSTOP)",
}


def evaluate(owner: Owner, code: str = "") -> None:
    """An evaluation, before which the trainer tells of all rows."""
    base = owner.folder / "work" / "base.safetensors"
    weights.save(Weights({"w": np.zeros(1, np.float32)}), base)
    settings = {"do": f"{owner.prelude}\n{code}"}
    owner.trainer.run(Evaluate(task="hostile", settings=settings, base=str(base)))


def told(owner: Owner) -> list[list[int]]:
    memory = DisclosedSets(owner.folder / "agent" / "told" / "told.db")
    try:
        return [rows.tolist() for rows in memory.rows_of("held")]
    finally:
        memory.close()


@pytest.fixture(scope="module")
def owner(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Owner]:
    made = own(tmp_path_factory.mktemp("owner"), "require", rows=ROWS)
    evaluate(made)
    assert made.trainer.pid is not None
    (helper,) = psutil.Process(made.trainer.pid).children()
    yield made._replace(prelude=f"{made.prelude}\nHELPER = {helper.pid}")
    made.trainer.stop()


@pytest.mark.parametrize("name", ATTACKS)
def test_a_task_cannot_change_what_was_told(owner: Owner, name: str) -> None:
    """Attack: a task deletes or changes the memory of rows, to be asked again after a change."""
    if "helper" in name and sandbox.support().landlock < 6 and "os.kill" in ATTACKS[name]:
        pytest.skip("Landlock 6 (Linux 6.12) limits signals")
    with pytest.raises(TrainerFailed) as refused:
        owner.run(ATTACKS[name])
    if name != "move the folder":  # between folders this is EXDEV
        assert refused.value.kind == sandbox.KIND, refused.value
    assert told(owner) == [list(range(ROWS))]
    evaluate(owner)


def test_a_row_less_is_refused_whatever_the_task_says(tmp_path: Path) -> None:
    """Attack: after one row was deleted, a task asks the helper itself with a lower limit."""
    made = own(tmp_path, "require", rows=ROWS)
    try:
        evaluate(made)
        made.trainer.stop()
        data = tmp_path / "data.csv"
        data.write_text("\n".join(data.read_text().splitlines()[:-1]) + "\n")
        with pytest.raises(TrainerFailed, match="would reveal a few rows alone"):
            evaluate(made)
        with pytest.raises(TrainerFailed, match="would reveal a few rows alone"):
            made.run(
                "import numpy, agent.data.helper_requests as m\n"
                "from agent.data.disclosed_sets import ToldSet\n"
                "m.stores().tell([ToldSet('held', numpy.arange(29))], 0)"
            )
    finally:
        made.trainer.stop()
    assert told(made) == [list(range(ROWS))]


def test_nonsense_ends_the_helper_of_this_trainer_only(tmp_path: Path) -> None:
    """Attack: a task sends the helper frames that are none, or of 2 GB. Nothing is recorded, and
    the next trainer has a helper again."""
    made = own(tmp_path, "require", rows=ROWS)
    send = "import agent.data.helper_requests as m, struct\npipe = m.stores()._pipe\n"
    try:
        made.run(f"{send}pipe.send_bytes(b'nonsense'); assert b'not a valid' in pipe.recv_bytes()")
        evaluate(made)
        made.run(f"{send}os.write(pipe.fileno(), struct.pack('!i', 0x7fffffff) + bytes(4096))")
        made.run("import time; time.sleep(0.2)")
        with pytest.raises(TrainerFailed):
            evaluate(
                made._replace(folder=tmp_path),
                "import agent.data.helper_requests as m\nm.stores().secret()",
            )
        made.trainer.stop()
        evaluate(made)
    finally:
        made.trainer.stop()
    assert told(made) == [list(range(ROWS))]


def test_an_answer_that_was_never_sent_is_remembered(tmp_path: Path) -> None:
    """Attack: the trainer dies by SIGKILL between the decision to tell and the answer, again and
    again, so that nothing is recorded."""
    made = own(tmp_path, "require", rows=ROWS)
    try:
        for _ in range(3):
            with pytest.raises(TrainerFailed, match="killed"):
                evaluate(
                    made,
                    "times = globals().get('times', 0) + 1\n"
                    "if times == 2: os.kill(os.getpid(), signal.SIGKILL)",
                )
    finally:
        made.trainer.stop()
    assert told(made) == [list(range(ROWS))]


class Service:
    """The helper's answers to a hostile task's requests."""

    def __init__(self, folder: Path) -> None:
        self._answers = MemoryService(folder / "told.db", MIN, lambda: folder)

    def ask(self, request: object) -> Reply:
        import msgspec

        reply = msgspec.msgpack.decode(self._answers.answer(encode(request)), type=Reply)
        if reply.error is not None:
            raise NotAllowed(*reply.error[1:])
        return reply


def rows(*numbers: int) -> bytes:
    return np.array(numbers, np.int64).tobytes()


def test_a_task_admits_no_rows_that_are_to_come(tmp_path: Path) -> None:
    """Attack: numbers are given in order, so a task admits those of the next rows in advance."""
    service = Service(tmp_path)
    hashes = np.arange(ROWS, dtype=np.uint64)
    service.ask(Register("table", hashes.tobytes(), None, ("a",)))
    service.ask(Admit(rows(*range(ROWS)), True))
    for numbers in (range(ROWS, ROWS + 9), range(-9, 0)):
        with pytest.raises(NotAllowed, match="rows without a number"):
            service.ask(Admit(rows(*numbers), False))
        with pytest.raises(NotAllowed, match="rows without a number"):
            service.ask(Tell("train", rows(*numbers)))
    grown = np.arange(ROWS + 1, dtype=np.uint64)
    service.ask(Register("grown", grown.tobytes(), None, ("a",)))
    (mask,) = service.ask(Admit(rows(*range(ROWS + 1)), True)).arrays
    assert np.flatnonzero(~np.frombuffer(mask, np.bool_)).tolist() == [ROWS]


def test_requests_of_other_shapes_are_refused(tmp_path: Path) -> None:
    """Attack: masks and draws of other lengths than the rows, and a set of an analytics answer."""
    service = Service(tmp_path)
    service.ask(Register("table", np.arange(3, dtype=np.uint64).tobytes(), None, ("a",)))
    three = rows(0, 1, 2)
    for request, words in [
        (Divide("s", three, b"\1\1", b""), "mask of another number"),
        (Divide("s", three, b"\1\1\1", b"\1"), "the table changed"),
        (Tell("cell", three), "tells no cell"),
        (Tell("held", three[:5]), "not a valid request"),
        (Register("t", bytes(24), bytes(16), ()), "another number of rows"),
    ]:
        with pytest.raises(NotAllowed, match=words):
            service.ask(request)


FORKS = """
for depth in range(2):
    if os.fork():
        if depth: os._exit(0)
        break
else:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    TRY(os.setsid)
    pathlib.Path('pid.new').write_text(str(os.getpid()))
    os.rename('pid.new', 'pid')
    while True:
        signal.pause()
"""


def left(folder: Path) -> psutil.Process:
    """The process that the task left in this folder."""
    file = folder / "work" / "pid"
    wait_for(file.exists, "the task's process")
    return psutil.Process(int(file.read_text()))


@pytest.mark.parametrize("end", ["stop", "exit", "kill"])
def test_no_process_of_a_task_outlives_its_trainer(tmp_path: Path, end: str) -> None:
    """Attack: a task forks twice and tries to leave its process group, to go on after the end."""
    made = own(tmp_path, "require")
    try:
        made.run(FORKS)
        process = left(tmp_path)
        if end == "stop":
            made.trainer.stop()
        elif end == "exit":
            with pytest.raises(TrainerFailed):
                made.run("os._exit(0)")
        else:
            with pytest.raises(TrainerFailed):
                made.run("os.kill(os.getpid(), signal.SIGKILL)")
        wait_for(lambda: not process.is_running() or process.status() == "zombie", "its end")
    finally:
        made.trainer.stop()


AGENT = """
import sys
from pathlib import Path
from tests.hostile.test_sandbox_memory import FORKS
from tests.support.hostile_task import own
made = own(Path(sys.argv[1]), "require")
made.run(FORKS)
print("ready", flush=True)
sys.stdin.read()
"""


def test_no_process_of_a_task_outlives_its_agent(tmp_path: Path) -> None:
    """Attack: the agent is killed by SIGKILL, and nobody is there to end what the task started."""
    root = Path(__file__).parents[2]
    agent = subprocess.Popen(
        [sys.executable, "-c", AGENT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    try:
        assert agent.stdout is not None
        assert agent.stdout.readline() == b"ready\n"
        process = left(tmp_path)
    finally:
        agent.send_signal(signal.SIGKILL)
        agent.communicate()
    wait_for(lambda: not process.is_running() or process.status() == "zombie", "its end")


def test_the_memory_is_private(owner: Owner) -> None:
    """Attack: another account reads the memory of rows."""
    file = owner.folder / "agent" / "told" / "told.db"
    assert file.stat().st_mode & 0o077 == 0
    with sqlite3.connect(f"file:{file}?mode=ro", uri=True) as db:
        assert db.execute("SELECT COUNT(*) FROM told_sets").fetchone() == (1,)


def test_a_table_is_surveyed_in_the_sandbox(tmp_path: Path) -> None:
    """Control: the task `tabular` works in the sandbox, and its helper remembers the rows."""
    pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")
    made = own(tmp_path, "require", rows=ROWS)
    try:
        done = made.trainer.run(Describe(task="tabular", settings={"target": "a"}))
    finally:
        made.trainer.stop()
    found = schema_card.decode(done.description)
    assert isinstance(found, TableStatistics)
    assert found.rows == ROWS
    memory = DisclosedSets(tmp_path / "agent" / "told" / "told.db")
    assert [len(rows) for rows in memory.rows_of("table")] == [ROWS]
    memory.close()
