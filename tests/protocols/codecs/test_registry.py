"""Codecs: what is sent and what is left over are the change; nothing malformed is read."""

from __future__ import annotations

import itertools
import math
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocols.codecs import registry
from protocols.codecs.delta import BLOCK_ELEMENTS, FlatLayout, Floats
from protocols.codecs.index_coding import deflate_chunks
from protocols.codecs.registry import NAMES, DecodedUpdate, Encoded
from protocols.errors import BadWeights, UnknownName, UsageError
from protocols.model import weights
from protocols.model.bfloat16 import bf16_to_float32, float32_to_bf16
from protocols.model.weights import (
    FLOAT_DTYPES,
    Array,
    Part,
    Schema,
    Weights,
    split_into_pieces,
)
from protocols.model.weights_file import WeightsFile

#: Gaps between positions that fit into one byte, and some that do not.
LOSSY = [registry.parse(name) for name in (*NAMES[1:], "ternary:0.02", "sparse2:1024")]
NAMES = [codec.name for codec in LOSSY]

#: The "2NN" of the FedAvg paper: 199,210 parameters.
TWO_NN = {
    "1.weight": (200, 784),
    "1.bias": (200,),
    "2.weight": (200, 200),
    "2.bias": (200,),
    "3.weight": (10, 200),
    "3.bias": (10,),
}


def model(shapes: dict[str, tuple[int, ...]], seed: int, size: float = 1.0) -> Weights:
    rng = np.random.default_rng(seed)
    return Weights(
        {name: rng.normal(0, size, shape).astype(np.float32) for name, shape in shapes.items()}
    )


def moved(base: Weights, seed: int, size: float = 0.1) -> Weights:
    """The model after a training that moved every floating-point tensor."""
    rng = np.random.default_rng(seed)
    tensors: dict[str, Array] = {}
    for name, array in base.items():
        dtype = base.schema[name].dtype
        step = rng.normal(0, size, array.shape)
        if dtype == "BF16":
            tensors[name] = float32_to_bf16((bf16_to_float32(array) + step).astype(np.float32))
        else:
            tensors[name] = (array + step).astype(array.dtype) if dtype in FLOAT_DTYPES else ~array
    return Weights(tensors, [n for n, spec in base.schema.items() if spec.dtype == "BF16"])


def mixed(seed: int) -> Weights:
    """Every kind of tensor that a model may have, some of them of awkward sizes."""
    rng = np.random.default_rng(seed)
    return Weights(
        {
            "a": rng.normal(size=(3, 300)).astype(np.float32),
            "b": rng.integers(0, 9, 5),
            "c": rng.normal(size=(7,)),
            "d": rng.normal(size=(2, 3, 5)).astype(np.float16),
            "e": float32_to_bf16(rng.normal(size=(11, 13)).astype(np.float32)),
            "f": np.zeros((0, 4), np.float32),
            "g": np.array(1.5, np.float32),
            "h": rng.integers(0, 2, 3).astype(bool),
        },
        bf16=["e"],
    )


class Files(NamedTuple):
    """A coded update on disk, and its leftovers."""

    update: Path
    left: Path
    made: Encoded


def encode(
    codec: registry.Codec,
    trained: Weights,
    base: Weights,
    folder: Path,
    left: Weights | None = None,
) -> Files:
    update, leftover = folder / "update.safetensors", folder / "left.safetensors"
    made = registry.encode(codec, trained, base, left, update, leftover)
    assert made == Encoded(weights.file_digest(update), update.stat().st_size)
    return Files(update, leftover, made)


def decode(codec: registry.Codec, path: Path, base: Weights) -> DecodedUpdate:
    assert codec.encoding is not None
    return DecodedUpdate(codec.encoding, weights.load(path), base)


def change(found: DecodedUpdate, schema: Schema) -> Floats:
    """All that an update changes, on the flat axis."""
    fields = FlatLayout(schema).fields.values()
    return np.concatenate([found.change(Part(f.name, 0, f.size)) for f in fields])


