"""The task "images": what it reads of a folder, and that it learns from it."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from agent.data.settings import DataSettings
from agent.tasks.images import dataset
from agent.tasks.images import settings as image_settings
from agent.tasks.images.torch_task import Images
from protocols.errors import CommonweightError, DataError, UnknownName, UsageError
from protocols.model import weights
from protocols.model.weights import Weights
from protocols.privacy.private_training import PrivateTraining
from protocols.tables import class_names
from protocols.tables.class_names import ClassCounts
from tests.support.callbacks import ignore_step

SMALL = {"classes": "light,dark", "size": 12, "channels": 1, "model": "conv 4 3, pool, dense 8"}


torch.set_num_threads(1)


def picture(path: Path, level: int, size: tuple[int, int] = (16, 12)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(level).integers(0, 40, (*size[::-1], 3))
    Image.fromarray((noise + level).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty light pictures and twenty dark ones, in three formats."""
    for number in range(20):
        for name, level in (("light", 150), ("dark", 20)):
            suffix = ("png", "jpg", "bmp")[number % 3]
            picture(tmp_path / "data" / name / "some" / f"{number}.{suffix}", level + number)
    (tmp_path / "cache").mkdir()
    return tmp_path


def data_of(folder: Path, **more: object) -> DataSettings:
    told: dict[str, object] = {"path": str(folder / "data"), "cache": str(folder / "cache")}
    return DataSettings(**(told | {"device": "cpu"} | more))  # type: ignore[arg-type]


def loaded(folder: Path, **more: object) -> Images:
    task = Images()
    task.load(data_of(folder, **more))
    return task


def test_learns_and_gives_the_same_bytes_again(folder: Path) -> None:
    settings = SMALL | {"epochs": 4, "batch_size": 8, "lr": 0.02}
    task = loaded(folder)
    base = task.init(3, settings)
    assert base.schema == task.schema(settings)
    torch.manual_seed(0)
    trained = task.train(base, settings, ignore_step)
    torch.manual_seed(0)
    again = loaded(folder).train(base, settings, ignore_step)
    assert weights.digest(trained.weights) == weights.digest(again.weights)  # type: ignore[arg-type]
    assert trained.num_examples == 32
    measured = task.evaluate(trained.weights, settings, ignore_step)
    assert measured.num_examples == 8
    assert measured.metrics["accuracy"] == 1.0
    assert measured.metrics["loss"] < task.evaluate(base, settings, ignore_step).metrics["loss"]


def test_goes_on_where_it_was_cut_off(folder: Path) -> None:
    settings = SMALL | {"epochs": 2, "batch_size": 8, "flip": False, "momentum": 0.9}
    task, kept = loaded(folder), []

    def keep(step: int, *_: float) -> None:
        if step == 5:
            found = task.snapshot()
            arrays = {name: array.copy() for name, array in found.arrays.items()}
            kept.append(found._replace(arrays=arrays))

    base = task.init(3, settings)
    whole = task.train(base, settings, keep)
    other, seen = loaded(folder), []
    other.restore(kept[0])
    rest = other.train(base, settings, lambda step, *_: seen.append(step))
    assert seen == [6, 7, 8]
    assert weights.digest(rest.weights) == weights.digest(whole.weights)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_resnet_trains_and_keeps_its_statistics_out_of_the_gradients(
    folder: Path, norm: str
) -> None:
    settings = {"classes": "light,dark", "size": 16, "model": "resnet18", "norm": norm}
    task = loaded(folder)
    base = task.init(1, settings)
    assert base.schema == task.schema(settings)
    count = sum(array.size for array in base.values()) - base["fc.weight"].size - 2
    moments = sum(array.size for name, array in base.items() if "running" in name)
    assert count - moments == 11_176_512  # torchvision's resnet18, without its head
    assert moments == (9_600 if norm == "batch" else 0)
    made = task.train(base, settings | {"max_steps": 1, "weight_decay": 0.1}, ignore_step).weights
    assert all(not np.array_equal(made[name], base[name]) for name in base)
    found = torch.from_numpy(np.array(made["bn1.weight"]))
    assert torch.isfinite(found).all()


