"""Adapts Flower's strategy classes, which stay unmodified: their needs, arguments and state.

Each strategy that differs from FedAvg has a subclass of `StrategyAdapter` in its own file.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt

from coordinator.storage.run_spec import RunSpec, Setting
from coordinator.strategies.failures import strategy_errors
from protocols.codecs import registry
from protocols.errors import CannotBeMet, UnknownName, UsageError

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from protocols.messages.envelope import Metrics
    from protocols.model.weights import WeightReader

Arrays = Mapping[str, npt.NDArray[Any]]

#: What a strategy's `aggregate_train` receives.
#:   mean    one reply that holds the weighted mean, a piece of the model at a time
#:   parts   every reply, a piece of the model at a time: for coordinate-wise algorithms
#:   models  every reply, whole: memory grows with the number of peers
#:   sums    nothing: the updates are integers that are added up, and `trees` makes the version
#:   factors nothing: the updates are factors, and `svd` makes those of the version
#: Pieces of "mean" and "parts" are independent of each other. "models" is a single call.
Feed = Literal["mean", "parts", "models", "sums", "factors"]

#: Not for `--strategy-arg`: decided by the run, or not a number.
_RESERVED = frozenset(
    {
        "min_train_nodes",
        "min_evaluate_nodes",
        "min_available_nodes",
        "weighted_by_key",
        "arrayrecord_key",
        "configrecord_key",
    }
)
_POSITIVE = (lambda value: value > 0, "above 0")
_NOT_NEGATIVE = (lambda value: value >= 0, "0 or more")
_DECAY = (lambda value: 0 <= value < 1, "from 0 up to, not including, 1")
Limits = Mapping[str, tuple[Callable[[Any], bool], str]]
LIMITS: Limits = {
    "fraction_train": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "fraction_evaluate": (lambda value: 0 <= value <= 1, "from 0 to 1"),
    "server_learning_rate": _POSITIVE,
    "server_momentum": _DECAY,
    "eta": _POSITIVE,
    "eta_l": _POSITIVE,
    "beta_1": _DECAY,
    "beta_2": _DECAY,
    "tau": _POSITIVE,
    "proximal_mu": _NOT_NEGATIVE,
    "q": _NOT_NEGATIVE,
    "client_learning_rate": _POSITIVE,
    "num_malicious_nodes": _NOT_NEGATIVE,
    "num_nodes_to_select": (lambda value: value >= 1, "1 or more"),
}


class StrategyAdapter:
    """The adapter of FedAvg, and the base of the others: arithmetic mean, no state.

    McMahan et al. 2017, arXiv 1602.05629.
    """

    feed: Feed = "mean"
    #: Peers count by their examples, so `--weighting` has an effect.
    weighs_peers = True
    #: Peers count by the metric that `required_metric` names: the more, the higher it is.
    weighs_by_metric = False
    #: It works with codecs that send few coordinates. If most updates have no change in most
    #: coordinates, a median has none either.
    takes_sparse = True
    #: Defaults that differ from Flower's, or that Flower lacks.
    defaults: Mapping[str, Setting] = MappingProxyType({})
    #: By argument: a test of its value, and text that describes the test.
    limits: Limits = LIMITS
    #: Arguments for the trainers (`trainer_settings`), which Flower's class does not know.
    trainer_arguments: Mapping[str, Setting] = MappingProxyType({})
    #: It needs the round's base in `load_state` although it has no state.
    needs_base = False
    #: It reads the weights that it sends out; Flower's own classes only pass them on.
    reads_weights = False
    #: Copies of all updates in memory at the peak of Flower's class ("models" only; measured).
    memory_copies = 0.0

    def __init__(self, flower: str) -> None:
        self.flower = flower

    def flower_class(self) -> type[Strategy]:
        from flwr.serverapp import strategy

        found: type[Strategy] = getattr(strategy, self.flower)
        return found

    # --- arguments ---

    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters for `--strategy-arg`, from the signatures of the class and its parents."""
        found: dict[str, inspect.Parameter] = {}
        for cls in self.flower_class().__mro__:
            if "__init__" not in cls.__dict__:
                continue
            signature = inspect.signature(cls.__dict__["__init__"], eval_str=True).parameters
            for name, parameter in list(signature.items())[1:]:
                if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    found.setdefault(name, parameter)
            if not any(p.kind is p.VAR_KEYWORD for p in signature.values()):
                break
        for name, default in self.trainer_arguments.items():
            kind = inspect.Parameter.KEYWORD_ONLY
            found[name] = inspect.Parameter(name, kind, default=default, annotation=type(default))
        return found

    def arguments(self, args: Mapping[str, Setting]) -> dict[str, Setting]:
        """`args` over our defaults, each converted to its type. Raises UsageError, UnknownName.

        Text is parsed, and a whole number is valid for a float.
        """
        known = {
            name: parameter
            for name, parameter in self.parameters().items()
            if name not in _RESERVED and _kind(parameter) is not None
        }
        chosen: dict[str, Setting] = {}
        for name, value in {**self.trainer_arguments, **self.defaults, **args}.items():
            if name not in known:
                raise UnknownName(
                    f"{self.flower} has no argument {name!r}", _argument_list(known, self)
                )
            chosen[name] = _converted(name, value, known[name])
            is_valid, limit = self.limits.get(name, (lambda _: True, ""))
            if not is_valid(chosen[name]):
                raise UsageError(f"{name} of {self.flower} is {limit}, not {value}")
        for name, parameter in known.items():
            if parameter.default is parameter.empty and name not in chosen:
                raise UsageError(
                    f"{self.flower} needs the argument {name}", f"--strategy-arg {name}=…"
                )
        return chosen

    def make(self, args: Mapping[str, Setting]) -> Strategy:
        """A new object of Flower's class. Raises UsageError, UnknownName, StrategyFailed."""
        with strategy_errors(self.flower):
            arguments: dict[str, Any] = {
                name: value
                for name, value in self.arguments(args).items()
                if name not in self.trainer_arguments
            }
            # The run decides who works and how long it waits.
            minimums = ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
            arguments |= dict.fromkeys(self.parameters().keys() & set(minimums), 1)
            try:
                return self.flower_class()(**arguments)
            except (ValueError, TypeError) as err:
                raise UsageError(f"{self.flower} refuses its arguments: {err}") from err

    # --- before the start ---

    def check(self, spec: RunSpec) -> None:
        """Raise UsageError, UnknownName or CannotBeMet unless a run with this spec can work."""
        strategy = self.make(spec.strategy_args)
        self.check_quorum(strategy, spec.quorum)
        if not self.takes_sparse and registry.is_sparse(spec.codec):
            raise UsageError(
                f"{spec.strategy} cannot use the codec {spec.codec}: few peers send the same "
                "coordinate, and values of few peers are cut off",
                "use another codec (int8, sign), or multikrum",
            )
        if self.feed == "mean":
            return
        if spec.max_weight_share < 1:
            raise UsageError(
                f"{spec.strategy} has no shares of peers: --max-weight-share has no effect with it",
                "leave it out; the strategy itself bounds what one peer can do",
            )
        if spec.weighting == "equal" and not self.weighs_peers:
            raise UsageError(
                f"{spec.strategy} does not weight peers by examples: --weighting has no effect",
                "leave --weighting out",
            )

    def check_quorum(self, strategy: Strategy, quorum: int) -> None:
        """Raise CannotBeMet if the strategy needs more updates than this quorum."""

    def memory_bytes(self, peers: int, model_bytes: int) -> int:
        """Memory for closing a round, beyond the few pieces that every strategy needs."""
        if not self.memory_copies:
            return 0
        return int(self.memory_copies * peers * model_bytes) + 3 * model_bytes

    def required_metric(self, args: Mapping[str, Setting]) -> str:
        """The metric, at least 0, that every update must have; or empty."""
        return ""

    def update_error(self, args: Mapping[str, Setting], metrics: Metrics, norm: float) -> str:
        """The error of an update with these metrics and this distance from its base; or empty."""
        return ""

    def transform_update(
        self,
        args: Mapping[str, Setting],
        update: WeightReader,
        base: WeightReader,
        metrics: Metrics,
    ) -> WeightReader:
        """The update to aggregate, with the tensors that follow from it and from its metrics."""
        return update

    def trainer_settings(self, args: Mapping[str, Setting]) -> dict[str, Setting]:
        """Settings for every trainer, hidden from tasks (`protocols.model.personalization`)."""
        return {}

    # --- state from round to round ---

    def slots(self, strategy: Strategy) -> tuple[str, ...]:
        """Names of its state arrays, each as large as the model, in a fixed order."""
        return ()

    def load_state(self, strategy: Strategy, base: Arrays, state: Mapping[str, Arrays]) -> None:
        """Set the round's base and the strategy's state, which is empty in the first round."""

    def dump_state(self, strategy: Strategy, names: list[str]) -> dict[str, Arrays]:
        """The new state: arrays by slot and name."""
        return {}

    def dump_extra(self, strategy: Strategy) -> Arrays | None:
        """Additional state of a custom strategy; None if it has none."""
        return None

    def load_extra(self, strategy: Strategy, arrays: Arrays) -> None:
        """Restore the additional state."""


