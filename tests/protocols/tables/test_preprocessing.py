"""From the peers' statistics follows one preprocessing; who does not fit is named by column."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import Any

import pytest

from protocols.errors import BadMessage, CommonweightError, UsageError
from protocols.tables import mismatches, preprocessing
from protocols.tables.preprocessing import Derived, derive
from protocols.tables.statistics import ColumnStatistics, Moments, TableStatistics

LABEL = ColumnStatistics(kind="text", categories={"no": 50, "yes": 50})


def number(mean: float = 0.0, **changed: Any) -> ColumnStatistics:
    return ColumnStatistics(kind="number", moments=Moments(100, mean, 400.0), **changed)


def table(**columns: ColumnStatistics) -> TableStatistics:
    return TableStatistics(rows=100, columns={"label": LABEL, **columns})


def derived(*tables: TableStatistics, **settings: Any) -> Derived:
    return derive(dict(zip("abcdefgh", tables, strict=False)), {"target": "label"} | settings)


def test_numbers_are_scaled_by_all_peers_together() -> None:
    made = derived(table(x=number(0.0)), table(x=number(2.0, missing=3)))
    (x,) = made.preprocessing.features
    # 200 values with mean 1; the squares are 2·400 within and 200·1 between the peers.
    assert (x.mean, x.scale, x.missing) == (1.0, 5**0.5, True)
    assert made.preprocessing.target.classes == ("no", "yes")
    assert made.incompatible == {}
    text = preprocessing.encode(made.preprocessing)
    assert preprocessing.decode(text) == made.preprocessing
    assert len(preprocessing.digest(text)) == 64


def test_a_column_that_only_misfits_have_is_no_feature() -> None:
    without_target = TableStatistics(rows=100, columns={"x": number(), "extra": number()})
    other_kind = TableStatistics(
        rows=100, columns={"x": number(), "extra": number(), "label": number(1.0)}
    )
    for misfit in (without_target, other_kind):
        made = derived(table(x=number()), misfit)
        assert [feature.name for feature in made.preprocessing.features] == ["x"]
        assert list(made.incompatible) == ["b"]


def test_a_constant_column_is_not_divided_by_nothing() -> None:
    constant = ColumnStatistics(kind="number", moments=Moments(100, 7.0, 0.0))
    assert derived(table(x=constant)).preprocessing.features[0].scale == 1.0


def test_least_and_most_scale_where_they_are_told() -> None:
    told = [table(x=number(extremes=(least, 4.0))) for least in (-2.0, 0.0)]
    (x,) = derived(*told, scaling="minmax").preprocessing.features
    assert (x.mean, x.scale) == (-2.0, 6.0)
    with pytest.raises(CommonweightError, match="minimum and maximum of column x"):
        derived(table(x=number()), scaling="minmax")


def test_categories_are_those_of_all_peers_in_one_order() -> None:
    made = derived(
        table(city=ColumnStatistics(kind="text", categories={"b": 9, "a": 5})),
        table(city=ColumnStatistics(kind="text", categories={"c": 9}, others=4)),
    )
    assert made.preprocessing.features[0].categories == ("a", "b", "c")


def test_a_column_of_few_is_left_out_and_one_of_most_is_missing_elsewhere() -> None:
    made = derived(table(x=number(), y=number()), table(x=number()), table(x=number(), z=number()))
    assert [feature.name for feature in made.preprocessing.features] == ["x"]
    assert made.notes == [
        ("", "column y is left out: 1 of 3 peers have it"),
        ("", "column z is left out: 1 of 3 peers have it"),
    ]
    made = derived(table(x=number(), y=number()), table(x=number()))
    assert [(f.name, f.missing) for f in made.preprocessing.features] == [("x", False), ("y", True)]
    assert made.notes == [("b", "column y is absent and counts as missing")]


def test_a_peer_without_a_column_that_was_asked_for_is_named() -> None:
    made = derived(table(x=number(), y=number()), table(x=number()), features="y,x")
    assert {p: err.message for p, err in made.incompatible.items()} == {
        "b": "column y: expected the feature, found no such column"
    }
    without = TableStatistics(rows=9, columns={"x": number()})
    made = derived(table(x=number()), without)
    assert "column label: expected the target" in made.incompatible["b"].message
    with pytest.raises(CommonweightError, match="no peer has a column 'price'; columns: label, x"):
        derived(table(x=number()), target="price")


def test_the_kind_of_most_peers_holds() -> None:
    text = ColumnStatistics(kind="text", categories={"12 kg": 9})
    empty = ColumnStatistics(kind="empty", missing=100)
    truth = ColumnStatistics(kind="boolean", moments=Moments(100, 0.5, 25))
    made = derived(table(x=number()), table(x=text), table(x=empty), table(x=number()))
    assert made.incompatible["b"].message == "column x: expected number, found text"
    assert set(made.incompatible) == {"b"}
    made = derived(table(x=truth), table(x=number()))
    assert made.incompatible == {}
    assert made.preprocessing.features[0].kind == "number"
    assert derived(table(x=truth)).preprocessing.features[0].kind == "boolean"


def test_all_that_does_not_fit_is_named_at_once_with_what_to_write() -> None:
    comma = ColumnStatistics(kind="text", many=True, written="comma")
    local = ColumnStatistics(kind="text", others=9, written="local date")
    date = ColumnStatistics(kind="date", moments=Moments(9, 1.0, 2.0))
    made = derived(table(x=number(), day=date), table(x=comma, day=local))
    assert made.incompatible["b"].message == (
        "column day: expected date, found text like 31.3.2024 (write 2024-03-31); "
        "column x: expected number, found text like 1.234,5 (write 1234.5)"
    )
    # Where no peer has numbers, the operator hears why the column is of no use.
    made = derived(table(x=comma, z=number()), table(x=comma, z=number()))
    assert made.notes == [
        ("", "column x is left out: text like 1.234,5 (write 1234.5)"),
    ]  # fmt: skip
    wide = {f"column{n}": number() for n in range(40)}
    texts = {name: ColumnStatistics(kind="text", others=9) for name in wide}
    told = derived(table(**wide), table(**wide), table(**texts)).incompatible["c"].message
    assert len(told) < 260
    assert "; and 3" in told, "a refusal has room for some of them"


def test_a_column_of_another_spelling_is_named() -> None:
    made = derived(table(age=number()), table(Age=number()), features="age")
    assert made.incompatible["b"].message == (
        "column age: expected the feature, found a similar one: Age"
    )
    made = derived(table(age=number(), x=number()), table(Age=number(), x=number()))
    assert ("b", "column age is absent and counts as missing; the table has Age") in made.notes


def test_a_table_without_any_feature_of_the_others_is_refused() -> None:
    made = derived(
        table(age=number(), x=number()), table(age=number(), x=number()), table(Age=number())
    )
    assert {peer: err.message for peer, err in made.incompatible.items()} == {
        "c": "features: expected some of age, x, found none of them (similar: Age)"
    }
    assert [feature.name for feature in made.preprocessing.features] == ["age", "x"]
    with pytest.raises(CommonweightError, match="expected some of b, found none of them"):
        derived(table(a=number()), table(b=number()))
    assert derived(table(a=number())).incompatible == {}, "one peer alone has its own"


def test_a_table_with_few_of_the_features_is_warned() -> None:
    three = {name: number() for name in "xyz"}
    made = derived(table(**three), table(**three), table(x=number()))
    assert made.incompatible == {}
    assert made.notes == [
        ("c", "has 1 of 3 features: columns y, z are absent and count as missing")
    ]  # fmt: skip


def test_columns_that_can_be_no_features_are_left_out() -> None:
    names = ColumnStatistics(kind="text", others=100, many=True)
    rare = ColumnStatistics(kind="text", others=100)
    empty = ColumnStatistics(kind="empty", missing=100)
    made = derived(table(a=names, b=rare, c=empty, x=number()))
    assert [feature.name for feature in made.preprocessing.features] == ["x"]
    assert [words.split(":")[0] for _, words in made.notes] == [
        "column a is left out",
        "column b is left out",
        "column c is left out",
    ]
    with pytest.raises(CommonweightError, match="no column is left"):
        derived(table(a=names))


@pytest.mark.parametrize(
    ("target", "kind", "expected"),
    [
        (number(whole=True, categories={"0": 50, "1": 50}), "auto", ("0", "1")),
        (number(whole=True, many=True), "auto", ()),
        (number(), "auto", ()),
        (number(whole=True, categories={"0": 50, "1": 50}), "regression", ()),
        (ColumnStatistics(kind="boolean", categories={"0": 9, "1": 9}), "auto", ("0", "1")),
        (ColumnStatistics(kind="date", moments=Moments(9, 1.0, 2.0)), "auto", ()),
    ],
)
def test_the_target_says_what_is_learnt(
    target: ColumnStatistics, kind: str, expected: tuple[str, ...]
) -> None:
    made = derived(table(x=number(), y=target), target="y", kind=kind, features="x")
    assert made.preprocessing.target.classes == expected


@pytest.mark.parametrize(
    ("target", "kind", "words"),
    [
        (ColumnStatistics(kind="text", categories={"yes": 99}), "auto", "one class, 'yes'"),
        (ColumnStatistics(kind="text", others=9), "auto", "no class that is common enough"),
        (ColumnStatistics(kind="empty", missing=9), "auto", "no values at any peer"),
        (ColumnStatistics(kind="text", many=True), "auto", "too many different values"),
        (number(), "classification", "cannot be classes: it has numbers"),
        (LABEL, "regression", "has text and cannot be a number"),
        (ColumnStatistics(kind="number", moments=Moments(9, 7.0, 0.0)), "auto", "7 in every row"),
    ],
)
def test_a_target_that_cannot_be_learnt(target: ColumnStatistics, kind: str, words: str) -> None:
    with pytest.raises(CommonweightError, match=words):
        derived(table(x=number(), y=target), target="y", kind=kind, features="x")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"target": "x", "kind": "guess"},
        {"target": "x", "scaling": "log"},
        {"target": "x", "features": "a,x"},
    ],
)
def test_settings_that_cannot_be(settings: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        preprocessing.parse_settings(settings)


def test_what_is_no_preprocessing() -> None:
    for text in ("", "{}", "[]", '{"version":2}', "\ud800"):
        with pytest.raises(BadMessage):
            preprocessing.decode(text)


def test_similar_names_are_searched_in_a_few_columns_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer chooses the names and how many; to compare all with all would stop the coordinator."""
    compared: list[int] = []

    def count(name: str, there: Collection[str], most: int) -> list[str]:
        compared.append(len(there))
        return get_close_matches(name, there, most)

    monkeypatch.setattr(mismatches, "get_close_matches", count)
    usual = table(age=number(), **{f"first_{n}": number() for n in range(40)})
    wide = {f"fisrt_{n}": number() for n in range(700)}
    others = table(age=number(), **wide), table(**wide), table(**{"f" * 99: number()})
    made = derived(usual, usual, usual, usual, *others)
    (note,) = (text for peer, text in made.notes if peer == "e")
    assert "the table has fisrt_" in note
    assert list(made.incompatible) == ["f", "g"]
    assert max(compared) == 500
    assert len(compared) <= 6 * len(others)
    compared.clear()
    made = derived(
        usual, *others, features=",".join(name for name in usual.columns if name[0] == "f")
    )
    assert set(made.incompatible) == {"b", "c", "d"}
    assert max(compared) == 500
    assert len(compared) <= 6 * len(others)


