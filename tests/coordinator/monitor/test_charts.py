"""Curves and stacks of characters: positions of the dots, and extreme values."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coordinator.monitor.charts import band, bar_width, curve, resample, stack
from coordinator.remote.formatting import Scale, fit_scale

finite = st.floats(allow_nan=False, allow_infinity=False)
counts = st.floats(0, 1e300)
sides = (st.integers(1, 30), st.integers(1, 8))


def test_a_curve_spans_the_pane() -> None:
    assert curve([0, 1], 2, 1, Scale(0, 1)) == ["⣠⠞"]
    assert curve([1, 1], 3, 2, Scale(0, 1)) == ["⠛⠛⠛", "   "]


def test_a_dotted_curve_has_fewer_dots_and_no_marks() -> None:
    assert curve([0, 1], 2, 1, Scale(0, 1), dotted=True) == ["⡀⠂"]
    assert curve([1, None], 2, 1, Scale(0, 1), dotted=True) == ["⠁ "]


def test_a_missing_value_is_marked() -> None:
    drawn = curve([2, None, 1], 5, 2, Scale(1, 2))
    assert drawn[-1][2] == "✕"
    assert curve([None], 3, 1, Scale(0, 0)) == ["✕  "]


def test_resampling_interpolates_or_averages() -> None:
    assert resample([0, 4], 5) == [0, 1, 2, 3, 4]
    assert resample([0, 0, 4, 4], 2) == [0, 4]
    assert resample([7], 3) == [7, 7, 7]
    assert resample([1, None, 3], 5) == [1, None, None, 3, 3]


def test_a_band_covers_the_range() -> None:
    inside = band([0, 0], [0.4, 1], 2, 2, Scale(0, 1))
    assert inside == [[False, True], [True, True]]


def test_a_stack_has_ordered_parts_and_spaced_bars() -> None:
    lines = stack([[1, 1], [1, 3]], 6, 4, 4)
    assert ["".join(block.char for block in line) for line in lines] == [
        "   ██ ",
        "   ██ ",
        "██ ██ ",
        "██ ██ ",
    ]
    assert [lines[row][0].part for row in (3, 2)] == [0, 1]
    assert [lines[row][3].part for row in range(4)] == [1, 1, 1, 0]


def test_a_positive_value_is_always_visible() -> None:
    assert stack([[1, 1000]], 2, 1, 1000)[0][0].char == "▁"
    assert stack([[0, 1000]], 2, 1, 1000)[0][0].char == " "


@given(st.lists(st.none() | finite, max_size=80), *sides)
def test_no_value_breaks_a_curve(values: list[float | None], width: int, height: int) -> None:
    scale = fit_scale(values)
    assert (scale is None) == all(value is None for value in values)
    if scale is not None:
        lines = curve(values, width, height, scale)
        assert [len(line) for line in lines] == [width] * height
        assert any(sign not in " ✕" for line in lines for sign in line) or None in values
        assert len(band(values, values, width, height, scale)) == height


@given(st.lists(st.tuples(counts, counts), max_size=80), *sides)
def test_no_value_breaks_a_stack(bars: list[tuple[float, float]], width: int, height: int) -> None:
    parts = [[one for one, _ in bars], [other for _, other in bars]]
    high = max((one + other for one, other in bars), default=0.0)
    lines = stack(parts, width, height, high)
    assert [len(line) for line in lines] == [width] * height
    used = min(bar_width(len(bars), width) * len(bars), width)
    assert all(block.char == " " for line in lines for block in line[used:])