def test_a_normalised_network_learns_and_moves_its_statistics(folder: Path) -> None:
    """The 33rd picture is a batch of its own, of which there is no variance."""
    picture(folder / "data" / "dark" / "one.png", 30)
    model = "conv 4 3 norm, pool, dense 8 norm"
    settings = SMALL | {"model": model, "epochs": 4, "batch_size": 8, "lr": 0.02, "flip": False}
    task = loaded(folder)
    base = task.init(3, settings)
    made = task.train(base, settings, ignore_step)
    assert made.num_examples % 8 == 1
    assert all(not np.array_equal(made.weights[name], base[name]) for name in base)
    assert task.evaluate(made.weights, settings, ignore_step).metrics["accuracy"] == 1.0
    # What no gradient moves has none, whatever the decay of weights.
    assert set(base) - set(task.gradient(base, settings)) == {
        f"{layer}.norm.running_{part}" for layer in ("conv1", "dense3") for part in ("mean", "var")
    }
    bent = {**made.weights, "conv1.norm.running_var": np.full(4, -1, np.float32)}
    assert np.isfinite(task.evaluate(Weights(bent), settings, ignore_step).metrics["loss"])


@pytest.mark.parametrize(
    ("model", "is_possible"),
    [
        ({"model": "resnet18", "norm": "batch"}, False),
        ({"model": "conv 4 3 norm, pool, dense 8"}, False),
        pytest.param({"model": "resnet18", "norm": "group"}, True, marks=pytest.mark.long),
        ({"model": "conv 4 3, pool, dense 8"}, True),
    ],
)
def test_batch_normalization_is_refused_with_noise_and_group_normalization_named(
    folder: Path, model: dict[str, str], is_possible: bool
) -> None:
    settings = SMALL | model | {"size": 16, "batch_size": 3, "max_steps": 1, "lr": 0.1}
    task = loaded(folder)
    task.protect(PrivateTraining(3.0, 1e-5, clip=1.0, rounds=1))
    base = task.init(1, settings)
    if not is_possible:
        with pytest.raises(UsageError, match="because of batch normalization") as caught:
            task.train(base, settings, ignore_step)
        assert "--set norm=group" in caught.value.hint
        assert "without norm" in caught.value.hint
        return
    made = task.train(base, settings, ignore_step)
    assert made.metrics == {}
    assert all(np.isfinite(made.weights[name]).all() for name in base)
    assert task.spent()


def test_a_full_batch_is_a_step_along_the_gradient(folder: Path) -> None:
    """What SCAFFOLD's first option and its path rely on."""
    settings = SMALL | {"batch_size": "all", "lr": 0.5, "momentum": 0.0, "flip": False}
    task = loaded(folder)
    base = task.init(5, settings)
    gradient = task.gradient(base, settings)
    made = task.train(base, settings, ignore_step).weights
    assert task.lr_times_steps(settings) == 0.5
    for name in base:
        np.testing.assert_allclose(made[name], base[name] - 0.5 * gradient[name], atol=1e-6)
    correction = {name: np.ones_like(array) for name, array in base.items()}
    task.steer(correction)
    steered = task.train(base, settings, ignore_step).weights
    for name in base:
        np.testing.assert_allclose(steered[name], made[name] - 0.5, atol=1e-6)


