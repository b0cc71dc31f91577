"""A coordinator asks twice about a folder of pictures and subtracts: no picture follows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agent.data.settings import DataSettings
from agent.setup import own_data
from agent.tasks.work import Describe, Done, Evaluate, Init, Train
from agent.trainer.executor import WorkExecutor
from agent.trainer.ipc import Failed
from agent.trainer.progress import WorkControl
from protocols.errors import NotAllowed
from protocols.model import weights
from protocols.privacy.private_training import PrivateTraining

pytestmark = pytest.mark.attack("20.3")

SETTINGS: dict[str, Any] = {
    "classes": "cat,dog", "size": 8, "channels": 1, "model": "dense 4", "flip": False,
    "batch_size": 0, "epochs": 1,
}  # fmt: skip


def picture(path: Path, level: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(level).integers(0, 40, (8, 8))
    Image.fromarray((noise + level % 200).astype(np.uint8)).save(path)


class Trainer:
    """The trainer of one agent with sixty pictures."""

    has_budget = False

    def __init__(self, home: Path) -> None:
        self.home, self.data = home, home / "pictures"
        for number in range(30):
            picture(self.data / "cat" / f"{number}.png", number)
            picture(self.data / "dog" / f"{number}.png", 100 + number)
        self.base = str(home / "base.safetensors")
        self.do(Init, seed=0, out=self.base)

    def do(self, kind: Any, settings: dict[str, Any] = SETTINGS, **more: Any) -> Done:
        """As a new process each time."""
        memory = str(self.home / "told" / "told.db")
        data = DataSettings(
            path=str(self.data),
            memory=memory,
            cache=str(self.home),
            device="cpu",
            has_budget=self.has_budget,
        )
        executor = WorkExecutor(WorkControl(), lambda answer: None, 1)
        done = executor.do(kind(task="images", settings=settings, data=data, **more))
        assert not isinstance(done, Failed), done
        return done

    def train(self) -> tuple[int, str]:
        out = self.home / "out.safetensors"
        settings = {"seed": 1, "round": 1, **SETTINGS}
        done = self.do(Train, settings, base=self.base, out=str(out))
        return done.num_examples, weights.file_digest(out)

    def evaluate(self) -> tuple[int, float | None]:
        done = self.do(Evaluate, {"seed": 1, "round": 1, **SETTINGS}, base=self.base)
        return done.num_examples, done.metrics["loss"]

    def survey(self) -> bytes:
        return self.do(Describe, {k: v for k, v in SETTINGS.items() if k != "classes"}).description


def add_one(data: Path) -> None:
    picture(data / "dog" / "victim.png", 333)


def delete_one(data: Path) -> None:
    (data / "cat" / "7.png").unlink()


def edit_one(data: Path) -> None:
    picture(data / "cat" / "7.png", 444)


def relabel_one(data: Path) -> None:
    (data / "cat" / "7.png").rename(data / "dog" / "moved.png")


def asked_again(ask: Callable[[], Any]) -> Any:
    """The second answer; None if it was refused with the owner's limit."""
    try:
        return ask()
    except NotAllowed as err:
        words = err.message
    assert "data_min_count is 5" in words
    return None


@pytest.mark.attack("20.3")
@pytest.mark.parametrize("change", [add_one, delete_one, edit_one, relabel_one])
def test_one_picture_more_or_less(tmp_path: Path, change: Callable[[Path], None]) -> None:
    """Attack: subtract counts, updates and losses of before and after a picture came, went, was
    edited or got another class."""
    trainer = Trainer(tmp_path)
    asks = [trainer.survey, trainer.train, trainer.evaluate]
    before = [ask() for ask in asks]
    change(trainer.data)
    for ask, told in zip(asks, before, strict=True):
        assert asked_again(ask) in (None, told)


@pytest.mark.attack("20.3")
def test_pictures_one_after_the_other(tmp_path: Path) -> None:
    """Attack: train after each of many new pictures. They are used together, and only then."""
    trainer = Trainer(tmp_path)
    count, first = trainer.train()
    for new in range(1, 7):
        picture(trainer.data / "dog" / f"new {new}.png", 500 + new)
        now, update = trainer.train()
        assert now == count + new // 5 * 5
        assert (update == first) == (now == count)
    assert own_data.waiting_rows(tmp_path) == (
        "65 rows may be used; 1 new rows wait until 5 have come"
    )


def test_another_name_is_no_change(tmp_path: Path) -> None:
    """Control: a picture with another name is no new picture."""
    trainer = Trainer(tmp_path)
    count, _ = trainer.train()
    (trainer.data / "cat" / "7.png").rename(trainer.data / "cat" / "renamed.png")
    assert trainer.train()[0] == count
    trainer.evaluate()


def test_a_class_of_one_picture_is_not_trained_on(tmp_path: Path) -> None:
    """Attack: a linear model, in which the weights of a class change by its pictures; a machine
    has one picture of the class."""
    trainer = Trainer(tmp_path)
    settings = {**SETTINGS, "classes": "cat,dog,owl", "model": "dense 3", "optimiser": "sgd"}
    changes = []
    for level in (0, 150):
        picture(trainer.data / "owl" / "only.png", level)
        (tmp_path / "told" / "told.db").unlink(missing_ok=True)
        trainer.do(Init, settings, seed=0, out=trainer.base)
        out = tmp_path / "out.safetensors"
        trainer.do(Train, {"seed": 1, "round": 1, **settings}, base=trainer.base, out=str(out))
        old, new = weights.load(Path(trainer.base)), weights.load(out)
        changes.append([new[name] - old[name] for name in sorted(new)])
    for one, two in zip(*changes, strict=True):
        np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("has_budget", [False, True])
def test_a_class_of_few_pictures_within_a_budget(tmp_path: Path, has_budget: bool) -> None:
    """Attack: tell one picture, in a run with noise, by the few others of its class: without it,
    all of them would be left out.

    With a budget, the noise hides them, so the class counts. Without one, it is left out.
    """
    trainer = Trainer(tmp_path)
    for number in range(4):
        picture(trainer.data / "emu" / f"{number}.png", 200 + number)
    settings = {**SETTINGS, "classes": "cat,dog,emu"}
    trainer.base = str(tmp_path / "three.safetensors")
    trainer.do(Init, settings, seed=0, out=trainer.base)
    chosen = {"seed": 1, "round": 1, **settings, **PrivateTraining(3.0, 1e-5, 1.0, 1).settings()}
    counts = []
    for budget in (False, has_budget):
        trainer.has_budget = budget
        out = str(tmp_path / "out.safetensors")
        counts.append(trainer.do(Train, chosen, base=trainer.base, out=out).num_examples)
    assert (counts[1] > counts[0]) is has_budget
