"""Training that was cut off goes on from its journal, and nobody can tell from the result."""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from agent.tasks import Snapshot
from agent.tasks.training import rng_state
from agent.tasks.training.seeds import derive_seed
from agent.tasks.work import Done, Init, Train
from agent.trainer import checkpoint
from agent.trainer.checkpoint import CheckpointFile
from protocols.local import failpoints
from protocols.model import weights
from protocols.model.weights import Weights
from tests.agent.trainer.test_process import ENDLESS, PATIENCE_S, Site, failure, gone

#: Draws from the generators of Python and numpy, and may fail at a step: a task of somebody else's.
DRAWING_TASK = """
import random
import numpy as np

class Drawing:
    def schema(self, settings):
        return {"w": ("F64", (8,))}

    def init(self, seed, settings):
        return {"w": np.zeros(8)}

    def load(self, data):
        self.w = self.restored = None

    def train(self, weights, settings, on_step):
        self.w, self.step = weights["w"].copy(), 0
        if self.restored is not None:
            self.w[:], self.step = self.restored.arrays["w"], self.restored.values["step"]
            self.restored = None
            if settings.get("spoilt"):
                raise ValueError("not from here")
        while self.step < 20:
            self.w[random.randrange(8)] += np.random.normal() + random.gauss(0, 1)
            self.step += 1
            on_step(self.step, 20, 0.0, self.step)
        return {"w": self.w}, 1, {}

    def evaluate(self, weights, settings, on_step):
        return 1, {}

    def snapshot(self):
        from agent.tasks import Snapshot
        return Snapshot({"w": self.w}, {"step": self.step})

    def restore(self, snapshot):
        self.restored = snapshot
"""


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A trainer that nobody kills, and beside it the digits as they are once parsed."""
    folder = tmp_path_factory.mktemp("calm")
    site = Site(folder, checkpoint_every_s=0.0, cache=str(folder))
    site.trainer.run(Init(task="mnist", settings={}, seed=1, out=str(site.base)))
    yield site
    site.close()


@pytest.fixture
def site(calm: Site, tmp_path: Path) -> Iterator[Site]:
    """A trainer that begins with the weights of `calm`."""
    site = Site(tmp_path / "site", checkpoint_every_s=0.0, cache=calm.data.cache)
    shutil.copyfile(calm.base, site.base)
    yield site
    site.close()


@pytest.fixture
def drawing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    """A trainer beside which the drawing task is installed."""
    package = tmp_path / "packages"
    info = package / "drawing-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "drawing.py").write_text(DRAWING_TASK)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: drawing\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[commonweight.tasks]\ndrawing = drawing:Drawing\n")
    monkeypatch.setenv("PYTHONPATH", str(package), prepend=os.pathsep)
    site = Site(tmp_path / "site", checkpoint_every_s=0.0)
    site.trainer.run(Init(task="drawing", settings={}, seed=1, out=str(site.base)))
    yield site
    site.close()


def whole(site: Site, base: Path, task: str = "mnist", **settings: str | int | float) -> Done:
    """Train from the beginning to the end, and leave no journal."""
    site.trainer.delete_checkpoint()
    done = site.trainer.run(Train(task=task, settings=settings, base=str(base), out=str(site.out)))
    assert done.resumed_at == 0
    site.trainer.delete_checkpoint()
    return done


def killed_at(site: Site, step: int, task: str = "mnist", **settings: str | int | float) -> None:
    """Train, keeping the journal at each step, up to this one, and kill the trainer there."""
    killed_when(site, f"trainer.step:{step + 1}", task, **settings)


def killed_when(site: Site, failpoint: str, task: str, **settings: str | int | float) -> None:
    site.trainer.stop()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(failpoints.VARIABLE, failpoint)
        err = failure(site.start(task, **settings))
    assert err.kind == "killed"


@pytest.mark.parametrize(
    ("settings", "step"),
    [
        pytest.param({"epochs": 2}, 1, marks=pytest.mark.long),
        ({"epochs": 3, "batch_size": 30}, 14),  # the end of an epoch; its last batch is small
        pytest.param({"epochs": 3, "batch_size": 30}, 15, marks=pytest.mark.long),
        pytest.param({"epochs": 2, "momentum": 0.9}, 55, marks=pytest.mark.long),
        pytest.param({"model": "cnn", "max_steps": 12, "momentum": 0.9}, 7, marks=pytest.mark.long),
    ],
)
def test_a_killed_trainer_goes_on_bit_for_bit(
    calm: Site, site: Site, settings: dict[str, str | int | float], step: int
) -> None:
    if "model" in settings:
        calm.trainer.run(Init(task="mnist", settings=settings, seed=1, out=str(site.base)))
    undisturbed = whole(calm, site.base, **settings)
    killed_at(site, step, **settings)
    done = site.train(**settings)
    assert done.resumed_at == step
    assert done.digest == undisturbed.digest
    assert done.metrics == undisturbed.metrics


def test_a_trainer_killed_after_its_last_step_has_nothing_left_to_train(
    calm: Site, site: Site
) -> None:
    undisturbed = whole(calm, site.base, epochs=1)
    killed_when(site, "trainer.trained", "mnist", epochs=1)
    done = site.train(epochs=1)
    assert done.resumed_at == 40
    assert (done.digest, done.metrics) == (undisturbed.digest, undisturbed.metrics)


def test_a_pause_is_kept_at_once(
    calm: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may well end with the machine switched off."""
    monkeypatch.setattr("agent.trainer.supervisor.FREEZE_AFTER_S", 600.0)  # batches are quick
    site = Site(tmp_path / "site", checkpoint_every_s=PATIENCE_S, cache=calm.data.cache)
    try:
        site.trainer.run(Init(task="mnist", settings={}, seed=1, out=str(site.base)))
        site.trainer.pause()
        work = site.start(epochs=1)
        stood = site.frames.wait(lambda p: p.paused)
        assert site.trainer.pid is not None
        psutil.Process(site.trainer.pid).kill()
        failure(work)
        site.trainer.resume()
        assert site.train(epochs=1).resumed_at == stood.step
    finally:
        site.close()


