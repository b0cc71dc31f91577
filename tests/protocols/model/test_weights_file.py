"""Weights in a file, piece by piece: the same bytes and the same refusals as in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from protocols.errors import BadWeights
from protocols.model import weights
from protocols.model.weights import DTYPES, Part, Schema, TensorSpec, Weights, split_into_pieces
from protocols.model.weights_file import WeightsFile, WeightsWriter

CODES = sorted(DTYPES)
SHAPES = st.one_of(st.sampled_from([(), (0,), (3, 0)]), hnp.array_shapes(max_dims=3, max_side=5))


@st.composite
def models(draw: st.DrawFn) -> Weights:
    tensors: dict[str, Any] = {}
    bf16 = []
    for name in draw(st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=5)):
        code = draw(st.sampled_from(CODES))
        tensors[name] = draw(hnp.arrays(DTYPES[code], draw(SHAPES)))
        if code == "BF16":
            bf16.append(name)
    return Weights(tensors, bf16)


def write(path: Path, model: Weights, limit_bytes: int) -> str:
    with WeightsWriter(path, model.schema) as writer:
        for piece in split_into_pieces(model.schema, limit_bytes):
            writer.write({part: model.read(part) for part in piece})
    return writer.digest


@given(model=models(), limit_bytes=st.integers(1, 100))
@settings(max_examples=60)
def test_pieces_of_any_size_make_the_same_file(
    model: Weights, limit_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("stored") / "model"
    digest = write(path, model, limit_bytes)
    assert digest == weights.digest(model)
    assert path.read_bytes() == weights.to_bytes(model)
    with WeightsFile(path) as stored:
        assert stored.schema == model.schema
        assert stored.nbytes == path.stat().st_size
        for piece in split_into_pieces(stored.schema, limit_bytes):
            for part in piece:
                assert stored.read(part).tobytes() == model.read(part).tobytes()


@given(
    st.dictionaries(
        st.sampled_from("abcdef"), st.tuples(st.sampled_from(CODES), SHAPES), max_size=5
    ),
    st.integers(1, 200),
)
def test_pieces_hold_every_element_once_and_in_order(
    tensors: dict[str, tuple[str, tuple[int, ...]]], limit_bytes: int
) -> None:
    schema: Schema = {name: TensorSpec(*spec) for name, spec in tensors.items()}
    groups = list(split_into_pieces(schema, limit_bytes))
    assert all(groups)
    largest = max((DTYPES[spec.dtype].itemsize for spec in schema.values()), default=1)
    for group in groups:
        nbytes = sum((p.stop - p.start) * DTYPES[schema[p.name].dtype].itemsize for p in group)
        assert nbytes < limit_bytes + largest
    found = [(part.name, i) for group in groups for part in group for i in range(*part[1:])]
    expected = []
    for name in sorted(schema):
        count = schema[name].nbytes // DTYPES[schema[name].dtype].itemsize
        expected += [(name, i) for i in range(count)]
    assert found == expected


@given(model=models(), data=st.data())
@settings(max_examples=80)
def test_a_file_is_taken_where_its_bytes_are_taken(
    model: Weights, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    changed = bytearray(weights.to_bytes(model))
    at = data.draw(st.integers(0, len(changed) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "nothing"]))
    if kind == "flip":
        changed[at] ^= data.draw(st.integers(1, 255))
    elif kind == "cut":
        del changed[at:]
    elif kind == "insert":
        changed[at:at] = b"  "
    path = tmp_path_factory.mktemp("stored") / "model"
    path.write_bytes(changed)
    try:
        schema, _ = weights.read_schema(bytes(changed))
    except BadWeights:
        with pytest.raises(BadWeights):
            WeightsFile(path)
    else:
        with WeightsFile(path) as stored:
            assert stored.schema == schema


@pytest.mark.parametrize("content", [b"", b"short", (2**62).to_bytes(8, "little"), b"\0" * 8])
def test_what_is_no_file_of_ours_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(BadWeights):
        WeightsFile(tmp_path / "model")


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model"
    weights.save(Weights({"w": np.zeros(100)}), path)
    with WeightsFile(path) as stored:
        with path.open("r+b") as file:
            file.truncate(200)
        with pytest.raises(BadWeights, match="truncated"):
            stored.read(Part("w", 0, 100))


def test_a_piece_of_another_size_and_a_broken_block_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"old")
    schema = Weights({"w": np.zeros(4)}).schema
    with (
        pytest.raises(BadWeights, match="number of elements"),
        WeightsWriter(path, schema) as writer,
    ):
        writer.write({Part("w", 0, 4): np.zeros(3)})
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
