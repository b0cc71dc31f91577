"""The task "images" on Keras and TensorFlow: the same as on torch, alone and in one run with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import keras
import numpy as np
import pytest
import torch
from msgspec import Meta
from PIL import Image
from sklearn.datasets import load_digits

import commonweight as cw
from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, Task, registry
from agent.tasks.images import keras_task, torch_task
from benchmarks.quality.fleet import fleet_of
from coordinator.storage.run_events import RunSpec
from protocols.errors import TaskUnusable, UsageError
from protocols.messages.states import RunState
from protocols.model import weights
from protocols.model.weights import Weights
from tests.commonweight import test_public_names
from tests.support.callbacks import ignore_step
from tests.support.environments import ROOT

torch.set_num_threads(1)
DIGITS = {
    "classes": "0,1,2,3,4,5,6,7,8,9",
    "size": 8,
    "channels": 1,
    "model": "conv 8 3, pool, conv 16 5, dense 32, dense 24",
    "flip": False,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """scikit-learn's 1,797 digits as pictures, dealt to four peers."""
    root = tmp_path_factory.mktemp("digits")
    pixels, labels = load_digits(return_X_y=True)
    for number, (row, label) in enumerate(zip(pixels, labels, strict=True)):
        folder = root / f"{number % 4}" / f"{label}"
        folder.mkdir(parents=True, exist_ok=True)
        square = (row.reshape(8, 8) * 15.9).astype(np.uint8)
        Image.fromarray(square).save(folder / f"{number}.png")
    return root


def data_of(folders: Path, part: int, framework: str = "auto") -> DataSettings:
    cache = folders / f"cache-{part}"
    cache.mkdir(exist_ok=True)
    return DataSettings(
        index=part,
        path=str(folders / f"{part}"),
        cache=str(cache),
        device="cpu",
        framework=framework,  # type: ignore[arg-type]
    )


@pytest.fixture
def both(folders: Path) -> tuple[torch_task.Images, keras_task.Images]:
    """The task on torch and on Keras, over the same folder."""
    here, there = registry.create("images"), registry.create("images", framework="keras")
    assert isinstance(here, torch_task.Images)
    assert isinstance(there, keras_task.Images)
    for task in (here, there):
        task.load(data_of(folders, 0))
    return here, there


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.05},
        {"clip_norm": 0.1, "proximal_mu": 0.5},
        {"model": "conv 8 3 norm, pool, dense 24 norm"},
    ],
)
def test_both_make_the_same_steps_of_the_same_weights(
    both: tuple[torch_task.Images, keras_task.Images], settings: dict[str, Any]
) -> None:
    """Full batches, so that no order matters: the same sums but for rounding."""
    asked: dict[str, Any] = DIGITS | {"batch_size": "all", "epochs": 4, "lr": 0.05, "momentum": 0.0}
    asked |= settings
    here, there = both
    base = here.init(1, asked)
    assert weights.digest(base) == weights.digest(there.init(1, asked))
    assert here.schema(asked) == there.schema(asked) == base.schema
    assert here.traits(asked) == there.traits(asked)
    one, other = (task.train(base, asked, ignore_step) for task in both)
    assert one.num_examples == other.num_examples
    assert one.metrics["loss"] == pytest.approx(other.metrics["loss"], rel=1e-4)
    for name in base:
        moved = np.abs(np.asarray(one.weights[name]) - base[name]).max()
        # Of some 360 pictures torch's running variance divides by one less, Keras' does not.
        rtol = 3e-3 if name.endswith("running_var") else 0.0
        np.testing.assert_allclose(
            other.weights[name], one.weights[name], rtol=rtol, atol=1e-3 * moved + 1e-6
        )
        assert moved > 1e-5
    measured = [task.evaluate(one.weights, asked, ignore_step) for task in both]
    assert measured[0].num_examples == measured[1].num_examples
    assert measured[0].metrics["loss"] == pytest.approx(measured[1].metrics["loss"], rel=1e-4)
    assert measured[0].metrics["accuracy"] == pytest.approx(measured[1].metrics["accuracy"])


