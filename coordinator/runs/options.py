"""The options of a run: one table for the command line, the API, the monitor's form and the docs.

The defaults apply to new runs; those of `RunSpec` apply to old ledgers. Pure.
"""

from __future__ import annotations

import keyword
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from protocols.errors import UsageError
from protocols.messages.work import MAX_FRAGMENTS
from protocols.privacy.events import MAX_SHARERS
from protocols.privacy.private_training import (
    MAX_CLIP,
    MAX_DELTA,
    MAX_EPSILON,
    MIN_CLIP,
    MIN_DELTA,
    MIN_EPSILON,
)

if TYPE_CHECKING:
    from coordinator.storage.run_events import RunSpec


class Bounds(NamedTuple):
    """The numbers that an option takes, and `text` for them.

    `above_minimum`: not the minimum itself. `or_zero`: 0 as well.
    """

    text: str
    minimum: float = -math.inf
    maximum: float = math.inf
    above_minimum: bool = False
    or_zero: bool = False

    def contains(self, value: float) -> bool:
        if self.or_zero and value == 0:
            return True
        is_above = value > self.minimum if self.above_minimum else value >= self.minimum
        return is_above and value <= self.maximum and abs(value) < math.inf


class Option(NamedTuple):
    """One option. `kind` and `default` are those of the command line.

    With `is_plain`, the value is that of the `RunSpec` field with the same name, or `other_field`.
    The field must be within `bounds`, or be one of `choices`. Those with `is_common` are in
    `run start --help`, the others in `--help-all`. `unset`: what a default of 0 means, for a form
    that shows an empty field in place of a 0.
    """

    name: str
    kind: type
    default: Any
    help: str
    bounds: Bounds | None = None
    unit: str = ""
    choices: tuple[str, ...] = ()
    is_plain: bool = True
    other_field: str = ""
    is_common: bool = False
    unset: str = ""

    @property
    def repeatable(self) -> bool:
        """True if the option may be repeated."""
        return isinstance(self.default, tuple)

    @property
    def default_text(self) -> str:
        if isinstance(self.default, bool):
            return "yes" if self.default else "no"
        return "" if self.default in (None, ()) else str(self.default)

    @property
    def keyword(self) -> str:
        """The name in Python: `from_` for `from`, which is a word of the language."""
        name = self.name.replace("-", "_")
        return f"{name}_" if keyword.iskeyword(name) else name

    @property
    def limits(self) -> str:
        """The valid values as text; empty if all are valid."""
        return self.bounds.text if self.bounds else " or ".join(filter(None, self.choices))

    @property
    def field(self) -> str:
        return self.other_field or self.name.replace("-", "_")

    def parse(self, text: str) -> Any:
        """The value of a text from a form. Raises UsageError."""
        if self.repeatable:
            return text.split()
        if self.kind is bool:
            if text.lower() not in _YES_OR_NO:
                raise self.wrong_kind(text)
            return _YES_OR_NO[text.lower()]
        try:
            return self.kind(text)
        except ValueError as err:
            raise self.wrong_kind(text) from err

    def wrong_kind(self, value: object) -> UsageError:
        """The error for a value that is not of this kind."""
        wanted = {bool: "yes or no", int: "a whole number"}.get(self.kind, "a number")
        return UsageError(f"--{self.name} must be {wanted}, not {value!r}")

    def check(self, spec: RunSpec) -> None:
        """Raise UsageError unless the field's value is valid."""
        value = getattr(spec, self.field) if self.bounds or self.choices else None
        if value is None or value in self.choices or (self.bounds and self.bounds.contains(value)):
            return
        raise UsageError(f"--{self.name} must be {self.limits}, not {value!r}")


