"""Updates of adapters: what counts is the product, and nothing malformed is read."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocols.codecs import factors, registry
from protocols.codecs.factors import DELTA, A, B, Products
from protocols.errors import BadWeights, UsageError
from protocols.model import weights
from protocols.model.weights import Array, Part, Weights, split_into_pieces
from protocols.model.weights_file import WeightsFile

SIDES = {"m.q": (6, 10), "m.v": (3, 10)}
RANK = 4


def made(seed: int, rank: int, **more: Array) -> Weights:
    draw = np.random.default_rng(seed)
    found: dict[str, Array] = {"head": draw.normal(size=(2, 3)).astype(np.float32)}
    for layer, (out, inputs) in SIDES.items():
        found[layer + A] = draw.normal(size=(rank, inputs)).astype(np.float32)
        found[layer + B] = draw.normal(size=(out, rank)).astype(np.float32)
    return Weights(found | more)


def dense(seed: int) -> Weights:
    """A version that holds products."""
    draw = np.random.default_rng(seed)
    found: dict[str, Array] = {"head": draw.normal(size=(2, 3)).astype(np.float32)}
    for layer, sides in SIDES.items():
        found[layer + DELTA] = draw.normal(size=sides).astype(np.float32)
    return Weights(found)


def product(update: Weights, layer: str) -> Array:
    return update[layer + B].astype(np.float64) @ update[layer + A].astype(np.float64)


VERSIONS = {"products": dense(1), "factors": made(2, RANK)}
CODEC = registry.parse(f"factors:{RANK}")


@pytest.fixture(params=VERSIONS)
def version(request: pytest.FixtureRequest) -> Weights:
    return VERSIONS[request.param]


@pytest.mark.parametrize("rank", [1, 2, RANK])
def test_an_update_is_read_as_products_whatever_its_rank(version: Weights, rank: int) -> None:
    base, update = CODEC.base(version), made(3, rank)
    found = registry.open_update(CODEC, update, base)
    assert isinstance(found, registry.FactoredUpdate)
    assert found.schema == base.schema == dense(0).schema
    for layer, (out, inputs) in SIDES.items():
        part = Part(layer + DELTA, 0, out * inputs)
        old, new = base.read(part), product(update, layer).reshape(-1)
        changed = new if found.adds else new - old
        np.testing.assert_allclose(found.change(part), changed, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.read(part), old + changed, rtol=1e-5, atol=1e-5)
    head = Part("head", 0, 6)
    assert np.array_equal(found.read(head), update.read(head))
    np.testing.assert_array_equal(found.change(head), update.read(head) - base.read(head))


@given(cuts=st.lists(st.integers(0, 60), max_size=8))
def test_any_partition_reads_the_same(cuts: list[int]) -> None:
    found = Products(made(4, 3))
    whole = found.read(Part("m.q" + DELTA, 0, 60))
    parts = [
        found.read(Part("m.q" + DELTA, a, b)) for a, b in itertools.pairwise(sorted({0, 60, *cuts}))
    ]
    assert np.array_equal(np.concatenate(parts), whole)


def test_no_update_is_larger_than_told(tmp_path: Path, version: Weights) -> None:
    whole = sum(spec.nbytes for spec in version.schema.values())
    weights.save(made(5, RANK), tmp_path / "update.safetensors")
    most = registry.max_bytes(CODEC, version.schema, whole)
    assert (tmp_path / "update.safetensors").stat().st_size == most


def without(update: Weights, name: str) -> Weights:
    return Weights({n: array for n, array in update.items() if n != name})


@pytest.mark.parametrize(
    "update",
    [
        made(6, RANK + 1),
        made(6, 2, **{"m.q" + A: np.ones((0, 10), np.float32)}),
        made(6, 2, **{"m.q" + A: np.ones((3, 10), np.float32)}),  # another rank than B
        made(6, 2, **{"m.q" + A: np.ones((2, 9), np.float32)}),
        made(6, 2, **{"m.q" + A: np.ones(20, np.float32)}),
        made(6, 2, **{"m.q" + A: np.ones((2, 10))}),  # float64
        made(6, 2, **{"m.q" + B: np.ones((7, 2), np.float32)}),
        made(6, 2, **{"m.q" + B: np.ones((), np.float32)}),
        made(6, 2, head=np.ones((3, 3), np.float32)),
        made(6, 2, more=np.ones(1, np.float32)),
        made(6, 2, **{"m.w" + A: np.ones((2, 10), np.float32)}),
        without(made(6, 2), "m.v" + B),
        without(made(6, 2), "head"),
        dense(6),
    ],
)
def test_lies_are_refused(update: Weights, version: Weights) -> None:
    with pytest.raises(BadWeights):
        registry.open_update(CODEC, update, CODEC.base(version))


@pytest.mark.parametrize(
    "odd",
    [
        {"m.q" + A: np.ones((2, 2, 2), np.float32)},
        {"m.q" + A: np.ones((2, 10), np.int32)},
        {"m.q" + A: np.ones((2, 10), np.float32)},  # B has another rank
        {"m.x" + A: np.ones((2, 10), np.float32)},  # without B
        {"m.x" + DELTA: np.ones(3, np.float32)},
    ],
)
def test_a_version_of_another_shape_is_refused(odd: dict[str, Array]) -> None:
    with pytest.raises(BadWeights):
        CODEC.base(made(7, RANK, **odd)).read(Part("head", 0, 1))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(sorted(VERSIONS)),
    at=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=5),
    cut=st.none() | st.floats(0, 1),
)
def test_a_mutated_file_is_read_or_refused(
    kind: str, at: list[tuple[float, int]], cut: float | None, tmp_path: Path
) -> None:
    base, path = CODEC.base(VERSIONS[kind]), tmp_path / "update.safetensors"
    weights.save(made(8, 2), path)
    data = bytearray(path.read_bytes())
    for where, value in at:
        data[int(where * (len(data) - 1))] = value
    if cut is not None:
        del data[int(cut * len(data)) :]
    path.write_bytes(data)
    try:
        with WeightsFile(path) as file:
            found = registry.open_update(CODEC, file, base)
            for piece in split_into_pieces(base.schema, 100):
                for part in piece:
                    assert len(found.read(part)) == part.stop - part.start
    except BadWeights:
        pass


def test_ranks_that_cannot_be() -> None:
    for rank in ("", "0", "1025", "-1", "1e2", "9" * 5000):
        with pytest.raises(UsageError, match="a whole one from 1 to 1024"):
            registry.parse(f"factors:{rank}")
    assert factors.is_factored(VERSIONS["factors"].schema)
    assert not factors.is_factored(VERSIONS["products"].schema)