def test_pictures_are_read_once_and_small(folder: Path) -> None:
    plan = image_settings.read_settings(SMALL)
    first = dataset.load_pictures(data_of(folder), plan)
    assert first.pixels.shape == (40, 1, 12, 12)
    kept = list((folder / "cache").iterdir())
    assert len(kept) == 1
    # What lies in the file is what counts now, until a picture changes.
    before = kept[0].stat().st_mtime_ns
    again = dataset.load_pictures(data_of(folder), plan)
    assert (again.pixels == first.pixels).all()
    assert kept[0].stat().st_mtime_ns == before
    in_memory = dataset.load_pictures(data_of(folder, cache=""), plan)
    assert (in_memory.pixels == first.pixels).all()
    picture(folder / "data" / "dark" / "new.png", 30)
    more = dataset.load_pictures(data_of(folder), plan)
    assert len(more.pixels) == 41
    assert len(list((folder / "cache").iterdir())) == 1
    pixels = more.pixels.copy()  # a mapped file must not be cut under its reader
    del more
    kept = list((folder / "cache").iterdir())
    kept[0].write_bytes(b"not what it was")
    assert (dataset.load_pictures(data_of(folder), plan).pixels == pixels).all()


def test_a_new_picture_moves_no_other_between_training_and_held_out(folder: Path) -> None:
    plan = image_settings.read_settings(SMALL)

    def held_out() -> set[bytes]:
        found = dataset.load_pictures(data_of(folder, cache=""), plan)
        return {found.pixels[row].tobytes() for row in found.held_out}

    before = held_out()
    picture(folder / "data" / "light" / "new.png", 99)
    assert len(before & held_out()) >= len(before) - 1


def test_a_peer_with_one_class_numbers_it_as_the_others(folder: Path) -> None:
    for path in (folder / "data" / "light" / "some").iterdir():
        path.unlink()
    found = dataset.load_pictures(data_of(folder), image_settings.read_settings(SMALL))
    assert set(found.labels) == {1}


def test_answers_for_pictures_that_it_has_never_seen(folder: Path, tmp_path: Path) -> None:
    settings = SMALL | {"epochs": 4, "batch_size": 8, "lr": 0.02}
    task = loaded(folder)
    made = Weights(task.train(task.init(3, settings), settings, ignore_step).weights)
    picture(tmp_path / "new" / "bright.png", 190)
    picture(tmp_path / "new" / "deep" / "night.jpg", 5)
    (tmp_path / "new" / "odd.png").write_text("no picture")
    (answers,) = Images().predict(made, settings, str(tmp_path / "new"))
    assert answers["file"] == ["bright.png", "deep/night.jpg"]
    assert answers["class"] == ["light", "dark"]
    assert all(0.5 < chance <= 1 for chance in answers["probability"])
    (one,) = Images().predict(made, settings, str(tmp_path / "new" / "bright.png"))
    assert one["class"] == ["light"]
    with pytest.raises(DataError, match="there are no pictures to predict for"):
        list(Images().predict(made, settings, str(tmp_path / "none")))