_YES_OR_NO = {"yes": True, "true": True, "no": False, "false": False}
_FROM_0, _FROM_1 = Bounds("0 or more", 0), Bounds("1 or more", 1)
_ABOVE_0 = Bounds("above 0", 0, above_minimum=True)
_SHARE = Bounds("above 0 and at most 1", 0, 1, above_minimum=True)
_FACTOR = Bounds("from 1x to 10x", 1, 10, or_zero=True)
_OUTLIERS = Bounds("0, or 1 or more", 1, or_zero=True)
_OVERLAP = Bounds("0 or 1", 0, 1)
_FRAGMENTS = Bounds(f"from 1 to {MAX_FRAGMENTS}", 1, MAX_FRAGMENTS)
_FINITE = Bounds("a finite number")
_EPSILON = Bounds("0, or from 0.01 to 100", MIN_EPSILON, MAX_EPSILON, or_zero=True)
_DELTA = Bounds("from 1e-12 to 0.01", MIN_DELTA, MAX_DELTA)
_SHARERS = Bounds(f"from 0 to {MAX_SHARERS}", 0, MAX_SHARERS)
_CLIP = Bounds("from 1e-6 to 1e6", MIN_CLIP, MAX_CLIP)
#: The default of --outlier-limit: docs/quality.md has what was measured.
OUTLIER_LIMIT = 3.0
#: The norm to which each peer of a secure run scales its change down, unless it is set.
SECURE_CLIP_NORM = 10.0
_STRATEGIES = (
    "fedavg, fedprox, fedavgm, fedadam, fedyogi, fedadagrad, fedmedian, fedtrimmedavg, krum, "
    "multikrum, bulyan, qfedavg, diloco, scaffold, fedbn, or module:Class for your own."
)

