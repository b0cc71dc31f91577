"""The records of a Flower message as bytes and a file of weights, and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from commonweight.flower_apps import records
from protocols.errors import BadMessage
from protocols.messages import app_work
from protocols.messages.app_work import Arrays
from protocols.model import weights
from protocols.model.weights import Weights

W = np.arange(6, dtype=np.float32).reshape(2, 3)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    many = ArrayRecord({"w": Array(W), "b": Array(np.array([True, False]))})
    config = ConfigRecord({"raw": b"bytes", "list": [1, 2]})
    content = RecordDict({"one": many, "two": ArrayRecord({"w": Array(W + 1)}), "c": config})
    packed = records.pack(content, tmp_path / "file")
    found = records.unpack(packed.told, tmp_path / "file")
    assert np.array_equal(found.array_records["one"]["w"].numpy(), W)
    assert np.array_equal(found.array_records["one"]["b"].numpy(), [True, False])
    assert np.array_equal(found.array_records["two"]["w"].numpy(), W + 1)
    assert dict(found.config_records["c"]) == dict(config)


@pytest.mark.attack("20.wire", by="peer")
@pytest.mark.parametrize(
    ("told", "why"),
    [
        ((Arrays("a", ("w",) * 60_000),), "has a key twice"),
        ((Arrays("a", ("w", "v")),), "other arrays"),
        ((Arrays("a", ()),), "other arrays"),
        ((Arrays("a", ("w",)), Arrays("b", ("w",))), "other arrays"),
    ],
)
def test_each_array_of_a_file_is_read_once(
    told: tuple[Arrays, ...], why: str, tmp_path: Path
) -> None:
    """Attack: the records of an answer name one large array many times, so that the ServerApp
    copies it for hours."""
    weights.save(Weights({"w": W}), tmp_path / "file")
    with pytest.raises(BadMessage, match=why):
        records.unpack(app_work.encode_told(told), tmp_path / "file")