def test_the_same_bytes_again_and_after_a_cut(
    both: tuple[torch_task.Images, keras_task.Images],
) -> None:
    asked: dict[str, Any] = DIGITS | {"batch_size": 64, "epochs": 2, "optimiser": "adamw"}
    _, task = both
    base, kept = task.init(2, asked), []

    def keep(step: int, *_: float) -> None:
        if step == 8:
            found = task.snapshot()
            arrays = {name: np.array(array) for name, array in found.arrays.items()}
            kept.append(found._replace(arrays=arrays))

    whole, again = task.train(base, asked, keep), task.train(base, asked, ignore_step)
    task.restore(kept[0])
    seen: list[int] = []
    rest = task.train(base, asked, lambda step, *_: seen.append(step))
    assert seen == list(range(9, 13))
    made = {weights.digest(Weights(t.weights)) for t in (whole, again, rest)}
    assert len(made) == 1


def test_muon_is_refused(both: tuple[torch_task.Images, keras_task.Images]) -> None:
    asked: dict[str, Any] = DIGITS | {"optimiser": "muon"}
    _, task = both
    with pytest.raises(UsageError, match="no optimiser=muon"):
        task.train(task.init(2, asked), asked, ignore_step)


def accuracy(folders: Path, frameworks: tuple[str, ...]) -> float:
    """Of the last round of a run with a peer for each framework. They agree on the classes."""
    data = [data_of(folders, part, framework) for part, framework in enumerate(frameworks)]
    settings = DIGITS | {"lr": 0.02, "batch_size": 16, "flip": False, "classes": ""}
    with fleet_of(data) as fleet:
        run = fleet.run(
            RunSpec(task="images", rounds=5, quorum=len(data), settings=settings, handshake=True)
        )
    assert run.state is RunState.FINISHED
    assert all(len(closed.contributors) == len(data) for closed in run.history)
    assert not any(closed.refused for closed in run.history)
    assert run.card is not None
    assert run.card.traits["classes"] == tuple("0123456789")
    found = run.history[-1].metrics["accuracy"]
    assert found is not None
    return found


def test_a_mixed_run_converges_like_the_pure_ones(folders: Path) -> None:
    torch_only = accuracy(folders, ("torch", "torch"))
    keras_only = accuracy(folders, ("keras", "keras"))
    mixed = accuracy(folders, ("torch", "keras"))
    print(f"torch {torch_only:.3f}, Keras {keras_only:.3f}, mixed {mixed:.3f}")
    assert min(torch_only, keras_only, mixed) > 0.85
    assert mixed > min(torch_only, keras_only) - 0.04


def test_what_only_torch_can_do_is_told() -> None:
    task = registry.create("images", framework="keras")
    with pytest.raises(UsageError, match="resnet18 is there in torch only"):
        task.schema(DIGITS | {"model": "resnet18"})


class Line(cw.KerasTask):
    """A Keras model of one's own: y = 2 x + 1."""

    def model(self, settings: Any) -> Any:
        return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])

    def data(self, source: DataSettings, settings: Any) -> Any:
        x = np.linspace(-1, 1, 50)
        held_out = np.arange(50) % 5 == 0
        return tuple((x[part][:, None], 2 * x[part] + 1) for part in (~held_out, held_out))


def test_a_keras_model_of_ones_own_travels_under_its_own_names(tmp_path: Path) -> None:
    task = Line()
    assert isinstance(task, Task)
    task.load(DataSettings(device="cpu"))
    assert task.count_examples({}) == (40, 10)
    base = task.init(1, {})
    assert list(base) == ["dense/bias", "dense/kernel"]
    assert weights.digest(base) == weights.digest(Line().init(1, {}))
    made = task.train(base, {"epochs": 30, "lr": 0.1}, ignore_step)
    assert made.weights["dense/kernel"].item() == pytest.approx(2, abs=0.05)
    assert made.weights["dense/bias"].item() == pytest.approx(1, abs=0.05)
    assert task.evaluate(made.weights, {}, ignore_step).metrics["loss"] < 0.01
    np.save(tmp_path / "x.npy", np.linspace(-1, 1, 300)[:, None])
    first, second = task.predict(made.weights, {}, str(tmp_path / "x.npy"))
    assert [*first["row"], *second["row"]] == list(range(300))
    assert [first["value"][0], second["value"][-1]] == pytest.approx([-1, 3], abs=0.1)


