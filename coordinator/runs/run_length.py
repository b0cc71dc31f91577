"""How many rounds a run has by default. Pure.

A run whose peers evaluate each version ends when none has been better for a while. Its number of
rounds is then only a limit.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec.structs import replace

from coordinator.runs import best_version, options
from coordinator.storage.run_events import RunSpec
from coordinator.strategies import trees
from protocols.codecs import registry
from protocols.errors import UsageError
from protocols.model import built_in_settings

#: Limits of a run without `--rounds`: all rounds, and rounds without a better version.
MAX_ROUNDS, PATIENCE = 100, 10
#: The rounds of runs that do not end by themselves.
ROUNDS = 10
#: The approximate number of evaluations of a run of trees, and how many may bring no better
#: version.
_EVALUATIONS, _TREE_PATIENCE = 30, 4
_TABULAR = built_in_settings.BY_TASK["tabular"]


def with_length(spec: RunSpec) -> RunSpec:
    """The settings with rounds and patience in place of 0 rounds; others are as they are."""
    if spec.rounds:
        return spec
    # Only peers know which metrics a user's own task has.
    measures = spec.measures and bool(best_version.TASK_METRICS.get(spec.task))
    if not (measures or spec.patience):
        return replace(spec, rounds=ROUNDS)
    return replace(spec, rounds=MAX_ROUNDS, patience=spec.patience or PATIENCE)


def with_trees(spec: RunSpec) -> RunSpec:
    """The settings of a run that grows trees, in place of what it would train otherwise.

    A round is a level, so a number of rounds or a patience for other models is not one for trees.
    Raises UsageError for options that trees do not have.
    """
    for name, default in (("strategy", "fedavg"), ("codec", "fp32"), ("strategy_args", {})):
        if getattr(spec, name) != default:
            raise not_with_trees(name)
    if spec.outlier_limit not in (0, options.OUTLIER_LIMIT):
        raise not_with_trees("outlier_limit")
    levels, every = tree_rounds(spec.settings)
    if spec.rounds < levels and not (spec.rounds == MAX_ROUNDS and spec.patience):
        raise UsageError(
            f"they need {levels} rounds, and --rounds is {spec.rounds}", "leave it out"
        )
    return replace(
        spec,
        strategy=trees.NAME,
        codec=registry.SUMS,
        outlier_limit=0.0,
        rounds=levels,
        evaluate_every=every,
        patience=max(spec.patience, tree_patience(every)) if spec.patience else 0,
    )


def tree_patience(every: int) -> int:
    """The rounds without better trees, of a run that evaluates each `every` rounds."""
    return _TREE_PATIENCE * every


def tree_rounds(settings: Mapping[str, str | int | float | bool]) -> tuple[int, int]:
    """The rounds that trees need, and how many of them are between two evaluations, after whole
    trees. Raises UsageError."""
    given = [settings.get(name, _TABULAR[name].default) for name in ("trees", "depth")]
    if not all(isinstance(number, int) and 0 < number < 10**6 for number in given):
        raise UsageError("trees and depth must be whole numbers above 0", "--set trees=300")
    count, depth = (int(number) for number in given)
    return 1 + count * depth, depth * max(1, count // _EVALUATIONS)


def not_with_trees(name: str) -> UsageError:
    """The error for a run of trees with another value of this field."""
    return UsageError(
        f"--{name.replace('_args', '_arg').replace('_', '-')} cannot be used with trees, whose "
        "updates are sums",
        "leave it out",
    )