def truth(trained: Weights, base: Weights) -> Floats:
    """What training changed, on the flat axis."""

    def flat(tensors: Weights) -> Array:
        fields = FlatLayout(tensors.schema).fields.values()
        floats = [
            bf16_to_float32(tensors[f.name]) if f.dtype == "BF16" else tensors[f.name]
            for f in fields
        ]
        return np.concatenate([array.reshape(-1).astype(np.float64) for array in floats])

    return np.asarray(flat(trained) - flat(base), np.float32)


def leftovers(path: Path, base: Weights) -> Weights:
    found = weights.load(path)
    assert found.schema == registry.residual_schema(base.schema)
    return found


def flat(left: Weights) -> Floats:
    return np.asarray(next(iter(left.values())), np.float32)


@pytest.fixture(params=LOSSY, ids=NAMES)
def codec(request: pytest.FixtureRequest) -> registry.Codec:
    found: registry.Codec = request.param
    return found


# --- names -----------------------------------------------------------------------------------


def test_unknown_codecs_are_refused_with_the_known() -> None:
    for name in ("zip", "", "int8:3", "fp32:", "INT8"):
        with pytest.raises(UnknownName, match="fp32, bf16, int8, sign, ternary, topk"):
            registry.parse(name)
    for kind, share in itertools.product(registry.SPARSE, ("", "0", "nan", "-1", "0.5", "much")):
        with pytest.raises(UsageError, match=f"{kind}:{share}: the share"):
            registry.parse(f"{kind}:{share}")
    for count in ("", "0", "-1", "1025", "1e2", "0x10", "much", "9" * 5000):
        with pytest.raises(UsageError, match="a whole one from 1 to 1024"):
            registry.parse(f"sparse2:{count}")
    assert registry.parse("sparse2").name == registry.parse("sparse2:64").name == "sparse2:64"
    assert registry.parse("topk").name == registry.parse("topk:0.01").name == "topk:0.01"
    assert registry.parse("ternary").name == registry.parse("ternary:0.2").name == "ternary:0.2"
    assert registry.parse("fp32").encoding is None


# --- what arrives ----------------------------------------------------------------------------


def test_sent_and_left_over_are_the_change(codec: registry.Codec, tmp_path: Path) -> None:
    for base in (mixed(1), model(TWO_NN, 1), model({"w": (3 * BLOCK_ELEMENTS + 5,)}, 1)):
        trained = moved(base, 2)
        files = encode(codec, trained, base, tmp_path)
        sent = change(decode(codec, files.update, base), base.schema)
        left = flat(leftovers(files.left, base))
        np.testing.assert_allclose(sent + left, truth(trained, base), rtol=0, atol=1e-6)


def test_error_bounds(tmp_path: Path) -> None:
    base = model(TWO_NN, 3)
    trained = moved(base, 4)
    real = truth(trained, base)
    off = {}
    for codec in LOSSY:
        files = encode(codec, trained, base, tmp_path)
        off[codec.name] = np.abs(change(decode(codec, files.update, base), base.schema) - real)
    assert (off["bf16"] <= np.abs(real) * 2**-8).all()
    for field in FlatLayout(base.schema).fields.values():
        for start in range(0, field.size, field.row):
            row = slice(field.start + start, field.start + min(start + field.row, field.size))
            half_a_step = np.abs(real[row]).max() / 127 / 2
            assert off["int8"][row].max() <= half_a_step * (1 + 1e-5)
    sent = (off["topk:0.01"] == 0) & (real != 0)
    assert sent.sum() >= math.ceil(len(real) * 0.01)
    assert np.abs(real[sent]).min() >= np.abs(real[~sent]).max()