def bomb() -> bytes:
    """A PNG of few bytes that says it is 60,000 pixels wide and high."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))


def test_what_is_no_picture_is_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(whole, "PNG")
    light = folder / "data" / "light"
    (light / "cut.png").write_bytes(whole.getvalue()[:60])
    (light / "text.jpg").write_text("no picture")
    (light / "empty.gif").write_bytes(b"")
    (light / "bomb.png").write_bytes(bomb())
    (light / "notes.txt").write_text("not even called one")
    found = dataset.load_pictures(data_of(folder), image_settings.read_settings(SMALL))
    assert len(found.train) + len(found.held_out) == 40
    assert "4 of 44 pictures cannot be read" in capsys.readouterr().err


def test_folders_that_cannot_serve_are_told_without_names_of_files(tmp_path: Path) -> None:
    task = Images()

    def fault(path: Path) -> DataError:
        task.load(DataSettings(path=str(path), device="cpu"))
        with pytest.raises(DataError) as caught:
            task.traits(SMALL)
        assert str(tmp_path) not in caught.value.message
        return caught.value

    assert "no folder of data" in fault(tmp_path / "none").message
    (tmp_path / "a").mkdir()
    assert "no folder for a class" in fault(tmp_path / "a").message
    (tmp_path / "b" / "secret").mkdir(parents=True)
    told = fault(tmp_path / "b")
    assert "light, dark" in told.message
    assert "secret" not in told.message
    assert "secret" in told.hint
    (tmp_path / "c" / "light").mkdir(parents=True)
    assert "nothing in the folders" in fault(tmp_path / "c").message
    (tmp_path / "d" / "light").mkdir(parents=True)
    (tmp_path / "d" / "light" / "1.png").write_bytes(b"broken")
    assert "fewer than two examples can be read" in fault(tmp_path / "d").message


def test_only_classes_with_enough_pictures_are_told(folder: Path) -> None:
    for number in range(3):
        picture(folder / "data" / "mrs smith" / f"{number}.png", 90)
    task, settings = loaded(folder, min_count=5), {**SMALL, "classes": ""}
    told = task.survey(settings)
    assert told == ClassCounts(counts={"dark": 20, "light": 23})
    assert task.survey(SMALL) is None, "a run may name them"
    with pytest.raises(UnknownName):
        task.survey({**settings, "colour": 1})
    with pytest.raises(UsageError, match="'vgg' is no layer"):
        task.survey({**settings, "model": "vgg"})
    with pytest.raises(DataError, match="at least 50 pictures"):
        loaded(folder, min_rows=50).survey(settings)
    shutil.rmtree(folder / "data" / "mrs smith")
    with pytest.raises(DataError, match="at least 50 pictures"):
        loaded(folder, min_rows=50).traits(SMALL)
    (folder / "data" / "light").rename(folder / "data" / "li\x1bght")
    with pytest.raises(DataError, match="names of the classes cannot be sent"):
        task.survey(settings)


def test_agreed_classes_are_those_of_all_peers_and_others_are_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = loaded(folder)
    agreed = class_names.agree(
        {
            "a": ClassCounts(counts={"light": 20, "zebra, striped": 9}),
            "b": ClassCounts(counts={"10": 5, "9": 5}),
        }
    )
    assert class_names.decode(agreed.text) == ("9", "10", "light", "zebra, striped")
    assert agreed.notes == [
        ("a", "tells 2 of 4 classes: none of 9, 10"),
        ("b", "tells 2 of 4 classes: none of light, zebra, striped"),
    ]
    settings = {**SMALL, "classes": "", "preprocessing": agreed.text}
    assert task.traits(settings)["classes"] == ("9", "10", "light", "zebra, striped")
    first = task.init(0, settings)
    assert [array.shape for array in first.values()][-1][0] == 4
    seen = task.evaluate(first, settings, ignore_step)
    assert seen[0] == 4, "a fifth of the light ones"
    assert "left out, as they are no classes of this run: dark" in capsys.readouterr().err
    rows = next(iter(task.predict(first, settings, str(folder / "data"))))
    assert set(rows["class"]) <= {"9", "10", "light", "zebra, striped"}
    # Names that the run gives win over those of the peers.
    assert task.traits({**settings, "classes": "light,dark"})["classes"] == ("light", "dark")


@pytest.mark.parametrize(
    ("counts", "said"),
    [({"cat": 9}, "only the class 'cat'"), ({}, "the peers have no class")],
)
def test_too_few_classes_are_told_with_the_next_step(counts: dict[str, int], said: str) -> None:
    with pytest.raises(CommonweightError, match=said) as caught:
        class_names.agree({"a": ClassCounts(counts=counts, others=3)})
    assert "--set classes=cat,dog" in caught.value.message


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"classes": ""}, "the run does not say which classes there are"),
        ({"classes": "cat"}, "only the class 'cat', and two are needed"),
        ({"classes": "cat,cat"}, "names the class 'cat' twice"),
        ({"size": 4}, "size cannot be 4"),
        ({"channels": 2}, "channels"),
        ({"norm": "layer"}, "norm"),
        ({"model": "vgg"}, "'vgg' is no layer"),
        ({"lr": -1.0}, "lr"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Images().schema(SMALL | settings)  # type: ignore[arg-type]
    with pytest.raises(UnknownName):
        Images().schema(SMALL | {"learning_rate": 1})
