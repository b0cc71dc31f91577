"""Canonical weights: round trips, one form only, and nothing that bytes can do to the reader."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load as library_load
from safetensors.numpy import save as library_save

from protocols.errors import BadWeights
from protocols.local import atomic_files
from protocols.model import foreign_weights, weights
from protocols.model.weights import DTYPES, TensorSpec, Weights

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
SHAPES = st.one_of(
    st.just(()),
    st.sampled_from([(0,), (3, 0), (0, 2)]),
    hnp.array_shapes(max_dims=3, max_side=4),
)


@st.composite
def models(draw: st.DrawFn) -> Weights:
    tensors: dict[str, Any] = {}
    bf16: list[str] = []
    for name in draw(st.lists(NAMES, unique=True, max_size=4)):
        code = draw(st.sampled_from(sorted(DTYPES)))
        if code == "BF16":
            bf16.append(name)
        tensors[name] = draw(hnp.arrays(DTYPES[code], draw(SHAPES)))
    return Weights(tensors, bf16)


def raw(header: object | bytes, data: bytes = b"") -> bytes:
    """A file with this header, padded as ours."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def one(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> dict[str, Any]:
    return {"w": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


@given(models())
def test_a_round_trip_keeps_every_bit(model: Weights) -> None:
    data = weights.to_bytes(model)
    again = weights.from_bytes(data)
    assert again.schema == model.schema
    assert all(again[name].tobytes() == model[name].tobytes() for name in model)
    assert weights.to_bytes(again) == data
    assert weights.digest(model) == hashlib.sha256(data).hexdigest()
    assert sum(len(piece) for piece in weights.chunks(model)) == len(data)


@given(models(), st.randoms(use_true_random=False))
def test_equal_weights_are_equal_bytes_in_any_order(model: Weights, rng: Any) -> None:
    names = list(model)
    rng.shuffle(names)
    bf16 = [name for name, spec in model.schema.items() if spec.dtype == "BF16"]
    shuffled = Weights({name: model[name] for name in names}, bf16)
    assert weights.to_bytes(shuffled) == weights.to_bytes(model)


def test_memory_layout_and_byte_order_do_not_show() -> None:
    plain = np.arange(12, dtype="<f4").reshape(3, 4)
    expected = weights.digest(Weights({"w": plain}))
    for other in (np.asfortranarray(plain), plain.astype(">f4"), np.repeat(plain, 2, 1)[:, ::2]):
        assert weights.digest(Weights({"w": other})) == expected


@given(models())
def test_the_safetensors_library_reads_ours(model: Weights) -> None:
    plain = {n: model[n] for n, spec in model.schema.items() if spec.dtype != "BF16"}
    read = library_load(weights.to_bytes(Weights(plain)))
    assert read.keys() == plain.keys()
    for name, array in plain.items():
        assert read[name].dtype == array.dtype
        assert read[name].shape == array.shape
        assert read[name].tobytes() == array.tobytes()


def test_the_libraries_other_forms_are_refused() -> None:
    two = {"a": np.zeros(3, np.uint8), "b": np.ones(2, np.float64)}
    with_metadata = library_save({"a": two["a"]}, metadata={"from": "elsewhere"})
    by_alignment = library_save(two)  # the library puts the larger dtype first
    for data in (with_metadata, by_alignment):
        assert library_load(data).keys() <= two.keys()
        with pytest.raises(BadWeights):
            weights.from_bytes(data)


@given(model=models(), data=st.data())
@settings(max_examples=200)
def test_a_mutation_is_refused_or_is_other_weights(model: Weights, data: st.DataObject) -> None:
    """There are no two files for the same weights: what is read writes the same bytes again."""
    original = bytearray(weights.to_bytes(model))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "splice"]))
    at = data.draw(st.integers(0, len(original) - 1))
    if kind == "flip":
        original[at] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del original[at : at + data.draw(st.integers(1, 9))]
    elif kind == "insert":
        original[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    else:
        other = data.draw(st.integers(0, len(original) - 1))
        original[at:at] = original[other : other + 16]
    with contextlib.suppress(BadWeights):
        assert weights.to_bytes(weights.from_bytes(bytes(original))) == bytes(original)


ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BOOL", "F8", "", None, 0, [], {}, ["F32"]]),
        "shape": st.one_of(
            st.none(),
            st.lists(st.sampled_from([0, 1, 2, -1, 2**39, 2**40, 10**30, True, 1.0, None, "1"])),
            st.integers(30, 400).map(lambda n: [2**39] * n),
            st.integers(30, 400).map(lambda n: [1] * n),
            st.integers(2, 400).map(lambda n: [0] + [2**39] * n),
        ),
        "data_offsets": st.sampled_from([[0, 4], [0, 0], [4, 0], None, 7]),
        "more": st.none(),
    },
)