def test_a_peers_many_columns_make_few_notes() -> None:
    usual, wide = table(age=number()), {f"own_{n}": number() for n in range(100)}
    notes = [text for _, text in derived(usual, usual, table(age=number(), **wide)).notes]
    assert len(notes) == 21
    assert notes[0] == "column own_0 is left out: 1 of 3 peers have it"
    assert notes[-1] == "80 more columns are left out: less than half of the peers have them"


def test_weights_of_classes_come_from_all_peers_together() -> None:
    """A peer with many cases and one with few get the same weights: n / (k · n_c)."""
    few = ColumnStatistics(kind="text", categories={"no": 980, "yes": 20})
    many = ColumnStatistics(kind="text", categories={"no": 20, "yes": 80})
    tables = [
        TableStatistics(rows=100, columns={"label": one, "x": number()}) for one in (few, many)
    ]
    target = derived(*tables, class_weights="balanced").preprocessing.target
    assert target.weights == (0.55, 5.5)
    assert 1100 <= target.weight_sum < 2200
    assert derived(*tables).preprocessing.target.weights == ()


def test_a_rare_class_is_told_with_the_setting_that_helps() -> None:
    rare = ColumnStatistics(kind="text", categories={"no": 970, "yes": 30})
    table = TableStatistics(rows=1000, columns={"label": rare, "x": number()})
    notes = [text for _, text in derived(table, table).notes]
    assert notes == [
        "the class 'yes' has 3.0% of the rows: "
        "--set class_weights=balanced gives all classes one weight"
    ]
    assert derived(table, table, class_weights="balanced").notes == []


def test_weights_need_classes() -> None:
    numeric = TableStatistics(rows=100, columns={"label": number(), "x": number()})
    with pytest.raises(UsageError, match="is a number"):
        derived(numeric, class_weights="balanced")
    with pytest.raises(UsageError, match="none or balanced"):
        derived(numeric, class_weights="even")