# fmt: off
#: In the order of `--help`: name, type, default, help, bounds, unit.
OPTIONS = (
    Option("task", str, "", "What to train: mnist, or ./my_task.py:MyTask that agents have.",
           is_plain=False),
    Option("target", str, "", "For a table: the column to predict.", is_plain=False,
           is_common=True),
    Option("features", str, "", "For a table: columns to predict from; by default those that most "
           "peers have.", is_plain=False),
    Option("kind", str, "", "For a table: auto, classification or regression.", is_plain=False),
    Option("preprocessing", Path, None, "For a table: a file with the columns, their scales and "
           "categories. Peers then send no statistics of their tables.", is_plain=False),
    Option("rounds", int, 0, "How many rounds. 0: until no version is better (--patience), at most "
           "100; for trees all of them; with noise, and for tasks of your own, 10.", _FROM_0,
           is_plain=False, is_common=True, unset="ends by itself"),
    Option("until", str, "", "End when a metric has reached a value: METRIC=NUMBER, such as "
           "accuracy=0.9.", _FINITE, is_plain=False, other_field="target", is_common=True),
    Option("quorum", int, 1, "How many updates a round needs.", _FROM_1, "updates",
           is_common=True),
    Option("deadline", str, "10m", "A round continues after this time if it has its quorum; auto: "
           "twice what the slowest peer needed before.", _ABOVE_0, "s, m, h or d",
           is_plain=False, other_field="deadline_s", is_common=True),
    Option("select", str, "", "Ask this many times the quorum of peers (1.2x), and go on once the "
           "quorum is there.", _FACTOR, "quorums", is_plain=False),
    Option("late", str, "drop", "An update whose round has closed: drop it, or fold it into the "
           "next round with less weight the later it is.", choices=("drop", "fold")),
    Option("keep-versions", int, 2, "Keep this many of the newest versions on disk, and the best "
           "one.", _FROM_1, "versions"),
    Option("strategy", str, "fedavg", f"How updates are aggregated: {_STRATEGIES}",
           is_common=True),
    Option("strategy-arg", str, (), "An argument of the strategy: key=value.", is_plain=False),
    Option("set", str, (), "A setting of the task: key=value; `task show` lists them.",
           is_plain=False, is_common=True),
    Option("codec", str, "fp32", "How updates are sent: fp32 (whole), or their change as bf16, "
           "int8, sign, ternary, topk (ternary:0.1 and topk:0.02 for shares other than 20 and "
           "1 %), sparse2 (sparse2:128 for 128 of each 4,096 changes instead of 64)."),
    Option("seed", int, 0, "Seed of the first weights and of sampling."),
    Option("weighting", str, "examples", "examples: a peer counts by its examples; equal: all "
           "peers count the same.", choices=("examples", "equal")),
    Option("max-weight-share", float, 1.0, "No peer counts for more than this share of a round.",
           _SHARE),
    Option("clip-norm", float, 0.0, "No update moves the weights further than this (0: off).",
           _FROM_0, "Euclidean norm", unset="off"),
    Option("outlier-limit", float, OUTLIER_LIMIT, "No peer pulls a version further than this many "
           "times the median peer, in rounds of three peers or more (0: off).", _OUTLIERS,
           "times"),
    Option("min-examples", int, 1, "A peer that trains on fewer examples gets no work from this "
           "run.", _FROM_1, "examples"),
    Option("secure", bool, False, "The coordinator sees only the sum of all updates and no single "
           "one. Needs three peers or more, whose owners trust each other.", is_common=True),
    Option("dp", float, 0.0, "Peers add noise: each its own, or with --secure all together. All "
           "rounds together cost at most this ε for each row (0: no noise).", _EPSILON, "ε",
           other_field="dp_epsilon", unset="no noise"),
    Option("delta", float, 1e-5, "With --dp: the δ, well below 1 / the rows of a peer. With "
           "--dp-user: well below 1 / the peers.",
           _DELTA, other_field="dp_delta"),
    Option("dp-clip", float, 1.0, "With --dp: clip the gradient of each row to this norm.",
           _CLIP, "Euclidean norm"),
    Option("dp-shared", int, 0, "With --secure --dp: the number of honest peers whose noise "
           "together is enough. 0: two thirds of the quorum; 1: each peer adds all of it.",
           _SHARERS, "peers", other_field="dp_shared", unset="two thirds of the quorum"),
    Option("dp-user", float, 0.0, "The coordinator adds noise to each version. All versions "
           "together cost at most this ε for each peer (0: no noise).", _EPSILON, "ε",
           other_field="dp_user_epsilon", unset="no noise"),
    Option("overlap", int, 0, "1: peers train for the next round while they send an update and "
           "await the version, so training is one round late. 0: they wait.", _OVERLAP, "rounds",
           unset="they wait"),
    Option("fragments", int, 1, "With --overlap 1: exchange the model in this many fragments, one "
           "in each round, so that no layer waits long for its version.", _FRAGMENTS, "fragments"),
    Option("mode", str, "synchronous", "synchronous rounds, or buffered: no peer waits for "
           "another (FedBuff).", choices=("synchronous", "buffered")),
    Option("buffer", int, 0, "Buffered: this many updates make a version.", _FROM_0, "updates",
           unset="only for buffered runs"),
    Option("max-staleness", int, 10, "Buffered: an update may be this many versions behind.",
           _FROM_0, "versions"),
    Option("concurrency", int, 0, "Buffered: this many peers train at a time (0: all).", _FROM_0,
           "peers", unset="all"),
    Option("server-lr", float, 1.0, "Buffered: how far a version follows its updates.", _ABOVE_0),
    Option("best-metric", str, "", "The task's metric that decides which version is best; by "
           "default accuracy, else loss."),
    Option("best-direction", str, "", "max or min; by default as the metric's name says.",
           choices=("", "max", "min")),
    Option("patience", int, 0, "End after this many rounds without a better version. 0: off if "
           "--rounds is given, else 10; for trees, four evaluations.", _FROM_0, "rounds",
           unset="10 rounds, or none where you say how many"),
    Option("personal", str, "", "How each peer makes a model of its own: finetune, after the run, "
           "the default; ditto, the same near the shared model (ditto:0.1 for a weaker pull); "
           "fedper, the last layers stay on each machine during the run (fedper:head.* names them)."
           ),
    Option("from", Path, None, "First weights: a safetensors file.", is_plain=False),
    Option("flower", Path, None, "Run the Flower app in this folder instead of a task; --set then "
           "changes its run config.", is_plain=False),
)
# fmt: on


def check(spec: RunSpec) -> None:
    """Raise UsageError unless each option of a run has a valid value."""
    for option in OPTIONS:
        option.check(spec)
