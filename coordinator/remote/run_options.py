"""Builds the request for a run from the options of the command line or the monitor's form."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from coordinator.api.schema import StartRunRequest
from coordinator.runs import options, run_length
from coordinator.runs.options import Option
from coordinator.storage.run_events import RunSpec
from coordinator.strategies import svd, trees
from protocols.codecs import factors, registry
from protocols.errors import BadMessage, UnknownName, UsageError
from protocols.local import homes
from protocols.local.durations import parse_seconds
from protocols.local.flower_apps import parse_value
from protocols.local.os_errors import os_errors_as
from protocols.model import built_in_settings
from protocols.privacy.secagg.cohort import MIN_COHORT, threshold
from protocols.tables import preprocessing
from protocols.tables.model_scores import AUTO
from protocols.tables.preprocessing import Feature, Preprocessing, Target

#: The upper bound of automatic deadlines.
_MAX_AUTO_DEADLINE_S = 600.0
_LORA = built_in_settings.BY_TASK["lora"]
_EXAMPLE = "docs/privacy.md has an example"


def build_order(typed: Mapping[str, Any]) -> StartRunRequest:
    """The request for options by their names in the table; others have their defaults.

    Raises UsageError and its kin.
    """
    values = {one.name: one.default for one in options.OPTIONS} | dict(typed)
    if values["flower"]:
        from coordinator.remote import app_order

        return app_order.build(typed)
    if not values["task"]:
        raise UsageError("name one task", "commonweight run start mnist")
    column, goal = split_target(values["target"])
    if goal and values["until"]:
        raise UsageError(f"--until {values['until']} and --target {goal}: leave one out")
    reached, metric = _parse_goal(values["until"] or goal)
    if metric and values["best-metric"] not in ("", metric):
        raise UsageError(
            f"--until {metric} and --best-metric {values['best-metric']} name two metrics",
            "use the same metric for both, or leave out --best-metric",
        )
    if values["preprocessing"]:
        column, values["features"], text = _read_preprocessing(
            values["preprocessing"], values["task"], column, values["features"]
        )
        values["set"] = (*values["set"], f"preprocessing={text}")
    table = {"target": column, "kind": values["kind"], "features": values["features"]}
    is_auto = values["deadline"] == "auto"
    registry.parse(values["codec"])
    fields = {one.field: values[one.name] for one in options.OPTIONS if one.is_plain}
    fields["rounds"] = values["rounds"]
    if values["secure"]:
        fields |= _secure_fields(fields)
    settings = _settings(values["set"]) | {key: text for key, text in table.items() if text}
    if values["task"] == "lora":
        # Agents take runs without it for those of versions that averaged A and B.
        settings = {"aggregation": _LORA["aggregation"].default} | settings
        fields |= _adapter_fields(fields, settings)
    if values["task"] == "tabular" and not values["from"]:
        settings.setdefault("model", AUTO)
    if (values["task"], settings.get("model")) == ("tabular", trees.NAME):
        fields |= _tree_fields(fields, settings)
    fields |= {
        "task": _task_name(values["task"]),
        "deadline_s": _MAX_AUTO_DEADLINE_S if is_auto else parse_seconds(values["deadline"]),
        "deadline": "auto" if is_auto else "fixed",
        "select": _times(values["select"]) if values["select"] else 0.0,
        "strategy_args": _settings(values["strategy-arg"]),
        "settings": settings,
        "best_metric": values["best-metric"] or metric,
        "ties": "standard error" if values["task"] == "tabular" and reached is None else "exact",
        "target": reached,
    }
    spec = run_length.with_length(RunSpec(**fields, handshake=True))
    options.check(spec)
    return StartRunRequest(
        spec=spec, from_digest=_import_weights(values["from"]) if values["from"] else ""
    )


def from_keywords(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Options by their names in the table, from keywords of Python such as `clip_norm=1.0`.

    `from_` is `--from`. Options that may be repeated take a mapping or a list. Raises UnknownName,
    UsageError.
    """
    by_keyword = {option.keyword: option for option in options.OPTIONS}
    typed = {}
    for name, value in keywords.items():
        if name not in by_keyword:
            near = difflib.get_close_matches(name, by_keyword, 1)
            raise UnknownName(
                f"there is no option {name!r}" + (f"; did you mean {near[0]}?" if near else ""),
                "commonweight run start --help-all lists them, with - in place of _",
            )
        typed[by_keyword[name].name] = _value_of(by_keyword[name], value)
    return typed