def test_a_second_kill_goes_on_from_the_second_journal(calm: Site, site: Site) -> None:
    undisturbed = whole(calm, site.base, epochs=2)
    killed_at(site, 3, epochs=2)
    killed_at(site, 9, epochs=2)
    done = site.train(epochs=2)
    assert done.resumed_at == 3 + 9, "failpoints count the steps of one process"
    assert done.digest == undisturbed.digest


def test_the_journal_is_kept_by_the_clock(calm: Site, tmp_path: Path) -> None:
    site = Site(tmp_path / "site", checkpoint_every_s=0.05, cache=calm.data.cache)
    try:
        site.trainer.run(Init(task="mnist", settings={}, seed=1, out=str(site.base)))
        work = site.start(**ENDLESS)
        site.frames.wait(lambda p: (tmp_path / "site/journal").exists() and p.step > 100)
        assert site.trainer.pid is not None
        psutil.Process(site.trainer.pid).kill()
        failure(work)
        work = site.start(**ENDLESS)
        assert site.frames.wait(lambda p: True).step > 10, "most of the work was kept"
        site.trainer.cancel()
        assert failure(work).kind == "cancelled"
        assert not list((tmp_path / "site").glob(".*.tmp"))
    finally:
        site.close()


def test_other_work_begins_anew_and_drops_the_journal(calm: Site, site: Site) -> None:
    killed_at(site, 5, epochs=1, round=1)
    file, base = site.folder / "journal", site.base
    kept = file.read_bytes()
    other_base = site.folder / "other.safetensors"
    calm.trainer.run(Init(task="mnist", settings={}, seed=2, out=str(other_base)))
    for begins, other in ((base, {"round": 2}), (base, {"lr": 2}), (other_base, {})):
        file.write_bytes(kept)
        site.base = begins
        assert site.train(**{"epochs": 1, "round": 1} | other).resumed_at == 0
        site.trainer.delete_checkpoint()
    site.base = base
    file.write_bytes(kept)
    assert site.train(epochs=1, round=1).resumed_at == 5, "the same work goes on from it"
    file.write_bytes(kept)
    site.trainer.delete_checkpoint()
    site.trainer.delete_checkpoint()
    assert site.train(epochs=1, round=1).resumed_at == 0, "what is done is forgotten"


def test_a_damaged_journal_costs_the_steps_and_no_more(calm: Site, site: Site) -> None:
    undisturbed = whole(calm, site.base, epochs=1)
    killed_at(site, 5, epochs=1)
    file = site.folder / "journal"
    data = file.read_bytes()
    middle = len(data) // 2
    flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
    for times, damaged in enumerate((flipped, data[:-100], b""), 1):
        file.write_bytes(damaged)
        done = site.train(epochs=1)
        assert done.resumed_at == 0
        assert done.digest == undisturbed.digest
        site.wait_for_log("checkpoint is deleted", times)
        site.trainer.delete_checkpoint()


def test_chance_goes_on_where_it_was(drawing: Site) -> None:
    undisturbed = whole(drawing, drawing.base, "drawing")
    assert whole(drawing, drawing.base, "drawing").digest == undisturbed.digest, (
        "seeded alike for alike work"
    )
    assert whole(drawing, drawing.base, "drawing", round=2).digest != undisturbed.digest
    killed_at(drawing, 7, "drawing")
    done = drawing.train("drawing")
    assert done.resumed_at == 7
    assert done.digest == undisturbed.digest