@pytest.mark.parametrize("share", [0.2, 0.1, 0.05, 0.02])
def test_ternary_sends_the_largest_by_the_mean_of_their_row(share: float, tmp_path: Path) -> None:
    base = model(TWO_NN, 3)
    trained = moved(base, 4)
    real, kind = truth(trained, base), registry.parse(f"ternary:{share}")
    files = encode(kind, trained, base, tmp_path)
    sent = change(decode(kind, files.update, base), base.schema)
    # Biases and the output are small: they go as int8.
    wide = [f for f in FlatLayout(base.schema).fields.values() if f.size > 2000]
    large = np.concatenate([np.arange(f.start, f.start + f.size) for f in wide])
    small = np.delete(np.arange(len(real)), large)
    np.testing.assert_allclose(sent[small], real[small], rtol=0, atol=0.5 / 127)
    assert np.count_nonzero(sent[large]) == math.ceil(len(large) * share)
    is_sent = large[sent[large] != 0]
    assert np.abs(real[is_sent]).min() >= np.abs(np.delete(real[large], sent[large] != 0)).max()
    for field in wide:
        for start in range(field.start, field.start + field.size, field.row):
            row = slice(start, min(start + field.row, field.start + field.size))
            here, of = sent[row][sent[row] != 0], real[row][sent[row] != 0]
            assert np.array_equal(np.sign(here), np.sign(of))
            if len(here):
                np.testing.assert_allclose(np.abs(here), np.abs(of).mean(), rtol=1e-6)


@pytest.mark.parametrize("count", [1, 64, 128, 1024])
def test_sparse2_sends_the_largest_of_each_chunk_by_one_of_two_levels(
    count: int, tmp_path: Path
) -> None:
    base = model(TWO_NN, 3)
    trained = moved(base, 4)
    real, kind = truth(trained, base), registry.parse(f"sparse2:{count}")
    files = encode(kind, trained, base, tmp_path)
    sent = change(decode(kind, files.update, base), base.schema)
    for field in FlatLayout(base.schema).fields.values():
        for start in range(field.start, field.start + field.size, 4096):
            chunk = slice(start, min(start + 4096, field.start + field.size))
            here, of = sent[chunk], real[chunk]
            chosen = here != 0
            assert chosen.sum() == math.ceil(count * len(of) / 4096)
            sizes = np.abs(of[chosen])
            if not chosen.all():
                assert sizes.min() >= np.abs(of[~chosen]).max()
            assert np.array_equal(np.sign(here[chosen]), np.sign(of[chosen]))
            above = sizes > sizes.mean(dtype=np.float64)
            for group in (above, ~above):
                if group.any():
                    expected = np.sign(of[chosen][group]) * sizes[group].mean()
                    np.testing.assert_allclose(here[chosen][group], expected, rtol=2**-8)


def test_sparse2_leaves_what_does_not_change_as_it_is(tmp_path: Path) -> None:
    """Embeddings of tokens that a peer does not have are an example."""
    base = model({"w": (3, 4096)}, 5)
    w = np.array(base["w"])
    w[0, :70] += np.linspace(1, 2, 70, dtype=np.float32)
    w[1, 7] += 1
    files = encode(registry.parse("sparse2:128"), Weights({"w": w}), base, tmp_path)
    sent = change(decode(registry.parse("sparse2:128"), files.update, base), base.schema)
    assert np.flatnonzero(sent).tolist() == [*range(70), 4096 + 7]
    assert np.ptp(sent[:70]) == 0  # the other level is that of no change


def test_the_size_of_a_sparse2_update_follows_from_the_model(tmp_path: Path) -> None:
    """Positions take 7 bits of 12, and the bytes of a chunk are whole."""
    base = model({"w": (5, 4096), "x": (100,)}, 6)
    for count, chunk, rest in ((64, 80, 3), (128, 144, 5), (256, 256, 7)):
        kind = registry.parse(f"sparse2:{count}")
        update = weights.load(encode(kind, moved(base, 7), base, tmp_path).update)
        assert len(update["c"]) == 5 * chunk + rest
        assert update.nbytes == 5 * chunk + rest + 4 * 6
        whole = len(weights.header_bytes(base.schema)) + base.nbytes
        assert registry.max_bytes(kind, base.schema, whole) == (
            len(weights.header_bytes(update.schema)) + update.nbytes
        )


