"""The trainer's child process, seen from its parent: real processes, real digits."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest

import agent
from agent.daemon import client_factory
from agent.data.settings import DataSettings
from agent.home.settings_schema import AgentSettings
from agent.tasks import Cancelled, Settings
from agent.tasks.work import Describe, Done, Evaluate, Init, Measure, Train
from agent.trainer.ipc import (
    Answer,
    Cancel,
    Failed,
    Pace,
    Pause,
    Progress,
    Ready,
    decode_answer,
    encode,
)
from agent.trainer.process import TrainerProcess, trainer_program
from agent.trainer.progress import WorkControl
from protocols.errors import TrainerFailed
from protocols.model import weights
from protocols.model.weights import Weights
from tests.support.waiting import wait_for

ROOT = Path(agent.__file__).parents[1]
PATIENCE_S = 60.0
ENDLESS = {"epochs": 1_000_000}

#: A task of somebody else's: numpy only, imports nothing of ours, found by its entry point.
ODD_TASK = """
import subprocess, sys, time
import numpy as np

class Odd:
    def schema(self, settings):
        return {"w": ("F32", (3,))}

    def init(self, seed, settings):
        return {"w": np.full(3, seed, np.float32)}

    def load(self, data):
        pass

    def train(self, weights, settings, on_step):
        do = settings.get("do")
        print("a line that is no frame")
        if do == "out of memory":
            np.empty(1 << 60, np.uint8)
        if do == "wrong shape":
            return {"w": np.zeros(4, np.float32)}, 1, {}
        if do == "raise":
            raise ValueError("the third row is odd")
        if do == "hang":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            try:
                on_step(child.pid, 1 << 40, 0.0, 0)
            except BaseException:
                pass  # it obeys nobody, even if it is cancelled this early
            time.sleep(600)
        if do == "long batch":
            if settings.get("after a step"):
                on_step(1, 2, 0.0, 0)
            open("in the batch", "w").close()
            while True:
                pass
        if do == "exit":
            sys.exit(3)
        if do == "read":
            assert sys.stdin.read() == ""
        for step in range(1, 4):
            on_step(step, 3, float("nan"), step)
        return {"w": weights["w"] + 1}, 5, {"loss": float("nan"), "threads": threads()}

    def evaluate(self, weights, settings, on_step):
        return 2, {"mean": weights["w"].mean()}

class Kept(Odd):
    # Has a journal, and says so when it is about to stand still at a pause.

    def snapshot(self):
        from agent.tasks import Snapshot
        open("at the pause", "w").close()
        return Snapshot({}, {})

    def restore(self, snapshot):
        pass

def threads():
    import os
    return int(os.environ["OMP_NUM_THREADS"])
"""


class Frames:
    """Collects progress; waits for a frame that fits."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.seen: list[Progress] = []

    def __call__(self, progress: Progress) -> None:
        with self._changed:
            self.seen.append(progress)
            self._changed.notify_all()

    def clear(self) -> None:
        self.seen.clear()

    def wait(self, fits: Callable[[Progress], bool], timeout_s: float = PATIENCE_S) -> Progress:
        with self._changed:
            found = self._changed.wait_for(lambda: [p for p in self.seen if fits(p)], timeout_s)
        assert found, f"no such frame in {timeout_s} s"
        return found[0]


class Site:
    """A trainer with its folder, its frames, and the first weights of the 2NN."""

    def __init__(self, folder: Path, cache: str = "", **options: float) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.frames = Frames()
        self.data = DataSettings(index=1, parts=10, cache=cache)
        self.trainer = TrainerProcess(
            trainer_program(folder, threads=1),
            self.data,
            on_progress=self.frames,
            **options,  # type: ignore[arg-type]
        )
        self._pool = ThreadPoolExecutor(1)
        self.base = folder / "base.safetensors"
        self.out = folder / "out.safetensors"

    def start(self, task: str = "mnist", **settings: str | int | float) -> Future[Done]:
        self.frames.clear()
        return self._pool.submit(self.trainer.run, self.training(task, settings))

    def training(self, task: str, settings: Settings) -> Train:
        """The work of training the first weights."""
        return Train(task=task, settings=dict(settings), base=str(self.base), out=str(self.out))

    def train(self, task: str = "mnist", **settings: str | int | float) -> Done:
        return self.start(task, **settings).result(PATIENCE_S)

    def wait_for_log(self, text: str, times: int = 1) -> None:
        """Wait until the log has the text so often. A thread copies what the child prints, and may
        be later than an answer."""
        log = self.folder / "trainer.log"
        wait_for(lambda: log.read_text().count(text) >= times, f"{text!r} in the log")
        assert log.read_text().count(text) == times

    def close(self) -> None:
        self.trainer.stop()
        self._pool.shutdown()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    site.trainer.run(Init(task="mnist", settings={}, seed=1, out=str(site.base)))
    yield site
    site.close()