def require_quorum(what: str, needed: int, quorum: int) -> None:
    """Raise CannotBeMet unless the quorum is at least `needed`. `what` names the algorithm."""
    if quorum < needed:
        raise CannotBeMet(
            f"{what} needs {needed} updates a round; the quorum is {quorum}",
            f"use --quorum {needed} or more, with as many machines",
        )


def _kind(parameter: inspect.Parameter) -> type[Any] | None:
    """int, float, bool or str; None for any other type, such as a function."""
    for kind in (parameter.annotation, type(parameter.default)):
        if kind in (bool, int, float, str):
            found: type[Any] = kind
            return found
    return None


def _converted(name: str, value: Setting, parameter: inspect.Parameter) -> Setting:
    kind = _kind(parameter)
    assert kind is not None
    try:
        if kind is bool and isinstance(value, str):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(value, str) or (kind is float and type(value) is int):
            value = kind(value)
    except (ValueError, KeyError, OverflowError):
        pass  # reported below, like any other invalid value
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        word = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text")
        raise UsageError(f"the strategy's argument {name} is {word}, not {value!r}")
    return value


def _argument_list(known: Mapping[str, inspect.Parameter], adapter: StrategyAdapter) -> str:
    def one(name: str, parameter: inspect.Parameter) -> str:
        default = adapter.defaults.get(name, parameter.default)
        return name if default is parameter.empty else f"{name}={default}"

    return "its arguments: " + ", ".join(one(*item) for item in sorted(known.items()))