def test_integers_keep_the_base_and_floats_their_dtype(
    codec: registry.Codec, tmp_path: Path
) -> None:
    base = mixed(5)
    trained = moved(base, 6)
    found = decode(codec, encode(codec, trained, base, tmp_path).update, base)
    assert found.schema == base.schema
    for piece in split_into_pieces(base.schema):
        for part in piece:
            read = found.read(part)
            assert read.dtype == base[part.name].dtype
            if base.schema[part.name].dtype not in FLOAT_DTYPES:
                assert np.array_equal(read, base.read(part))


def test_error_feedback_sums_to_the_truth(codec: registry.Codec, tmp_path: Path) -> None:
    base = model(TWO_NN, 7)
    left: Weights | None = None
    told = sent = np.zeros(199_210)
    for number in range(12):
        trained = moved(base, 100 + number)
        files = encode(codec, trained, base, tmp_path, left)
        told = told + truth(trained, base)
        sent = sent + change(decode(codec, files.update, base), base.schema)
        (tmp_path / "left.safetensors").rename(tmp_path / f"{number}.safetensors")
        left = leftovers(tmp_path / f"{number}.safetensors", base)
        np.testing.assert_allclose(sent + flat(left), told, rtol=0, atol=1e-5)


def test_what_does_not_move_costs_nothing_and_stays(codec: registry.Codec, tmp_path: Path) -> None:
    base = model(TWO_NN, 8)
    files = encode(codec, base, base, tmp_path)
    found = decode(codec, files.update, base)
    assert not change(found, base.schema).any()
    assert not flat(leftovers(files.left, base)).any()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    values=st.lists(st.floats(-(2.0**120), 2.0**120, width=32), min_size=1, max_size=40),
    kind=st.sampled_from(LOSSY),
)
def test_any_change_is_sent_or_left_over(
    values: list[float], kind: registry.Codec, tmp_path: Path
) -> None:
    base = Weights({"w": np.zeros(len(values), np.float32)})
    trained = Weights({"w": np.array(values, np.float32)})
    files = encode(kind, trained, base, tmp_path)
    sent = change(decode(kind, files.update, base), base.schema).astype(np.float64)
    left = flat(leftovers(files.left, base)).astype(np.float64)
    np.testing.assert_allclose(sent + left, values, rtol=1e-6, atol=np.abs(values).max() * 1e-6)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cuts=st.lists(st.integers(0, 3 * 700), max_size=12), kind=st.sampled_from(LOSSY))
def test_any_partition_reads_the_same(
    cuts: list[int], kind: registry.Codec, tmp_path: Path
) -> None:
    base = model({"u": (5,), "w": (3, 700), "z": (9,)}, 9)
    found = decode(kind, encode(kind, moved(base, 10), base, tmp_path).update, base)
    whole = found.read(Part("w", 0, 2100))
    bounds = sorted({0, 2100, *cuts})
    parts = [found.read(Part("w", a, b)) for a, b in itertools.pairwise(bounds)]
    assert np.array_equal(np.concatenate(parts), whole)