@pytest.fixture
def odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A trainer beside which the package of the odd task is installed. No torch: quick."""
    package = tmp_path / "packages"
    info = package / "odd-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "odd_task.py").write_text(ODD_TASK)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: odd\nVersion: 1.0\n")
    names = "odd = odd_task:Odd\nkept = odd_task:Kept\n"
    (info / "entry_points.txt").write_text(f"[commonweight.tasks]\n{names}")
    monkeypatch.setenv("PYTHONPATH", str(package), prepend=os.pathsep)
    site = Site(tmp_path / "site", hang_s=PATIENCE_S, grace_s=0.2)
    site.trainer.run(Init(task="odd", settings={}, seed=7, out=str(site.base)))
    yield site
    site.close()


only_linux = pytest.mark.skipif(sys.platform != "linux", reason="a child hears of it on Linux")


def failure(work: Future[Done]) -> TrainerFailed:
    with pytest.raises(TrainerFailed) as caught:
        work.result(PATIENCE_S)
    return caught.value


def gone(pid: int) -> bool:
    """True if the process ends within the bound; when init reaps it is not our affair."""
    until = time.monotonic() + PATIENCE_S
    try:
        process = psutil.Process(pid)
        while process.status() != psutil.STATUS_ZOMBIE:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
    except psutil.NoSuchProcess:
        pass
    return True


def test_training_improves_accuracy(site: Site) -> None:
    before = site.trainer.run(Evaluate(task="mnist", settings={}, base=str(site.base)))
    done = site.train(epochs=2)
    after = site.trainer.run(Evaluate(task="mnist", settings={}, base=str(site.out)))
    assert done.num_examples == 400
    assert before.num_examples == after.num_examples == 100
    assert after.metrics["accuracy"] > before.metrics["accuracy"] + 0.3  # type: ignore[operator]
    assert after.metrics["loss"] < before.metrics["loss"]  # type: ignore[operator]


def test_answer_describes_the_file(site: Site) -> None:
    done = site.train(epochs=1)
    assert done.digest == weights.file_digest(site.out)
    assert done.nbytes == site.out.stat().st_size
    last = site.frames.seen[-1]
    assert (last.phase, last.step, last.steps) == ("train", 40, 40)
    assert last.examples_per_s > 0
    assert last.loss is not None


def test_same_inputs_give_the_same_bytes(site: Site) -> None:
    one = site.train(epochs=1, seed=3, round=2)
    assert site.train(epochs=1, seed=3, round=2).digest == one.digest
    assert site.train(epochs=1, seed=3, round=3).digest != one.digest


def test_pause_stands_still_and_resume_finishes(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.trainer.supervisor.FREEZE_AFTER_S", 600.0)  # batches are quick
    undisturbed = site.train(epochs=3)
    # Paused before it starts: so the pause surely falls into the work.
    site.trainer.pause()
    work = site.start(epochs=3)
    first = site.frames.wait(lambda p: p.paused)
    assert first.step == 1
    assert not work.done()
    count = len(site.frames.seen)
    with pytest.raises(AssertionError):
        site.frames.wait(lambda p: p.step > first.step, timeout_s=0.5)
    assert len(site.frames.seen) == count
    site.trainer.resume()
    assert work.result(PATIENCE_S).digest == undisturbed.digest
    assert site.frames.seen[-1].step == site.frames.seen[-1].steps == 120


def test_pause_and_cancel_act_in_mid_work(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "agent.trainer.supervisor.FREEZE_AFTER_S", 600.0
    )  # as if batches were quick
    work = site.start(**ENDLESS)
    site.frames.wait(lambda p: p.step > 1)
    assert site.trainer.idle_s == 0
    site.trainer.pause()
    stood = site.frames.wait(lambda p: p.paused)
    site.trainer.cancel(Measure)  # there is none
    site.trainer.resume()
    site.frames.wait(lambda p: p.step > stood.step)
    site.trainer.pause()
    site.frames.wait(lambda p: p.paused and p.step > stood.step)
    pid = site.trainer.pid
    site.trainer.cancel()
    assert failure(work).kind == "cancelled"
    site.trainer.resume()
    assert site.train(epochs=1).num_examples == 400
    assert site.trainer.pid == pid, "a cancel does not cost the child"


def test_a_slower_pace_rests_after_each_batch(odd: Site) -> None:
    """The gate alone: a tenth of the time at work is nine times as long at rest."""
    control, work_s = WorkControl(), 0.02
    control.apply(Pace(0.1))
    began = time.monotonic()
    control.throttle(work_s)
    assert time.monotonic() - began >= 9 * work_s
    done = threading.Event()
    threading.Thread(target=lambda: (control.throttle(1e9), done.set()), daemon=True).start()
    assert not done.is_set()
    control.apply(Pace(1.0))
    assert done.wait(PATIENCE_S), "another pace ends the rest"
    odd.trainer.pace(0.5)
    assert odd.train("odd").num_examples == 5


class Stopped:
    """Whether the trainer is stopped by the system, in the middle of a batch or of a load."""

    def __init__(self, site: Site) -> None:
        assert site.trainer.pid is not None
        self._child = psutil.Process(site.trainer.pid)

    def __bool__(self) -> bool:
        return bool(self._child.status() == psutil.STATUS_STOPPED)

    def wait(self, what: bool) -> None:
        wait_until(lambda: bool(self) is what)


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


@only_linux
def test_a_long_batch_is_paused_in_its_middle(odd: Site) -> None:
    work = odd.start("odd", do="long batch", **{"after a step": True})
    # Before the batch a pause is obeyed without a signal: the trainer stands still after its step.
    wait_until((odd.folder / "in the batch").exists)
    stopped = Stopped(odd)
    odd.trainer.pause()
    stopped.wait(True)
    odd.trainer.pause()
    assert stopped, "a second pause does not undo the first"
    odd.trainer.resume()
    stopped.wait(False)
    odd.trainer.pause()
    stopped.wait(True)
    odd.trainer.cancel()
    assert failure(work).kind == "cancelled"
    odd.trainer.resume()
    assert odd.train("odd").num_examples == 5


@only_linux
def test_a_pause_that_came_before_the_work_holds_up_its_first_batch(
    odd: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.trainer.supervisor.FREEZE_AFTER_S", 0.0)
    earlier = set(threading.enumerate())
    odd.trainer.pause()
    timers = [each for each in threading.enumerate() if isinstance(each, threading.Timer)]
    for timer in set(timers) - earlier:
        timer.join(PATIENCE_S)
    work = odd.start("odd", do="long batch")
    stopped = Stopped(odd)
    stopped.wait(True)
    odd.trainer.resume()
    wait_until((odd.folder / "in the batch").exists)
    odd.trainer.stop()
    assert failure(work).kind == "stopped"


@only_linux
def test_a_late_answer_to_an_earlier_pause_does_not_pass_for_the_present_one(odd: Site) -> None:
    """The trainer's answers wait in the pipe, as on a busy machine, while it is told to go on."""
    held = threading.Event()
    odd.trainer._on_progress = lambda progress: (odd.frames(progress), held.wait(PATIENCE_S))[0]
    odd.trainer.pause()
    work = odd.start("kept", do="long batch", **{"after a step": True})
    wait_until((odd.folder / "at the pause").exists)
    odd.trainer.resume()
    wait_until((odd.folder / "in the batch").exists)
    odd.trainer.pause()
    held.set()
    odd.frames.wait(lambda progress: progress.paused)
    Stopped(odd).wait(True)
    odd.trainer.stop()
    assert failure(work).kind == "stopped"