def _value_of(option: Option, value: Any) -> Any:
    """The value as the command line would give it. Raises UsageError."""
    if option.repeatable:
        if isinstance(value, Mapping):
            return [f"{key}={_as_text(one)}" for key, one in value.items()]
        return [value] if isinstance(value, str) else list(value)
    if option.kind in (str, Path):
        if isinstance(value, list | tuple):  # names of columns
            value = ",".join(map(str, value))
        if isinstance(value, bool) or not isinstance(value, str | Path | Real):
            raise UsageError(f"--{option.name} must be text, not {value!r}")
        return option.kind(str(value))
    if isinstance(value, str):
        return option.parse(value)
    is_bool = isinstance(value, bool)
    wanted = {bool: is_bool, int: isinstance(value, Integral), float: isinstance(value, Real)}
    if not wanted[option.kind] or is_bool is not (option.kind is bool):
        raise option.wrong_kind(value)
    return option.kind(value)


def _as_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _secure_fields(fields: Mapping[str, Any]) -> dict[str, float]:
    """The defaults of a secure run.

    Its clipping norm is the range of its integers, and it cannot compare single updates. With
    noise, its peers share it, and clip nothing afterwards.
    """
    is_default = fields["outlier_limit"] == options.OUTLIER_LIMIT
    shared = fields["dp_shared"]
    if not shared and fields["dp_epsilon"]:
        can_share = not fields["dp_user_epsilon"] and fields["quorum"] >= MIN_COHORT
        shared = threshold(fields["quorum"]) if can_share else 1
    clips = 0.0 if shared > 1 else options.SECURE_CLIP_NORM
    return {
        "outlier_limit": 0.0 if is_default else fields["outlier_limit"],
        "clip_norm": fields["clip_norm"] or clips,
        "dp_shared": shared,
    }


def _tree_fields(
    fields: Mapping[str, Any], settings: Mapping[str, str | int | float | bool]
) -> dict[str, Any]:
    """The defaults of a run of trees. A round is a level of a tree.

    Raises UsageError.
    """
    levels, every = run_length.tree_rounds(settings)
    defaults = {one.field: one.default for one in options.OPTIONS}
    chosen = {"strategy": trees.NAME, "codec": registry.SUMS, "outlier_limit": 0.0}
    for name, value in chosen.items():
        if fields[name] not in (defaults[name], value):
            raise run_length.not_with_trees(name)
    ends_by_itself = not (fields["rounds"] or fields["patience"])
    return chosen | {
        "rounds": fields["rounds"] or levels,
        "patience": run_length.tree_patience(every) if ends_by_itself else fields["patience"],
        "evaluate_every": every,
    }


def _adapter_fields(
    fields: Mapping[str, Any], settings: Mapping[str, str | int | float | bool]
) -> dict[str, str]:
    """The codec and strategy of a run whose adapters are multiplied. Raises UsageError."""
    way = settings["aggregation"]
    if way not in ("stack", svd.NAME):
        return {}
    chosen = {"codec": f"{registry.FACTORS}:{_largest_rank(settings)}"}
    if way == svd.NAME:
        chosen["strategy"] = svd.NAME
    defaults = {one.field: one.default for one in options.OPTIONS}
    for name, value in chosen.items():
        if fields[name] not in (defaults[name], value):
            raise UsageError(
                f"--{name} cannot be used with aggregation={way}, whose updates are factors",
                "leave it out, or --set aggregation=ffa",
            )
    return chosen


def _largest_rank(settings: Mapping[str, str | int | float | bool]) -> int:
    """Of a run's adapters; of `rank=auto` that of the largest machines. Raises UsageError."""
    rank = settings.get("rank", _LORA["rank"].default)
    if rank in ("auto", 0):
        return factors.AUTO_RANK
    if type(rank) is not int or not 0 < rank <= factors.MAX_RANK:
        raise UsageError(
            f"the rank must be a whole number from 1 to {factors.MAX_RANK}, not {rank!r}",
            "--set rank=8, or rank=auto",
        )
    return rank