@given(
    st.dictionaries(st.one_of(NAMES, st.sampled_from(["__metadata__", "\ud800"])), ENTRIES),
    st.binary(max_size=8),
)
@settings(max_examples=300)
def test_whatever_the_header_says_is_an_answer(header: dict[str, Any], data: bytes) -> None:
    with contextlib.suppress(BadWeights):
        weights.from_bytes(raw(header, data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01\x02",
        (2**63).to_bytes(8, "little"),
        raw(b"[]"),
        raw(b"nothing"),
        raw(b"[" * 200_000),
        raw(b'{"w":' + b"9" * 5000 + b"}"),
        raw(one(), b"abcd"),  # not compact
        raw({"__metadata__": {"format": "pt"}}),
        raw(one(dtype=["F32"])),
        raw(one(shape=[1] * 100)),
        raw(one(shape=[2**39] * 400)),
        raw(one(shape=[0] + [2**39] * 3)),
        raw(b'{"\\ud800":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'),
        weights.to_bytes(Weights({"w": np.zeros(2)})) + b"x",
        weights.to_bytes(Weights({"w": np.zeros(2)}))[:-1],
    ],
    ids=lambda data: repr(data[8:40]),
)
def test_what_is_not_weights_is_refused(data: bytes) -> None:
    with pytest.raises(BadWeights):
        weights.from_bytes(data)


def canonical(header: dict[str, Any]) -> bytes:
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return raw(text)


@pytest.mark.parametrize("shape", [[1] * 65, [0, *[2**39] * 3], [2**39] * 400])
def test_a_canonical_header_with_an_impossible_shape_is_refused(shape: list[int]) -> None:
    end = 0 if 0 in shape else 4
    data = canonical({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}})
    with pytest.raises(BadWeights):
        weights.from_bytes(data + bytes(end))


def test_bf16_travels_as_bits() -> None:
    bits = np.array([0x3F80, 0x7F80, 0xFFFF, 0], "<u2")
    model = Weights({"w": bits}, ["w"])
    again = weights.from_bytes(weights.to_bytes(model))
    assert again.schema == {"w": TensorSpec("BF16", (4,))}
    assert again["w"].tobytes() == bits.tobytes()


def test_scalars_and_empty_tensors_keep_their_shape() -> None:
    model = Weights({"s": np.array(2.5), "e": np.zeros((0, 3), np.float16)})
    again = weights.from_bytes(weights.to_bytes(model))
    assert again["s"].shape == ()
    assert float(again["s"]) == 2.5
    assert again["e"].shape == (0, 3)
    assert weights.from_bytes(weights.to_bytes(Weights({}))).schema == {}


@pytest.mark.parametrize("array", [np.zeros(1, np.complex64), np.array(["a"]), np.zeros(1, "u4")])
def test_a_dtype_that_cannot_travel_is_named(array: Any) -> None:
    with pytest.raises(BadWeights, match="'w'"):
        Weights({"w": array})