@only_linux
def test_the_end_of_the_thread_that_started_the_trainer_does_not_thaw_it(odd: Site) -> None:
    odd.trainer.stop()
    started, over = threading.Event(), threading.Event()

    def start() -> None:
        odd.trainer.run(Init(task="odd", settings={}, seed=7, out=str(odd.base)))
        started.set()
        over.wait(PATIENCE_S)

    starter = threading.Thread(target=start)
    starter.start()
    assert started.wait(PATIENCE_S)
    work = odd.start("odd", do="long batch")
    wait_until((odd.folder / "in the batch").exists)
    stopped = Stopped(odd)
    odd.trainer.pause()
    stopped.wait(True)
    over.set()
    # The system forgets a thread after it has signalled the children that the thread started.
    wait_until(lambda: not Path(f"/proc/self/task/{starter.native_id}").exists())
    assert stopped
    odd.trainer.stop()
    assert failure(work).kind == "stopped"


def test_cancel_that_comes_while_the_pause_is_being_told() -> None:
    control, cancelled = WorkControl(), threading.Event()
    control.apply(Pause())

    def work() -> None:
        with pytest.raises(Cancelled):
            control.wait_while_paused(1, on_pause=lambda number: control.apply(Cancel(1)))
        cancelled.set()

    threading.Thread(target=work, daemon=True).start()
    assert cancelled.wait(PATIENCE_S)


