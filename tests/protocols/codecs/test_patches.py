"""Patches: the same version as when it is sent whole, or no patch at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protocols.codecs import patches
from protocols.errors import BadWeights
from protocols.model import weights
from protocols.model.weights import Array, Weights
from protocols.model.weights_file import WeightsFile

BIG = patches.MIN_BYTES // 4


def model() -> dict[str, Array]:
    """Tensors of every width, one of them large enough that a patch is worth it."""
    rng = np.random.default_rng(1)
    return {
        "a": rng.integers(0, 2, 9).astype(bool),
        "b": rng.normal(size=(BIG // 100, 100)).astype(np.float32),
        "c": rng.normal(size=31).astype(np.float16),
        "d": rng.integers(0, 2**40, 17),
        "e": np.zeros((0, 3), np.float32),
        "z": rng.normal(size=70_001).astype(np.float32),
    }


def made(folder: Path, old: dict[str, Array], new: dict[str, Array]) -> tuple[int, str, str]:
    """The patch's bytes, the digest that it leads to, and the one that it should lead to."""
    weights.save(Weights(old), folder / "old")
    expected = weights.save(Weights(new), folder / "new")
    with WeightsFile(folder / "old") as parent:
        with WeightsFile(folder / "new") as child:
            nbytes = patches.make(parent, child, folder / "patch")
        if not nbytes:
            return 0, "", expected
        assert (folder / "patch").stat().st_size == nbytes
        with WeightsFile(folder / "patch") as patch:
            return nbytes, patches.apply(parent, patch, folder / "made"), expected


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 0.35), seed=st.integers(0, 99))
def test_a_patch_leads_to_the_very_version(share: float, seed: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(seed)
    old = model()
    new = {name: array.copy() for name, array in old.items()}
    for array in new.values():
        flat = array.reshape(-1)
        where = rng.random(len(flat)) < share
        flat[where] = rng.permutation(flat)[where]
    nbytes, found, expected = made(tmp_path, old, new)
    assert found == expected
    assert nbytes < 0.5 * (tmp_path / "new").stat().st_size


def test_it_is_about_the_bits(tmp_path: Path) -> None:
    old = model()
    old["b"][3, 4], old["b"][5, 6] = np.nan, 0.0
    new = {name: array.copy() for name, array in old.items()}
    new["b"][5, 6] = -0.0
    nbytes, found, expected = made(tmp_path, old, new)
    assert found == expected
    assert nbytes < 3000  # one element: gaps up to it, four bytes, a header


def test_a_version_that_is_new_all_over_has_no_patch(tmp_path: Path) -> None:
    old = model()
    new = old | {"b": old["b"] + 1, "z": old["z"] * 2}
    assert made(tmp_path, old, new)[0] == 0
    assert not (tmp_path / "patch").exists()


def test_where_the_look_was_wrong_there_is_none_either(tmp_path: Path) -> None:
    old = model()
    new = {name: array.copy() for name, array in old.items()}
    new["b"].reshape(-1)[300 : BIG // 4 - 100] += 1  # between two looks
    new["b"].reshape(-1)[BIG // 4 + 300 :] += 1
    assert made(tmp_path, old, new)[0] == 0


def test_a_small_model_is_sent_whole(tmp_path: Path) -> None:
    old = {"w": np.zeros(100, np.float32)}
    assert made(tmp_path, old, old)[0] == 0


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_mutated_patch_is_refused_or_leads_elsewhere(
    at: list[tuple[float, int]], tmp_path: Path
) -> None:
    old = model()
    new = {name: array.copy() for name, array in old.items()}
    new["b"][:5] += 1
    _, _, expected = made(tmp_path, old, new)
    data = bytearray((tmp_path / "patch").read_bytes())
    before = bytes(data)
    for where, value in at:
        data[int(where * (len(data) - 1))] = value
    (tmp_path / "patch").write_bytes(data)
    try:
        with WeightsFile(tmp_path / "old") as parent, WeightsFile(tmp_path / "patch") as patch:
            found = patches.apply(parent, patch, tmp_path / "made")
    except BadWeights:
        return
    assert found == expected or data != before


@pytest.mark.parametrize(
    "patch",
    [
        {"i": np.zeros(2, np.uint8), "v": np.zeros(7, np.uint8)},
        {"i": np.zeros(2, np.uint8), "v": np.zeros(9, np.uint8)},
        {"i": np.array([0, 255], np.uint8), "v": np.zeros(4, np.uint8)},
        {"i": np.array([100], np.uint8), "v": np.zeros(4, np.uint8)},
        {"i": np.zeros(1, np.int8), "v": np.zeros(4, np.uint8)},
        {"i": np.zeros(1, np.uint8)},
    ],
)
def test_lies_are_refused(patch: dict[str, Array], tmp_path: Path) -> None:
    weights.save(Weights({"w": np.zeros(100, np.float32)}), tmp_path / "old")
    with WeightsFile(tmp_path / "old") as parent, pytest.raises(BadWeights):
        patches.apply(parent, Weights(patch), tmp_path / "made")
    assert not (tmp_path / "made").exists()