def test_a_file_and_memory_read_the_same(codec: registry.Codec, tmp_path: Path) -> None:
    base = model({"w": (5, 3 * BLOCK_ELEMENTS // 4), "x": (100, 4)}, 11)
    weights.save(base, tmp_path / "base.safetensors")
    weights.save(moved(base, 12), tmp_path / "trained.safetensors")
    update, left = tmp_path / "update.safetensors", tmp_path / "left.safetensors"
    with (
        WeightsFile(tmp_path / "base.safetensors") as old,
        WeightsFile(tmp_path / "trained.safetensors") as new,
    ):
        made = registry.encode(codec, new, old, None, update, left)
        with WeightsFile(update) as file:
            found = registry.open_update(codec, file, old)
            for part in (
                Part("w", 7, 3 * BLOCK_ELEMENTS),
                Part("x", 0, 400),
                Part("w", BLOCK_ELEMENTS, BLOCK_ELEMENTS),
            ):
                expected = decode(codec, update, base).read(part)
                assert np.array_equal(found.read(part), expected)
    again = encode(codec, moved(base, 12), base, tmp_path)
    assert again.made == made  # equal changes are equal bytes


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shapes",
    [TWO_NN, {f"layer.{i}.weight": (256, 300) for i in range(40)}],
    ids=["2nn", "3 million"],
)
@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("bf16", 1.98),
        ("int8", 3.9),
        ("sign", 30.0),
        ("topk", 45.0),
        ("ternary", 27.0),
        ("ternary:0.1", 42.0),
        ("sparse2", 180.0),
        ("sparse2:128", 105.0),
    ],
)
def test_sizes_with_headers(
    shapes: dict[str, tuple[int, ...]], name: str, least: float, tmp_path: Path
) -> None:
    base = model(shapes, 13)
    kind = registry.parse(name)
    whole = len(weights.header_bytes(base.schema)) + base.nbytes
    made = encode(kind, moved(base, 14), base, tmp_path).made
    assert whole / made.nbytes >= least
    assert made.nbytes <= registry.max_bytes(kind, base.schema, whole)