def test_a_task_that_cannot_go_on_begins_anew_at_the_next_try(drawing: Site) -> None:
    killed_at(drawing, 3, "drawing", spoilt=1)
    err = failure(drawing.start("drawing", spoilt=1))
    assert (err.kind, err.message) == ("task", "ValueError: not from here")
    assert drawing.train("drawing", spoilt=1).resumed_at == 0


def test_an_agent_that_was_killed_leaves_the_journal_to_its_next_life(
    calm: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer leaves when its parent dies; another parent goes on."""
    monkeypatch.setattr("agent.trainer.supervisor.FREEZE_AFTER_S", 600.0)  # batches are quick
    first = Site(tmp_path / "site", cache=calm.data.cache)
    try:
        shutil.copyfile(calm.base, first.base)
        undisturbed = first.train(epochs=1)
        first.trainer.pause()
        work = first.start(epochs=1)
        first.frames.wait(lambda p: p.paused)
        pid = first.trainer.pid
        assert pid is not None
        child = first.trainer._child
        assert child is not None
        child.close()  # what the kernel does when the parent is gone
        assert gone(pid)
        failure(work)
    finally:
        first.close()
    second = Site(tmp_path / "site", cache=calm.data.cache)
    try:
        done = second.train(epochs=1)
        assert done.resumed_at >= 1
        assert done.digest == undisturbed.digest
    finally:
        second.close()


# --- the file --------------------------------------------------------------------------------

ARRAYS = {
    "float": np.array([[1.5, math.nan], [math.inf, -0.0]], np.float32),
    "words": np.arange(5, dtype=np.uint32),
    "none": np.zeros((0, 3)),
    "one": np.array(7, np.int64),
    "reversed": np.arange(6, dtype=np.int16)[::-2],
}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    values: dict[str, int | float | str] = {
        "int": 2**40,
        "nan": math.nan,
        "text": "ä",
        "tiny": 5e-324,
    }
    checkpoint.write(tmp_path / "j", "key", 12, Snapshot(ARRAYS, values), {"a": np.ones(2)})
    key, step, snapshot, chances = checkpoint.read(tmp_path / "j")
    assert (key, step) == ("key", 12)
    assert snapshot.values.keys() == values.keys()
    assert all(repr(snapshot.values[name]) == repr(value) for name, value in values.items())
    for name, array in ARRAYS.items():
        found = snapshot.arrays[name]
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes() == array.tobytes()
    assert chances["a"].tolist() == [1, 1]


@given(st.integers(min_value=0), st.integers(min_value=1, max_value=255))
def test_no_flipped_byte_goes_unseen(
    tmp_path_factory: pytest.TempPathFactory, at: int, by: int
) -> None:
    path = tmp_path_factory.mktemp("journal") / "j"
    checkpoint.write(path, "key", 1, Snapshot({"a": np.arange(9.0)}, {}), {})
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= by
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.read(path)


def test_objects_are_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'task/a'"):
        checkpoint.write(tmp_path / "j", "k", 1, Snapshot({"a": np.array([{}])}, {}), {})
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_nothing_costs_the_journal_only(tmp_path: Path) -> None:
    kept = CheckpointFile(tmp_path / "gone" / "j", "k", 0.0)
    kept.save(1, Snapshot({}, {}))
    assert kept.load() is None


def test_a_journal_is_due_by_its_interval(tmp_path: Path) -> None:
    assert CheckpointFile(tmp_path / "j", "k", 0.0).is_due
    assert not CheckpointFile(tmp_path / "j", "k", PATIENCE_S).is_due


def test_chance_of_python_and_numpy_is_restored() -> None:
    rng_state.seed("a", 1)
    random.gauss(0, 1)  # keeps a second draw for the next call
    np.random.standard_normal()
    kept = rng_state.state()
    drawn = [random.gauss(0, 1), random.random(), *np.random.standard_normal(3)]
    rng_state.seed("b", 1)
    assert random.random() != drawn[1]
    rng_state.restore(kept)
    assert [random.gauss(0, 1), random.random(), *np.random.standard_normal(3)] == drawn


def test_torch_draws_as_after_its_own_manual_seed() -> None:
    rng_state.seed("a", 1)
    drawn = torch.rand(3)
    torch.manual_seed(derive_seed("a", 1))
    assert torch.equal(torch.rand(3), drawn)


def test_weights_of_the_drawing_task_are_what_they_seem(drawing: Site) -> None:
    weights.save(Weights({"w": np.ones(8)}), drawing.base)
    drawing.train("drawing")
    assert not np.array_equal(weights.load(drawing.out)["w"], np.ones(8))
