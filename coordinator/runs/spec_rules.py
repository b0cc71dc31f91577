"""Rules for combinations of a run's options. `runs.options` checks each option alone. Pure."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from coordinator import strategies
from coordinator.runs import best_version, options
from coordinator.storage.run_events import RunSpec
from coordinator.strategies.adapter import StrategyAdapter
from protocols.codecs import registry
from protocols.errors import UsageError
from protocols.model import personalization


class Rule(NamedTuple):
    """A combination that is refused. `text` and `hint` may have fields of the spec in braces."""

    is_broken: Callable[[RunSpec, StrategyAdapter], bool]
    text: str
    hint: str = ""


def _is_buffered(spec: RunSpec) -> bool:
    return spec.mode == "buffered"


_RULES = (
    Rule(
        lambda spec, _: bool(personalization.SETTINGS & spec.settings.keys()),
        "{reserved} is no setting of a task: the strategy sets it",
        "--strategy scaffold or fedbn, with --strategy-arg",
    ),
    Rule(
        lambda spec, _: spec.min_examples > spec.max_examples,
        "--min-examples must be at most {spec.max_examples}",
    ),
    Rule(
        lambda spec, _: bool(spec.best_direction) and not spec.best_metric,
        "--best-direction needs --best-metric",
    ),
    Rule(
        lambda spec, _: (
            not _is_buffered(spec)
            and (spec.buffer > 0 or spec.concurrency > 0 or spec.server_lr != 1.0)
        ),
        "--buffer, --concurrency and --server-lr belong to --mode buffered",
        "--mode buffered --buffer 4",
    ),
    Rule(
        lambda spec, _: _is_buffered(spec) and spec.buffer < 1,
        "--buffer is the number of updates that make a version, 1 or more",
    ),
    Rule(
        lambda spec, _: _is_buffered(spec) and spec.quorum != 1,
        "--quorum has no effect with --mode buffered: --buffer says what a version needs",
    ),
    Rule(
        lambda spec, _: _is_buffered(spec) and spec.select != 0,
        "--select has no effect with --mode buffered: --concurrency says how many work",
    ),
    Rule(
        lambda spec, _: _is_buffered(spec) and "fraction_train" in spec.strategy_args,
        "fraction_train has no effect with --mode buffered: --concurrency says how many work",
    ),
    Rule(
        lambda spec, adapter: _is_buffered(spec) and adapter.feed != "mean",
        "{spec.strategy} cannot be used with --mode buffered: a fast peer may have several updates "
        "in a buffer, so that a bound on the number of bad peers has no effect",
        "use fedavg or a server optimizer; --max-weight-share and --clip-norm bound each peer",
    ),
    Rule(
        lambda spec, adapter: _is_buffered(spec) and adapter.needs_base,
        "{spec.strategy} cannot be used with --mode buffered: its control variates belong to one "
        "version",
        "use fedavg or a server optimizer, or --mode synchronous",
    ),
    Rule(
        lambda spec, adapter: (
            spec.late == "fold"
            and (adapter.feed != "mean" or adapter.needs_base or _is_buffered(spec))
        ),
        "--late fold cannot be used with {spec.strategy} in mode {spec.mode}",
        "use fedavg or a server optimizer in synchronous rounds, or --late drop",
    ),
)


def check(spec: RunSpec) -> None:
    """Raise UsageError, UnknownName or CannotBeMet unless a run with these settings can work."""
    options.check(spec)
    adapter = strategies.find(spec.strategy)
    reserved = min(personalization.SETTINGS & spec.settings.keys(), default="")
    for rule in _RULES:
        if rule.is_broken(spec, adapter):
            text, hint = (t.format(spec=spec, reserved=reserved) for t in (rule.text, rule.hint))
            raise UsageError(text, hint)
    adapter.check(spec)
    registry.parse(spec.codec)
    best_version.check(spec)