# --- what must not be sent or read -----------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_what_is_not_finite_is_not_sent(codec: registry.Codec, bad: float, tmp_path: Path) -> None:
    base = model({"v": (4,), "w": (300,)}, 15)
    w = np.array(base["w"])
    w[123] = bad
    with pytest.raises(BadWeights, match="'w'"):
        encode(codec, Weights({"v": base["v"], "w": w}), base, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_model_is_not_sent(codec: registry.Codec, tmp_path: Path) -> None:
    with pytest.raises(BadWeights):
        encode(codec, model({"w": (3,)}, 1), model({"w": (4,)}, 1), tmp_path)


def test_a_file_of_another_codec_or_model_is_not_read(tmp_path: Path) -> None:
    base, other = model({"w": (1000,)}, 16), model({"w": (1001,)}, 16)
    for kind in LOSSY:
        path = encode(kind, moved(base, 17), base, tmp_path).update
        for reader in LOSSY:
            if reader.name.partition(":")[0] != kind.name.partition(":")[0]:
                with pytest.raises(BadWeights):
                    decode(reader, path, base)
        if not registry.is_sparse(kind.name):  # which does not say how long the model is
            with pytest.raises(BadWeights):
                decode(kind, path, other)
        with pytest.raises(BadWeights):
            decode(kind, path, model({"w": (10,)}, 16))


def _coded(**tensors: Array) -> Weights:
    return Weights(tensors)


F = np.float32


def _ternary(
    gaps: list[int], signs: int, first: int = 0, scales: list[float] | None = None
) -> Weights:
    bits = np.zeros(-(-signs // 8), np.uint8)
    bits[:1] = first
    scale = np.array([1.0] if scales is None else scales, F)
    g, chunks = deflate_chunks(np.array(gaps, np.uint8))
    return _coded(b=bits, g=g, l=chunks, q=np.empty(0, np.int8), s=scale)


def _bomb(nbytes: int) -> Weights:
    """An update whose gaps are so many bytes of 0, deflated as one chunk."""
    g = np.frombuffer(zlib.compress(bytes(nbytes)), np.uint8)
    return _coded(**{**_ternary([0], 1), "g": g, "l": np.array([len(g)], np.int32)})


def _chunk(
    low: int = 0, marks: int = 0b11, rest: int = 0, levels: list[float] | None = None
) -> Weights:
    """Two of a thousand: 8 low bits of each, 2 + 3 marks, 2 signs, 2 levels, 7 bits of rest."""
    bits = low << 16 | marks << 11 | rest
    level = np.array([0.5, 1.0] if levels is None else levels, F)
    return Weights(
        {"c": np.frombuffer(bits.to_bytes(4, "big"), np.uint8), "s": float32_to_bf16(level)},
        bf16=["s"],
    )


def test_two_positions_of_sparse2_by_hand() -> None:
    coding = registry.parse("sparse2:8").encoding
    assert coding is not None
    for low, marks, places in (
        (0x80_40, 0b11000, [1, 2]),  # low bits come first, marks of the same high bits together
        (0x00_00, 0b10001, [0, 768]),
        (0x00_E7, 0b01001, [256, 999]),
    ):
        found = DecodedUpdate(coding, _chunk(low, marks), Weights({"w": np.zeros(1000, F)}))
        assert np.flatnonzero(found.read(Part("w", 0, 1000))).tolist() == places


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("sparse2:8", _chunk(0x80_40, 0b10000)),  # one position
        ("sparse2:8", _chunk(0x80_40, 0b11100)),  # three
        ("sparse2:8", _chunk(0x80_80, 0b11000)),  # the same twice
        ("sparse2:8", _chunk(0x40_80, 0b11000)),  # one that descends
        ("sparse2:8", _chunk(0x00_17, 0b01001)),  # beyond the end
        ("sparse2:8", _chunk(0x80_40, 0b11000, rest=1)),  # bits that mean nothing
        ("sparse2:8", _chunk(0x80_40, 0b11000, levels=[1.0, 0.5])),
        ("sparse2:8", _chunk(0x80_40, 0b11000, levels=[-1.0, 0.5])),
        ("sparse2:8", _chunk(0x80_40, 0b11000, levels=[0.0, np.inf])),
        ("sparse2:8", _chunk(0x80_40, 0b11000, levels=[0.0, np.nan])),
        ("sparse2:8", _chunk(0x80_40, 0b11000, levels=[np.nan, 1.0])),
        ("sparse2:8", _chunk(0x80_40, 0b11000, levels=[0.0])),
        ("sparse2:16", _chunk(0x80_40, 0b11000)),  # another number of positions
        ("int8", _coded(q=np.zeros(1000, np.int8), s=np.full(1, np.nan, F))),
        ("int8", _coded(q=np.zeros(1000, np.int8), s=np.full(1, np.inf, F))),
        ("int8", _coded(q=np.zeros(1000, np.int8), s=np.full(1, -1, F))),
        ("int8", _coded(q=np.zeros(1000, np.int8), s=np.zeros(2, F))),
        ("int8", _coded(q=np.zeros(1000, np.uint8), s=np.zeros(1, F))),
        ("sign", _coded(b=np.zeros(125, np.uint8), s=np.full(1, np.nan, F))),
        ("sign", _coded(b=np.zeros(126, np.uint8), s=np.zeros(1, F))),
        ("topk", _coded(i=np.zeros(11, np.uint8), v=np.zeros(11, F))),
        ("topk", _coded(i=np.zeros(10, np.uint8), v=np.zeros(9, F))),
        ("topk", _coded(i=np.zeros(9, np.uint8), v=np.zeros(10, F))),
        ("topk", _coded(i=np.array([255, 255, 255, 255, 0], np.uint8), v=np.zeros(1, F))),
        ("topk", _coded(i=np.array([255, 255, 255, 235], np.uint8), v=np.zeros(1, F))),
        ("topk", _coded(i=np.array([3, 255], np.uint8), v=np.zeros(1, F))),
        ("topk", _coded(i=np.full(4000, 255, np.uint8), v=np.zeros(1, F))),
        ("topk", _coded(i=np.zeros((1, 1), np.uint8), v=np.zeros(1, F))),
        ("topk", _coded(i=np.zeros(1, np.uint8), v=np.zeros(1, F), w=np.zeros(1, F))),
        ("topk", _coded(i=np.zeros(0, np.uint8))),
        ("ternary", _ternary([0] * 202, 202)),  # more than may be sent
        ("ternary", _ternary([0] * 10, 8)),  # ten positions, eight signs
        ("ternary", _ternary([0], 9)),  # one position, two bytes of signs
        ("ternary", _ternary([0], 1, first=0x40)),  # a sign beyond it
        ("ternary", _ternary([255], 0)),  # a gap that does not end
        ("ternary", _ternary([0, 255], 1)),
        ("ternary", _ternary([255, 255, 255, 235], 1)),  # beyond the model
        ("ternary", _ternary([0], 1, scales=[0.0, 0.0])),
        ("ternary", _ternary([0], 1, scales=[np.nan])),
        ("ternary", _ternary([0], 1, scales=[-1.0])),
        ("ternary", _ternary([0], 1, scales=[])),
        ("ternary", _coded(**{**_ternary([0], 1), "q": np.zeros(1, np.int8)})),
        ("ternary", _coded(**{**_ternary([0], 1), "l": np.zeros(1, np.int32)})),
        ("ternary", _coded(**{**_ternary([0], 1), "g": np.zeros(9, np.uint8)})),  # no deflate
        ("ternary", _bomb(1 << 20)),
        ("ternary", _bomb(0)),
    ],
)
def test_lies_are_refused(name: str, file: Weights) -> None:
    coding = registry.parse(name).encoding
    assert coding is not None
    with pytest.raises(BadWeights):
        DecodedUpdate(coding, file, model({"w": (1000,)}, 18))


def test_a_ternary_update_of_an_early_build_is_refused_with_a_likely_reason() -> None:
    """Those wrote gaps in half bytes, as a tensor i: read as they are now, the model is wrong."""
    coding = registry.parse("ternary").encoding
    assert coding is not None
    now = _ternary([0], 1)
    DecodedUpdate(coding, now, model({"w": (1000,)}, 18))
    old = _coded(**{{"g": "i"}.get(name, name): array for name, array in now.items()})
    with pytest.raises(BadWeights, match="another version of commonweight"):
        DecodedUpdate(coding, old, model({"w": (1000,)}, 18))


def test_the_last_position_may_be_the_last_element() -> None:
    coding = registry.parse("topk").encoding
    assert coding is not None
    file = _coded(i=np.array([255, 255, 255, 234], np.uint8), v=np.ones(1, F))
    found = DecodedUpdate(coding, file, Weights({"w": np.zeros(1000, F)}))
    assert np.flatnonzero(found.read(Part("w", 0, 1000))).tolist() == [999]


def test_bits_beyond_the_end_are_refused() -> None:
    coding = registry.parse("sign").encoding
    assert coding is not None
    base = model({"w": (5,)}, 19)
    DecodedUpdate(coding, _coded(b=np.array([0b11111000], np.uint8), s=np.ones(1, F)), base)
    with pytest.raises(BadWeights, match="beyond the end"):
        DecodedUpdate(coding, _coded(b=np.array([0b00000100], np.uint8), s=np.ones(1, F)), base)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(LOSSY),
    at=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=5),
    cut=st.none() | st.floats(0, 1),
)
def test_a_mutated_file_is_read_or_refused(
    kind: registry.Codec, at: list[tuple[float, int]], cut: float | None, tmp_path: Path
) -> None:
    base = model({"u": (3, 100), "w": (2000,)}, 20)
    path = encode(kind, moved(base, 21), base, tmp_path).update
    data = bytearray(path.read_bytes())
    for where, value in at:
        data[int(where * (len(data) - 1))] = value
    if cut is not None:
        del data[int(cut * len(data)) :]
    path.write_bytes(data)
    assert kind.encoding is not None
    try:
        with WeightsFile(path) as file:
            found = DecodedUpdate(kind.encoding, file, base)
            for piece in split_into_pieces(base.schema, 1000):
                for part in piece:
                    assert len(found.read(part)) == part.stop - part.start
    except BadWeights:
        pass
