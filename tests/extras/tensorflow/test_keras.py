"""The task "images" on Keras and TensorFlow: the same as on torch, alone and in one run with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from agent.data.settings import DataSettings
from agent.tasks import registry
from agent.tasks.images import keras_task, torch_task
from agent.tasks.training.keras_task import Examples, KerasTask
from benchmarks.quality.fleet import fleet_of
from coordinator.storage.run_events import RunSpec
from protocols.errors import UsageError
from protocols.messages.states import RunState
from protocols.model import weights
from protocols.model.weights import Weights
from tests.support.callbacks import ignore_step

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
    assert measured[0].metrics["accuracy"] == measured[1].metrics["accuracy"]


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


class Line(KerasTask):
    """A Keras model of one's own: y = 2 x + 1."""

    kind = "regression"

    def model(self, settings: Any) -> Any:
        return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])

    def read(self, data: DataSettings, settings: Any) -> Examples:
        x = np.linspace(-1, 1, 50, dtype=np.float32)
        rows = np.arange(50)
        return Examples(x[:, None], 2 * x + 1, rows[rows % 5 > 0], rows[rows % 5 == 0])


def test_a_keras_model_of_ones_own_travels_under_its_own_names() -> None:
    task = Line()
    task.load(DataSettings(device="cpu"))
    base = task.init(1, {})
    assert list(base) == ["dense/bias", "dense/kernel"]
    assert weights.digest(base) == weights.digest(Line().init(1, {}))
    made = task.train(base, {"epochs": 30, "lr": 0.1}, ignore_step)
    assert made.weights["dense/kernel"].item() == pytest.approx(2, abs=0.05)
    assert made.weights["dense/bias"].item() == pytest.approx(1, abs=0.05)
    assert task.evaluate(made.weights, {}, ignore_step).metrics["loss"] < 0.01
