"""Networks declared in a line: their shapes, their first weights, and Keras' layout of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.tasks.images import layer_spec
from agent.tasks.training.seeds import random_state
from protocols.errors import UsageError
from protocols.model import weights

TEXTS = (
    "dense 3",
    "conv 4 3, pool, dense 5, dense 2",
    "conv 2 1,conv 3 5, pool, pool, conv 2 3",
    "conv 4 3 norm, pool, dense 5 norm",
)


@st.composite
def networks(draw: st.DrawFn) -> tuple[layer_spec.Layer, ...]:
    text = ", ".join(
        draw(
            st.lists(st.sampled_from(("conv 3 1", "conv 2 3 norm", "conv 4 5", "pool")), max_size=4)
        )
        + draw(st.lists(st.sampled_from(("dense 3", "dense 7 norm")), max_size=2))
    )
    size = draw(st.integers(16, 21))
    return layer_spec.parse_layers(text or "pool", draw(st.sampled_from((1, 3))), size, 4)


@given(networks(), st.integers(0, 2**31))
def test_keras_layout_and_back_is_the_same(layers: tuple[layer_spec.Layer, ...], seed: int) -> None:
    first = layer_spec.init(layers, random_state(seed))
    assert first.schema == layer_spec.schema(layers)
    there = layer_spec.to_keras(layers, first)
    assert [a.flags.c_contiguous for a in there] == [True] * len(there)
    back = layer_spec.from_keras(layers, there)
    assert weights.digest(back) == weights.digest(first)


def test_a_dense_layer_after_pictures_reads_their_pixels_in_keras_order() -> None:
    """By hand: what a dense layer gives is the same sum, whichever way its inputs are laid out."""
    layers = layer_spec.parse_layers("dense 5", 3, 4, 2)
    first = layer_spec.init(layers, random_state("by hand"))
    picture = np.random.default_rng(1).normal(size=(3, 4, 4)).astype(np.float32)
    here = first["dense1.weight"] @ picture.reshape(-1)
    there = picture.transpose(1, 2, 0).reshape(-1) @ layer_spec.to_keras(layers, first)[0]
    np.testing.assert_allclose(here, there, rtol=1e-5)


def test_a_filter_is_turned_with_its_rows_and_columns_in_place() -> None:
    layers = layer_spec.parse_layers("conv 2 3", 1, 8, 2)
    first = layer_spec.init(layers, random_state("filter"))
    kernel = layer_spec.to_keras(layers, first)[0]
    assert kernel.shape == (3, 3, 1, 2)
    assert kernel[0, 2, 0, 1] == first["conv1.weight"][1, 0, 0, 2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("conv 8", "'conv 8' is no layer"),
        ("pool norm", "'pool norm' is no layer"),
        ("norm", "'norm' is no layer"),
        ("", "'' is no layer"),
        ("conv 8 4", "cannot be 'conv 8 4'"),
        ("dense 4, conv 8 3", "layer 2 cannot be"),
        ("dense 4, pool", "nothing left to pool"),
        ("pool, pool, pool, pool", "layer 4 has nothing left to pool"),
        ("dense 999999", "999999 units"),
        ("dense 0", "0 units"),
    ],
)
def test_what_is_no_network_is_told_by_its_layer(text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        layer_spec.parse_layers(text, 3, 8, 2)


@pytest.mark.parametrize("text", TEXTS)
def test_first_weights_follow_from_the_seed(text: str) -> None:
    layers = layer_spec.parse_layers(text, 3, 12, 2)
    one, again, other = (layer_spec.init(layers, random_state("init", s)) for s in (1, 1, 2))
    assert weights.digest(one) == weights.digest(again) != weights.digest(other)


def test_a_norm_has_a_scale_a_shift_and_running_statistics() -> None:
    layers = layer_spec.parse_layers("conv 4 3 norm, dense 5", 1, 8, 2)
    parts = ("weight", "bias", "running_mean", "running_var")
    names = {f"conv1.norm.{part}" for part in parts}
    first = layer_spec.init(layers, random_state("norm"))
    assert names | {"conv1.weight"} == {name for name in first if name.startswith("conv1")}
    assert {name: first[name].tolist() for name in names} == {
        "conv1.norm.weight": [1] * 4,
        "conv1.norm.bias": [0] * 4,
        "conv1.norm.running_mean": [0] * 4,
        "conv1.norm.running_var": [1] * 4,
    }


def test_no_variance_is_below_zero_in_keras() -> None:
    layers = layer_spec.parse_layers("dense 5 norm", 1, 8, 2)
    first = layer_spec.init(layers, random_state("norm"))
    there = layer_spec.to_keras(layers, {**first, "dense1.norm.running_var": np.full(5, -0.5)})
    assert there[4].tolist() == [0] * 5
