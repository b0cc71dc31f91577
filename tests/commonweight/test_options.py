"""The options of `fleet.train` are those of `commonweight run start`: names, checks, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.remote.run_options import build_order, from_keywords
from coordinator.runs.options import OPTIONS
from protocols.errors import UnknownName, UsageError


def order(**keywords: Any) -> Any:
    return build_order(from_keywords({"task": "mnist", **keywords})).spec


def test_every_option_of_the_table_has_a_keyword() -> None:
    given = {o.keyword: o.default for o in OPTIONS if o.default not in (None, ())}
    assert from_keywords(given) == {o.name: o.default for o in OPTIONS if o.keyword in given}
    assert {o.keyword for o in OPTIONS} >= {"clip_norm", "from_", "set", "dp_user", "until"}


def test_values_of_python_are_those_of_the_command_line() -> None:
    spec = order(
        rounds=np.int64(3),
        clip_norm=1,
        deadline=90,
        secure=False,
        set={"lr": 0.1, "batch_size": 8, "nesterov": True, "model": "mlp"},
        strategy="fedprox",
        strategy_arg={"proximal_mu": 0.5},
        features=["age", "sex"],
        target="outcome",
        until="accuracy=0.9",
    )
    assert (spec.rounds, spec.clip_norm, spec.deadline_s, spec.target) == (3, 1.0, 90.0, 0.9)
    assert spec.settings == {
        "lr": 0.1,
        "batch_size": 8,
        "nesterov": True,
        "model": "mlp",
        "target": "outcome",
        "features": "age,sex",
    }
    assert spec.strategy_args == {"proximal_mu": 0.5}
    assert order(set="lr=0.1").settings == order(set=["lr=0.1"]).settings == {"lr": 0.1}
    assert from_keywords({"from_": "a.safetensors"}) == {"from": Path("a.safetensors")}
    assert order(rounds="7").rounds == 7


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rounds": 2.5}, "--rounds must be a whole number, not 2.5"),
        ({"rounds": True}, "--rounds must be a whole number, not True"),
        ({"rounds": "many"}, "--rounds must be a whole number, not 'many'"),
        ({"rounds": -1}, "--rounds must be 0 or more, not -1"),
        ({"clip_norm": None}, "--clip-norm must be a number, not None"),
        ({"secure": 1}, "--secure must be yes or no, not 1"),
        ({"codec": True}, "--codec must be text, not True"),
        ({"strategy": {"a": 1}}, "--strategy must be text"),
        ({"set": ["lr"]}, "'lr' is not key=value"),
        ({"deadline": "soon"}, "'soon' is not a duration"),
        ({"until": "0.9", "target": 0.9}, "leave one out"),
    ],
)
def test_a_wrong_value_is_the_error_of_the_command(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError) as caught:
        order(**given)
    assert words in caught.value.message


def test_an_unknown_option_has_a_suggestion() -> None:
    with pytest.raises(UnknownName, match=r"no option 'roundz'; did you mean rounds\?") as caught:
        order(roundz=3)
    assert "--help-all" in caught.value.hint
    with pytest.raises(UnknownName, match=r"no option 'xyz'$"):
        order(xyz=3)
