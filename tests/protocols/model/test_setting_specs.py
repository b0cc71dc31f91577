"""What peers tell of a task's settings: it checks values, and hostile words do not decode."""

from __future__ import annotations

import math

import msgspec
import pytest

from protocols.errors import BadMessage, UnknownName, UsageError
from protocols.model import schema_card, setting_specs
from protocols.model.setting_specs import SettingSpec, Value

KNOWN = {
    "width": SettingSpec(default=32, ge=1, le=64, help="units of the hidden layer"),
    "rate": SettingSpec(default=0.5, gt=0, lt=1),
    "kind": SettingSpec(default="relu", choices=("relu", "tanh")),
    "deep": SettingSpec(default=False),
    "batch_size": SettingSpec(default=10, ge=0),
}


@pytest.mark.parametrize(
    "given",
    [
        {"width": 1, "rate": 0.1, "kind": "tanh", "deep": True},
        {"width": "64", "rate": "0.9", "deep": "true"},
        {"batch_size": "all", "seed": 3, "preprocessing": "{}"},
    ],
)
def test_values_within_the_bounds_pass(given: dict[str, Value]) -> None:
    setting_specs.check(given, KNOWN)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"width": 0}, "at least 1, at most 64, such as width=32"),
        ({"width": "65"}, "at most 64"),
        ({"width": 2.5}, "such as width=32"),
        ({"width": True}, "such as width=32"),
        ({"rate": 0}, "above 0, below 1"),
        ({"rate": 1.0}, "above 0, below 1"),
        ({"rate": math.nan}, "above 0, below 1"),
        ({"kind": "gelu"}, "one of relu, tanh"),
        ({"deep": "perhaps"}, "such as deep=False"),
    ],
)
def test_other_values_are_refused_with_what_is_allowed(given: dict[str, Value], words: str) -> None:
    with pytest.raises(UsageError) as raised:
        setting_specs.check(given, KNOWN)
    assert words in str(raised.value.hint)
    assert f"the setting {next(iter(given))} cannot be" in raised.value.message


def test_a_setting_that_is_not_there_is_named_with_those_that_are() -> None:
    with pytest.raises(UnknownName, match="no setting 'wdith'") as raised:
        setting_specs.check({"wdith": 3}, KNOWN)
    assert raised.value.hint == "its settings: batch_size, deep, kind, rate, width"


def test_all_settings_can_be_listed() -> None:
    assert list(setting_specs.explain(KNOWN)) == [
        ("batch_size=10", "at least 0", ""),
        ("deep=false", "true or false", ""),
        ("kind=relu", "one of relu, tanh", ""),
        ("rate=0.5", "above 0, below 1", ""),
        ("width=32", "at least 1, at most 64", "units of the hidden layer"),
    ]


@pytest.mark.attack("wire", by="peer")
@pytest.mark.parametrize(
    "settings",
    [
        {f"s{n}": {"default": 1} for n in range(257)},
        {"s": {"default": "x" * 401}},
        {"s": {"default": 1, "help": "\x1b[2J"}},
        {"s\n": {"default": 1}},
        {"s": {"default": "a", "choices": ["a"] * 65}},
        {"s": {"default": [1]}},
        {"s": {"default": 1, "ge": "1"}},
        {"s": {}},
    ],
    ids=["many", "long", "escape codes", "name", "choices", "list", "bound", "no default"],
)
def test_settings_of_a_hostile_peer_do_not_decode(settings: object) -> None:
    """Attack: a description with settings that are too many, too long, or no settings."""
    card = {"type": "schema", "task": "t", "tensors": {}, "settings": settings}
    with pytest.raises(BadMessage):
        schema_card.decode(msgspec.json.encode(card))


@pytest.mark.attack("wire", by="peer")
def test_the_settings_that_most_peers_tell_count() -> None:
    """Attack: the first peer tells bounds that no value fits, so that no run could start."""
    made = [
        schema_card.make_card("t", "1", {}, settings={"width": SettingSpec(default=1, le=limit)})
        for limit in (-9.0, 64.0, 64.0)
    ]
    agreed = schema_card.most_common(dict(zip("abc", made, strict=True)))
    assert agreed.settings["width"].le == 64.0
    assert schema_card.first_difference(made[0], agreed) is None