def test_kill_in_mid_work_is_told_and_the_next_call_works(site: Site) -> None:
    work = site.start(**ENDLESS)
    site.frames.wait(lambda p: p.step > 1)
    pid = site.trainer.pid
    assert pid is not None
    assert site.trainer.rss_bytes > 10_000_000
    psutil.Process(pid).kill()
    err = failure(work)
    if os.name == "posix":
        assert err.kind == "killed"
        assert "SIGKILL" in err.message
    assert site.train(epochs=1).num_examples == 400
    assert site.trainer.pid != pid


def test_stop_in_mid_work_leaves_nothing(site: Site) -> None:
    work = site.start(**ENDLESS)
    site.frames.wait(lambda p: p.step > 1)
    pid = site.trainer.pid
    assert pid is not None
    site.trainer.stop()
    assert failure(work).kind == "stopped"
    assert not psutil.pid_exists(pid)
    assert not site.trainer.running
    assert site.trainer.rss_bytes == site.trainer.idle_s == 0
    assert not list(site.folder.glob(".*.tmp"))


@pytest.mark.parametrize(
    "first", ["", pytest.param("os.kill(trainer.pid, 19)", marks=only_linux)], ids=["", "frozen"]
)
def test_child_leaves_when_its_parent_dies(tmp_path: Path, first: str) -> None:
    code = (
        "import os, pathlib, sys\n"
        "from agent.data.settings import DataSettings\n"
        "from agent.tasks.work import Init, Train\n"
        "from agent.trainer.process import TrainerProcess, trainer_program\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "def told(p):\n"
        "    print(trainer.pid, flush=True)\n"
        f"    {first}\n"
        "    os._exit(9)\n"
        "trainer = TrainerProcess(\n"
        "    trainer_program(folder), DataSettings(parts=10), on_progress=told)\n"
        "base, out = str(folder / 'base'), str(folder / 'out')\n"
        "trainer.run(Init(task='mnist', settings={}, seed=1, out=base))\n"
        "settings = {'epochs': 1000000}\n"
        "trainer.run(Train(task='mnist', settings=settings, base=base, out=out))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    parent = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert parent.returncode == 9, parent.stderr
    assert gone(int(parent.stdout))


def test_two_callers_take_turns(odd: Site) -> None:
    outs = [odd.folder / f"{number}.safetensors" for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        works = [Train(task="odd", settings={}, base=str(odd.base), out=str(o)) for o in outs]
        done = list(pool.map(odd.trainer.run, works))
    assert {each.digest for each in done} == {weights.file_digest(out) for out in outs}


def test_foreign_task_may_print_and_read(odd: Site) -> None:
    done = odd.train("odd", do="read")
    assert done.metrics == {"loss": None, "threads": 1.0}
    assert odd.frames.seen[-1].loss is None
    assert weights.load(odd.out)["w"].tolist() == [8, 8, 8]
    assert odd.trainer.run(Evaluate(task="odd", settings={}, base=str(odd.out))).metrics == {
        "mean": 8.0
    }
    odd.wait_for_log("a line that is no frame")


def test_failures_are_told_by_kind(odd: Site) -> None:
    pid = odd.trainer.pid
    err = failure(odd.start("odd", do="raise"))
    assert (err.kind, err.message) == ("task", "ValueError: the third row is odd")
    assert "trainer.log" in err.hint
    assert failure(odd.start("odd", do="wrong shape")).kind == "bad_weights"
    err = failure(odd.start("od"))
    assert err.kind == "unknown_name"
    assert {"mnist", "odd"} <= set(err.hint.replace(",", "").replace(";", "").split())
    odd.base.rename(odd.folder / "elsewhere")
    assert failure(odd.start("odd")).kind == "file"
    weights.save(Weights({"w": np.zeros(4, np.float32)}), odd.base)
    err = failure(odd.start("odd"))
    assert err.kind == "schema"
    assert "'w'" in err.message
    assert odd.trainer.pid == pid, "none of these costs the child"
    assert not odd.out.exists()


def test_out_of_memory_and_exit_cost_the_child_only(odd: Site) -> None:
    pid = odd.trainer.pid
    assert failure(odd.start("odd", do="out of memory")).kind == "out of memory"
    assert not odd.trainer.running, "its memory is given back"
    err = failure(odd.start("odd", do="exit"))
    assert err.kind == "died"
    assert "3" in err.message
    assert odd.train("odd").num_examples == 5
    assert odd.trainer.pid != pid


def test_cancel_ends_a_child_that_does_not_obey(odd: Site) -> None:
    work = odd.start("odd", do="hang")
    grandchild = odd.frames.wait(lambda p: p.steps == 1 << 40).step
    odd.trainer.cancel()
    assert failure(work).kind == "cancelled"
    if os.name == "posix":
        assert gone(grandchild)
    assert odd.train("odd").num_examples == 5


def test_hang_is_noticed_and_stop_takes_grandchildren(odd: Site) -> None:
    work = odd.start("odd", do="hang")
    grandchild = odd.frames.wait(lambda p: p.steps == 1 << 40).step
    odd.trainer.stop()
    assert failure(work).kind == "stopped"
    if os.name == "posix":
        assert gone(grandchild)
    odd.trainer._hang_s = 1.5
    assert failure(odd.start("odd", do="hang")).kind == "hung"


def test_log_is_cut_and_secrets_stay_out(
    odd: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd.trainer.stop()
    log = odd.folder / "trainer.log"
    log.write_bytes(b"x" * (1 << 20) + b"y")
    monkeypatch.setenv("COMMONWEIGHT_AGENT_PASSWORD", "secret")
    odd.train("odd")
    assert log.stat().st_size < 1000
    assert odd.trainer.pid is not None
    assert "COMMONWEIGHT_AGENT_PASSWORD" not in psutil.Process(odd.trainer.pid).environ()


def test_parent_imports_no_torch() -> None:
    code = "import sys; import agent.trainer.process; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "answer",
    [
        Ready(),
        Done(id=1, metrics={"loss": 0.5}),
        Failed(id=1, kind="task", message="no"),
        Progress(id=1, phase="train", step=1, steps=2, loss=None, examples_per_s=1.0, paused=True),
    ],
)
def test_frames_are_one_line_each(answer: Answer) -> None:
    line = encode(answer)
    assert b"\n" not in line
    assert decode_answer(line) == answer


def test_frame_that_is_no_answer_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        decode_answer(encode(Init(id=1, task="mnist", settings={}, seed=1, out="x")))


def test_the_owners_budget_counts_as_it_is_now(tmp_path: Path) -> None:
    owner = AgentSettings(privacy_max_epsilon=5.0)
    trainer = TrainerProcess(
        trainer_program(tmp_path),
        DataSettings(),
        terms=lambda task: client_factory.terms_of(owner, task),
    )
    work = Describe(task="mnist", settings={})
    assert trainer._with_local_data(work).data.has_budget
    owner = AgentSettings()
    assert not trainer._with_local_data(work).data.has_budget
