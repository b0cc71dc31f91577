"""`cw.pictures`: a CNN on a folder of pictures is a task of eight lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import commonweight as cw
from agent.data.settings import DataSettings
from agent.tasks import EvalOutcome, registry
from protocols.errors import DataError, UsageError
from protocols.model.weights import Weights
from tests.support.callbacks import ignore_step
from tests.support.environments import ROOT

Image = pytest.importorskip("PIL.Image", reason="pictures need the extra images")
PETS = ROOT / "docs/examples/pets.py"
COUNT = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cats are brighter on the left, dogs on the right."""
    root, chance = tmp_path_factory.mktemp("pets"), np.random.RandomState(0)
    for name, side in (("cat", slice(0, 40)), ("dog", slice(40, 80))):
        (root / name).mkdir()
        for number in range(COUNT):
            pixels = chance.randint(0, 120, (60, 80, 3), np.uint8)
            pixels[:, side] += 100
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


def test_the_example_of_the_docs_is_short_and_learns(folder: Path, tmp_path: Path) -> None:
    text = PETS.read_text()
    assert len([line for line in text.splitlines() if line]) <= 12
    assert f"```python\n{text}```" in (ROOT / "docs/howto.md").read_text()
    task = registry.create("pets.py:Pets", f"{PETS}:Pets")
    task.load(DataSettings(path=str(folder), cache=str(tmp_path), device="cpu"))
    asked = {"epochs": 3, "lr": 0.02}
    made = task.train(task.init(1, asked), asked, ignore_step)
    found = EvalOutcome(*task.evaluate(Weights(made.weights), asked, ignore_step))
    assert (made.num_examples, found.num_examples) == (48, 12)
    assert found.metrics["accuracy"] > 0.9
    assert list(tmp_path.glob("pictures-*.safetensors"))


def test_pictures_are_squares_with_their_classes(folder: Path) -> None:
    trained_on, held_out = cw.pictures(
        DataSettings(path=str(folder)), classes=("dog", "cat"), size=16, channels=1
    )
    assert (len(trained_on), len(held_out), trained_on.classes) == (48, 12, ("dog", "cat"))
    x, y = trained_on[0]
    assert (x.shape, x.dtype, y in (0, 1)) == ((1, 16, 16), torch.float32, True)
    left, right = float(x[..., :8].mean()), float(x[..., 8:].mean())
    assert (left > right) == (y == 1)


def test_a_task_of_pictures_predicts_for_a_folder_or_one_without_data(
    folder: Path, tmp_path: Path
) -> None:
    task = registry.create("pets.py:Pets", f"{PETS}:Pets")
    task.load(DataSettings(path=str(folder), cache=str(tmp_path), device="cpu"))
    asked = {"epochs": 3, "lr": 0.02}
    made = Weights(task.train(task.init(1, asked), asked, ignore_step).weights)
    blind: Any = registry.create("pets.py:Pets", f"{PETS}:Pets")
    (answer,) = blind.predict(made, asked, str(folder))
    assert answer.keys() == {"file", "class", "probability"}
    assert len(answer["file"]) == 2 * COUNT
    right = [
        name.startswith(word) for name, word in zip(answer["file"], answer["class"], strict=True)
    ]
    assert sum(right) > 0.9 * len(right)
    (one,) = blind.predict(made, asked, str(folder / "cat" / "3.png"))
    place = answer["file"].index("cat/3.png")
    assert (one["file"], one["class"]) == (["3.png"], [answer["class"][place]])
    with pytest.raises(DataError, match="there are no pictures to predict for"):
        list(blind.predict(made, asked, str(tmp_path)))


def test_what_cannot_be_read_as_pictures_is_told(folder: Path) -> None:
    with pytest.raises(UsageError, match="cannot have the size 4"):
        cw.pictures(DataSettings(path=str(folder)), classes=("cat", "dog"), size=4)
    with pytest.raises(DataError, match="is no class of this run"):
        cw.pictures(DataSettings(path=str(folder)), classes=("cat", "emu"))
