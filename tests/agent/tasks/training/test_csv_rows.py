"""Tables of plain numbers: what the digits and the movements are asked about."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from agent.data.settings import DataSettings
from agent.tasks.demo.mnist import Mnist
from agent.tasks.demo.motion import Motion
from agent.tasks.training import csv_rows
from protocols.errors import DataError

torch.set_num_threads(1)


def read(source: Path, columns: int = 2) -> list[list[int]]:
    found = csv_rows.Table(str(source), np.uint8, "a whole number from 0 to 255", columns)
    return [row for batch in found for row in batch.tolist()]


def table(path: Path, rows: np.ndarray, label: np.ndarray | None = None) -> Path:  # type: ignore[type-arg]
    names = [f"x{n}" for n in range(rows.shape[1])]
    if label is not None:
        names, rows = ["label", *names], np.column_stack([label, rows])
    np.savetxt(path, rows, delimiter=",", header=",".join(names), comments="", fmt="%.9g")
    return path


def test_each_row_once_and_no_label(tmp_path: Path) -> None:
    rows = np.arange(5000).reshape(2500, 2) % 256
    assert read(table(tmp_path / "a.csv", rows)) == rows.tolist()
    assert read(table(tmp_path / "b.csv", rows, np.zeros(2500))) == rows.tolist()
    quoted = tmp_path / "c.csv"
    quoted.write_text('\ufeff"x0","x1"\r\n"1","2"\r\n\r\n3,4\r\n')
    assert read(quoted) == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b,c\n1,2,3\n", "has 3 columns, and 2 are needed"),
        ("a,b\n1,2\n3,secret\n", "in lines 2 to 3 a value is missing or is not a whole number"),
        ("a,b\n1,256\n", "is not a whole number from 0 to 255"),
        ("a,b\n1,0.5\n", "is not a whole number"),
        ("a,b\n1,\n", "a value is missing"),
        ("a,b\n1\n", "a value is missing"),
    ],
)
def test_what_does_not_fit_is_told_and_quotes_no_value(
    text: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        read(path)
    assert "secret" not in str(caught.value)
    assert path.name not in caught.value.message


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").touch()
    for name, words in (
        ("rows.parquet", "predicts for a CSV file: 2 columns"),
        ("", "predicts for a CSV file"),
        ("missing.csv", "there is no such file"),
    ):
        with pytest.raises(DataError, match=words):
            read(tmp_path / name)
    path = tmp_path / "rows.csv"
    path.write_bytes("a,b\n1,ä\n".encode("latin-1"))
    with pytest.raises(DataError, match="no UTF-8 text"):
        read(path)
    floats = tmp_path / "floats.csv"
    floats.write_text("a,b\n1,nan\n")
    with pytest.raises(DataError, match="is missing or is not a number"):
        list(csv_rows.Table(str(floats), columns=2))


def test_digits_are_told(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    task = Mnist()
    task.load(DataSettings(index=0, parts=20, cache=str(tmp_path)))
    settings = {"epochs": 3, "batch_size": 10, "lr": 0.1, "seed": 1, "round": 1}
    trained, _, _ = task.train(task.init(1, {}), settings, lambda *told: None)
    held_out = task._source({}, 1)
    pixels = (held_out.x.numpy() * 255).round()
    source = table(tmp_path / "digits.csv", pixels, held_out.y.numpy())
    for chosen in (settings, {**settings, "pixels": "standard"}):
        (told,) = task.predict(trained, chosen, str(source))
        assert list(told["row"]) == list(range(len(pixels)))
        right = np.mean(np.array(told["class"]) == held_out.y.numpy())
        _, metrics, *_ = task.evaluate(trained, chosen, lambda *told: None)
        assert right == pytest.approx(metrics["accuracy"])
        assert all(0.1 <= chance <= 1 for chance in told["probability"])


def test_movements_are_told(tmp_path: Path) -> None:
    pytest.importorskip("seglearn", reason="its recordings come with the extra demo")
    task = Motion()
    task.load(DataSettings(index=0, parts=10, cache=str(tmp_path), device="cpu"))
    model = task.init(1, {})
    _, held_out = task.data(DataSettings(), {})
    source = table(tmp_path / "windows.csv", held_out.x.reshape(len(held_out.y), -1))
    told = list(task.predict(model, {}, str(source)))
    classes = [one for batch in told for one in batch["class"]]
    _, metrics, *_ = task.evaluate(model, {}, lambda *told: None)
    assert np.mean(np.array(classes) == held_out.y) == pytest.approx(metrics["accuracy"])
