"""Rows of Python as the file that a task reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from commonweight import prediction
from protocols.errors import UsageError


def lines(rows: Any, folder: Path) -> list[str]:
    return Path(prediction.source_of(rows, folder)).read_text().splitlines()


def test_dicts_may_lack_values_and_hold_commas(tmp_path: Path) -> None:
    rows = [{"age": 41, "city": "Oslo, Norway"}, {"age": 0.1 + 0.2, "sex": None}]
    assert lines(rows, tmp_path) == [
        "age,city,sex",
        '41,"Oslo, Norway",',
        "0.30000000000000004,,",
    ]


def test_a_frame_has_its_columns_and_no_index(tmp_path: Path) -> None:
    frame = pd.DataFrame({"age": [41, 52], "city": ["Oslo", None]}, index=[7, 8])
    assert lines(frame, tmp_path) == ["age,city", "41,Oslo", "52,"]


def test_an_array_is_flattened_and_keeps_each_bit(tmp_path: Path) -> None:
    pictures = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    head, *rows = lines(pictures, tmp_path)
    assert head.split(",") == [f"x{number}" for number in range(12)]
    read = np.array([row.split(",") for row in rows], np.float32)
    assert (read == pictures.reshape(2, 12)).all()


def test_a_path_or_a_text_stays(tmp_path: Path) -> None:
    assert prediction.source_of("Dear reader", tmp_path) == "Dear reader"
    assert prediction.source_of(tmp_path, tmp_path) == str(tmp_path)


@pytest.mark.parametrize("rows", [[], [1, 2], np.zeros(3), np.zeros((0, 3)), pd.DataFrame(), 5])
def test_what_has_no_rows_is_refused(rows: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rows"):
        prediction.source_of(rows, tmp_path)
