"""How one of Flower's strategies is run: its class stays as it is, an adapter says what it needs.

What differs from FedAvg is a subclass of `StrategyAdapter` in a file of its own.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy.typing as npt

from coordinator.storage.run_events import RunSpec, Setting
from coordinator.strategies.failures import strategy_errors
from protocols.errors import CannotBeMet, UnknownName, UsageError

if TYPE_CHECKING:
    from flwr.serverapp.strategy import Strategy

    from protocols.messages.envelope import Metrics
    from protocols.model.weights import WeightReader

Arrays = Mapping[str, npt.NDArray[Any]]

#: What a strategy's `aggregate_train` is given.
#:   mean    one reply that holds the weighted mean, a piece of the model at a time
#:   parts   every reply, a piece of the model at a time: the maths is coordinate by coordinate
#:   models  every reply, whole: the memory grows with the peers
#: Pieces of "mean" and "parts" know nothing of each other: they may be made in parallel and in
#: any order. "models" is one call.
Feed = Literal["mean", "parts", "models"]

#: What the run decides, or what is no number: not for `--strategy-arg`.
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
    """FedAvg's own adapter, and what the others differ from. Arithmetic mean, nothing remembered.

    McMahan et al. 2017, arXiv 1602.05629.
    """

    feed: Feed = "mean"
    #: Peers count by their examples, so `--weighting` has a meaning.
    weighs_peers = True
    #: Arguments for which our default is another than Flower's, or for which Flower has none.
    defaults: Mapping[str, Setting] = MappingProxyType({})
    #: What arguments may be, by name: a test and words for it.
    limits: Limits = LIMITS
    #: Arguments that Flower's class does not know: they are for the trainers (`trainer_settings`).
    trainer_arguments: Mapping[str, Setting] = MappingProxyType({})
    #: It moves on from the round's first weights, so it is `put` them though it remembers nothing.
    needs_base = False
    #: It looks at the weights that it sends out; Flower's own classes only pass them on.
    reads_weights = False
    #: Copies of all updates that Flower's class holds at its peak ("models" only; measured).
    memory_copies = 0.0

    def __init__(self, flower: str) -> None:
        self.flower = flower

    def flower_class(self) -> type[Strategy]:
        from flwr.serverapp import strategy

        found: type[Strategy] = getattr(strategy, self.flower)
        return found

    # --- arguments ---

    def parameters(self) -> dict[str, inspect.Parameter]:
        """What may be given as `--strategy-arg`, from the class's own signature."""
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
        """`args`, each of its parameter's type, over our defaults. Raises UsageError, UnknownName.

        Text is parsed, a whole number does for a fraction.
        """
        asked = {
            name: parameter
            for name, parameter in self.parameters().items()
            if name not in _RESERVED and _kind(parameter) is not None
        }
        chosen: dict[str, Setting] = {}
        for name, value in {**self.trainer_arguments, **self.defaults, **args}.items():
            if name not in asked:
                raise UnknownName(
                    f"{self.flower} has no argument {name!r}", _argument_list(asked, self)
                )
            chosen[name] = _converted(name, value, asked[name])
            held, words = self.limits.get(name, (lambda _: True, ""))
            if not held(chosen[name]):
                raise UsageError(f"{name} of {self.flower} is {words}, not {value}")
        for name, parameter in asked.items():
            if parameter.default is parameter.empty and name not in chosen:
                raise UsageError(
                    f"{self.flower} needs the argument {name}", f"--strategy-arg {name}=…"
                )
        return chosen

    def make(self, args: Mapping[str, Setting]) -> Strategy:
        """A new object of Flower's class. Raises UsageError, UnknownName, StrategyFailed."""
        with strategy_errors(self.flower):
            return self._create(args)

    def _create(self, args: Mapping[str, Setting]) -> Strategy:
        chosen = self.arguments(args)
        arguments: dict[str, Any] = {
            n: v for n, v in chosen.items() if n not in self.trainer_arguments
        }
        # The run decides who works and how long it waits.
        for name in ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes"):
            if name in self.parameters():
                arguments[name] = 1
        try:
            return self.flower_class()(**arguments)
        except (ValueError, TypeError) as err:
            raise UsageError(f"{self.flower} refuses its arguments: {err}") from err

    # --- before the start ---

    def check(self, spec: RunSpec) -> None:
        """Raise UsageError, UnknownName or CannotBeMet unless such a run can work."""
        strategy = self.make(spec.strategy_args)
        self.check_quorum(strategy, spec.quorum)
        if self.feed == "mean":
            return
        if spec.max_weight_share < 1:
            raise UsageError(
                f"{spec.strategy} gives no peer a share: --max-weight-share has no meaning with it",
                "leave it out; the strategy itself bounds what one peer can do",
            )
        if spec.weighting == "equal" and not self.weighs_peers:
            raise UsageError(
                f"{spec.strategy} does not weigh peers by examples: --weighting has no meaning",
                "leave --weighting out",
            )

    def check_quorum(self, strategy: Strategy, quorum: int) -> None:
        """Raise CannotBeMet if so few updates are too few for it."""

    def memory_bytes(self, peers: int, model_bytes: int) -> int:
        """What closing a round takes beyond the few pieces that every strategy takes."""
        return (
            int(self.memory_copies * peers * model_bytes) + 3 * model_bytes
            if self.memory_copies
            else 0
        )

    def required_metric(self, args: Mapping[str, Setting]) -> str:
        """A metric, 0 or more, that every update must tell for it; or empty."""
        return ""

    def update_error(self, args: Mapping[str, Setting], metrics: Metrics, norm: float) -> str:
        """What is wrong with an update so far from its base, and its metrics; or empty."""
        return ""

    def transform_update(
        self,
        args: Mapping[str, Setting],
        update: WeightReader,
        base: WeightReader,
        metrics: Metrics,
    ) -> WeightReader:
        """An update as it is to be aggregated: with what follows from it and from its metrics."""
        return update

    def trainer_settings(self, args: Mapping[str, Setting]) -> dict[str, Setting]:
        """What every trainer is told and no task sees (`protocols.model.personalization`)."""
        return {}

    # --- what it remembers from round to round ---

    def slots(self, strategy: Strategy) -> tuple[str, ...]:
        """Names of the arrays that it keeps for each weight, in a fixed order."""
        return ()

    def load_state(self, strategy: Strategy, base: Arrays, state: Mapping[str, Arrays]) -> None:
        """Give it the round's first weights, and its state (empty in the first round)."""

    def dump_state(self, strategy: Strategy, names: list[str]) -> dict[str, Arrays]:
        """Its new state: arrays by slot and name."""
        return {}

    def dump_extra(self, strategy: Strategy) -> Arrays | None:
        """What else a class of one's own wants to find again after a restart."""
        return None

    def load_extra(self, strategy: Strategy, arrays: Arrays) -> None:
        """Give that back."""


def require_quorum(what: str, needed: int, quorum: int) -> None:
    """Raise CannotBeMet unless the quorum reaches what a strategy needs."""
    if quorum < needed:
        raise CannotBeMet(
            f"{what} needs {needed} updates a round; the quorum is {quorum}",
            f"--quorum {needed} or more, with as many machines",
        )


def _kind(parameter: inspect.Parameter) -> type[Any] | None:
    """int, float, bool or str; None for what cannot be typed (a function, say)."""
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
        pass  # told below, like every other value that does not fit
    if type(value) is not kind or (isinstance(value, float) and not math.isfinite(value)):
        word = {int: "a whole number", float: "a number", bool: "true or false"}.get(kind, "text")
        raise UsageError(f"the strategy's argument {name} is {word}, not {value!r}")
    return value


def _argument_list(asked: Mapping[str, inspect.Parameter], adapter: StrategyAdapter) -> str:
    def one(name: str, parameter: inspect.Parameter) -> str:
        default = adapter.defaults.get(name, parameter.default)
        return name if default is parameter.empty else f"{name}={default}"

    return "its arguments: " + ", ".join(one(*item) for item in sorted(asked.items()))