class Digits(cw.KerasTask):
    """Classes, dropout, running statistics, and an optimizer and settings of one's own."""

    @dataclass
    class Settings:
        width: Annotated[int, Meta(ge=1, le=64)] = 24
        batch_size: int = 32

    def model(self, settings: Any) -> Any:
        layers = keras.layers
        hidden = layers.Dense(settings.width), layers.BatchNormalization(), layers.Dropout(0.2)
        return keras.Sequential([keras.Input((64,)), *hidden, layers.ReLU(), layers.Dense(10)])

    def data(self, source: DataSettings, settings: Any) -> Any:
        x, y = load_digits(return_X_y=True)
        x, y = (x / 16).astype(np.float32), y.astype(np.uint8)
        return (x[400:], y[400:]), (x[:400], y[:400])

    def optimizer(self, model: Any, settings: Any) -> Any:
        return keras.optimizers.RMSprop(settings.lr)


def test_a_classifier_in_three_methods_learns_and_continues_after_a_cut(tmp_path: Path) -> None:
    task, asked = Digits(), {"epochs": 2, "lr": 0.01}
    task.load(DataSettings(device="cpu"))
    base, kept = task.init(1, asked), []

    def keep(step: int, *_: float) -> None:
        if step == 50:
            found = task.snapshot()
            arrays = {name: np.array(array) for name, array in found.arrays.items()}
            kept.append(found._replace(arrays=arrays))

    whole = task.train(base, asked, keep)
    task = Digits()
    task.load(DataSettings(device="cpu"))
    task.restore(kept[0])
    rest = task.train(base, asked, ignore_step)
    assert weights.digest(Weights(whole.weights)) == weights.digest(Weights(rest.weights))
    found = task.evaluate(rest.weights, asked, ignore_step)
    assert found.metrics["accuracy"] > 0.85
    np.save(tmp_path / "x.npy", task.data(DataSettings(), None)[1][0])
    answers = [
        one
        for batch in task.predict(rest.weights, asked, str(tmp_path / "x.npy"))
        for one in batch["class"]
    ]
    right = np.mean(np.array(answers) == load_digits(return_X_y=True)[1][:400])
    assert right == pytest.approx(found.metrics["accuracy"])


def test_the_example_of_the_docs_learns(tmp_path: Path) -> None:
    x, y = load_digits(return_X_y=True)
    np.savez(tmp_path / "digits.npz", x=x.reshape(-1, 8, 8, 1) / 16, y=y)
    source = f"{ROOT}/docs/examples/keras_digits.py:Digits"
    task = registry.create("keras_digits.py:Digits", source)
    task.load(DataSettings(path=str(tmp_path / "digits.npz"), device="cpu"))
    made = task.train(task.init(1, {}), {}, ignore_step)
    count, metrics, _ = EvalOutcome(*task.evaluate(Weights(made.weights), {}, ignore_step))
    assert count == 100
    assert metrics["accuracy"] > 0.85


def test_the_public_names_of_a_keras_task_stay() -> None:
    test_public_names.test_the_public_names_and_signatures_stay()


def test_what_a_keras_task_cannot_do_is_told() -> None:
    class Unbuilt(Line):
        def model(self, settings: Any) -> Any:
            return keras.Sequential([keras.layers.Dense(1)])

    with pytest.raises(TaskUnusable, match="has no tensors yet"):
        Unbuilt().init(1, {})
    with pytest.raises(UsageError, match="width cannot be 0"):
        Digits().schema({"width": 0})