def _settings(texts: Iterable[str]) -> dict[str, str | int | float | bool]:
    return dict(parse_setting(text) for text in texts)


def parse_setting(text: str) -> tuple[str, str | int | float | bool]:
    """Parse `key=value`; the value may be a number, true or false. Raises UsageError."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"{text!r} is not key=value", "for example lr=0.1")
    return key, parse_value(value)


def split_target(texts: str | Iterable[str]) -> tuple[str, str]:
    """The column to predict, and what is now `--until`, or "". Raises UsageError.

    In older versions `--target 0.9` and `--target macro_f1=0.9` were values of a metric.
    """
    column = goal = ""
    for text in [texts] if isinstance(texts, str) else texts:
        if _is_number(text.rpartition("=")[2]):
            goal = text
        elif column and text:
            raise UsageError(f"one run cannot predict both {column} and {text}", "start two runs")
        else:
            column = text
    return column, goal


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse_goal(text: str) -> tuple[float | None, str]:
    """The value of the metric to reach, and its name. Raises UsageError."""
    metric, _, value = text.rpartition("=")
    if not text:
        return None, ""
    if not _is_number(value):
        raise UsageError(f"--until takes METRIC=NUMBER, not {text!r}", "--until accuracy=0.9")
    return float(value), metric


def _task_name(text: str) -> str:
    """The name of a task. For a file it has no folder, as each agent has a copy of its own."""
    path, colon, attribute = text.rpartition(":")
    if not (colon and path.endswith(".py")) and ("/" in text or text.endswith(".py")):
        raise UsageError(f"{text!r} is not a task", "write file and class: ./my_task.py:MyTask")
    return f"{Path(path).name}:{attribute}" if colon and path.endswith(".py") else text


def _times(text: str) -> float:
    """Parse `1.2x` or `1.2`. Raises UsageError."""
    try:
        return float(text.removesuffix("x"))
    except ValueError as err:
        raise UsageError(f"{text!r} is not a factor", "write 1.2x") from err


def _read_preprocessing(path: Path, task: str, column: str, features: str) -> tuple[str, str, str]:
    """The target, the features and the encoded text of a preprocessing in a file (JSON).

    Raises UsageError.
    """
    if task != "tabular" or features:
        raise UsageError(
            "--preprocessing is for the task tabular, and names the features",
            "leave out --features" if features else "leave it out",
        )
    problem = f"cannot use {path} as preprocessing"
    try:
        with os_errors_as(UsageError, problem, _EXAMPLE):
            text = Path(path).read_text(encoding="utf-8")
        made, unknown = preprocessing.decode(text), _unknown_keys(json.loads(text))
    except (ValueError, BadMessage) as err:
        raise UsageError(f"{problem}: {err}", _EXAMPLE) from err
    if unknown:
        raise UsageError(f"{path} has unknown names: {', '.join(unknown)}", _EXAMPLE)
    preprocessing.check(made)
    names = ",".join(feature.name for feature in made.features)
    return column or made.target.name, names, preprocessing.encode(made)


def _unknown_keys(raw: Any) -> list[str]:
    """The keys of a preprocessing's JSON that mean nothing."""
    parts = [
        (raw, Preprocessing),
        (raw["target"], Target),
        *((f, Feature) for f in raw["features"]),
    ]
    return sorted(
        {key for part, kind in parts for key in part.keys() - set(kind.__struct_fields__)}
    )


def _import_weights(path: Path) -> str:
    """Save a safetensors file as a version of the home; return its digest.

    Raises UsageError, NotRunning.
    """
    from coordinator.remote import access
    from coordinator.storage.weight_store import WeightStore
    from protocols.errors import BadWeights
    from protocols.model import foreign_weights

    try:
        model = foreign_weights.load(path)
    except (OSError, BadWeights) as err:
        raise UsageError(f"cannot use {path} as first weights: {err}") from err
    home = homes.open_home("coordinator")
    access.connection_info(home)  # without a running coordinator no run would own the version
    return WeightStore(home).save(model)