def test_a_schema_difference_is_named() -> None:
    expected = Weights({"a": np.zeros((20, 10), np.float32), "b": np.zeros(3)}).schema
    weights.check_schema(dict(expected), expected)
    for found, words in (
        ({"a": expected["a"]}, "'b' is missing"),
        (expected | {"a": TensorSpec("F32", (1, 10))}, "'a' is F32.1, 10., expected F32.20, 10."),
        (expected | {"a": TensorSpec("F64", (20, 10))}, "'a' is F64"),
        (expected | {"c": TensorSpec("F32", ())}, "'c' is not part"),
    ):
        with pytest.raises(BadWeights, match=words):
            weights.check_schema(found, expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("code", ["F64", "F32", "F16", "BF16"])
def test_nan_and_infinity_are_found(code: str, bad: float) -> None:
    values = np.array([1.0, bad, 2.0], np.float32)
    if code == "BF16":
        model = Weights({"w": (values.view(np.uint32) >> 16).astype("<u2")}, ["w"])
    else:
        model = Weights({"w": values.astype(DTYPES[code])})
    with pytest.raises(BadWeights, match="'w'"):
        weights.check_finite(model)


def test_integers_are_finite() -> None:
    weights.check_finite(Weights({"w": np.array([0x7F80, 0x7FFF], "<i2"), "b": np.array([True])}))


def test_a_file_is_saved_and_viewed(tmp_path: Path) -> None:
    model = Weights({"w": np.arange(6, dtype=np.float32).reshape(2, 3), "e": np.zeros(0)})
    path = tmp_path / "model.safetensors"
    digest = weights.save(model, path)
    assert digest == weights.digest(model) == weights.file_digest(path)
    read = weights.load(path)
    assert weights.digest(read) == digest
    assert not read["w"].flags.writeable
    if os.name == "posix":
        assert path.stat().st_mode & 0o777 == 0o600


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w").touch()
    with pytest.raises(BadWeights):
        weights.load(tmp_path / "w")


def test_an_exception_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"old")

    def break_off() -> None:
        with atomic_files.replacing(path) as file:
            file.write(b"new")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        break_off()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    with atomic_files.replacing(path) as file:
        file.write(b"new")
    assert path.read_bytes() == b"new"


_FULL_DISK = """
import resource, sys
from pathlib import Path
from protocols.local.atomic_files import replacing
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    with replacing(Path(sys.argv[1])) as file:
        file.write(b"x" * 4000)  # stays in the buffer: the error comes when the block ends
except OSError:
    sys.exit(7)
"""


@pytest.mark.skipif(os.name != "posix", reason="the limit that stands for a full disk")
def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"old")
    ended = subprocess.run([sys.executable, "-c", _FULL_DISK, str(path)], check=False)
    assert ended.returncode == 7
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_tensor_of_many_pieces_is_saved_as_it_is(tmp_path: Path) -> None:
    model = Weights({"w": np.arange(3 * weights.PIECE_BYTES // 4 + 5, dtype=np.float32)})
    digest = weights.save(model, tmp_path / "model")
    assert digest == weights.digest(model) == weights.file_digest(tmp_path / "model")


def any_file(tensors: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    """A valid safetensors file that is not canonical: with metadata, in the order given."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        ends = [offset, offset + len(data)]
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": ends}
        offset = ends[1]
    header = json.dumps(table).encode()
    body = b"".join(data for _, _, data in tensors.values())
    return len(header).to_bytes(8, "little") + header + body


@given(models())
def test_any_safetensors_file_can_be_read(tmp_path_factory: Any, model: Weights) -> None:
    path = tmp_path_factory.mktemp("any") / "any.safetensors"
    tensors = {
        name: (spec.dtype, list(spec.shape), np.ascontiguousarray(model[name]).tobytes())
        for name, spec in reversed(model.schema.items())
    }
    path.write_bytes(any_file(tensors))
    assert weights.digest(foreign_weights.load(path)) == weights.digest(model)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a safetensors file"),
        (b"not weights at all", "not a safetensors file"),
        (any_file({"w": ("U32", [1], bytes(4))}), "tensor 'w' has dtype 'U32'; supported: F64"),
    ],
)
def test_a_file_that_holds_no_weights_is_refused_with_the_reason(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(content)
    with pytest.raises(BadWeights, match=words):
        foreign_weights.load(path)
