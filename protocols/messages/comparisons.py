"""The result of a run for one peer: how good models are on its own held-out rows. Pure.

*Alone* was trained on this peer's rows only, *shared* is the run's best version, and *personal* is
the shared model after further training on this peer's rows. *Blend* is the weighted mean of the
shared model, that of this peer alone, and the other models that the run has trained; it is for the
owner, and no metric of it leaves.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct
from msgspec.structs import replace

from protocols.messages.envelope import Count, Id, Name

COMPARISONS_PATH = "/cw/v1/comparisons"
MAX_COMPARISON_BYTES = 4096

Model = Literal["alone", "shared", "personal", "blend"]
#: In the order in which people read them.
MODELS: tuple[Model, ...] = ("alone", "shared", "personal", "blend")
#: Why a peer has no comparison: its task cannot measure models row by row, it has too few rows, or
#: the work failed. The owner knows more.
Missing = Literal["task", "rows", "failed"]
MAX_NUMBER = 1e18
#: Infinity and NaN are none of them.
_Number = Annotated[float, Meta(ge=-MAX_NUMBER, le=MAX_NUMBER)]


class Estimate(Struct, frozen=True):
    """A value, and the ends of its interval of 95 %."""

    value: _Number
    low: _Number
    high: _Number


class Comparison(Struct, frozen=True, kw_only=True):
    """The models on the same `rows` held-out rows of one peer.

    `models`: the metric of each. `gains`: by how much another model is better than the shared one,
    so that a positive number is better for each metric. `rounds`: how many rounds of local training
    a model had. `recommended`: as `recommend` says. `cut`: models whose training ended early, as it
    had taken as long as it may. `missing`: why there is none; then it has no numbers.
    """

    run: Id
    metric: Name
    rows: Count
    models: Annotated[dict[Model, Estimate], Meta(max_length=4)]
    gains: Annotated[dict[Model, Estimate], Meta(max_length=3)] = {}
    rounds: Annotated[dict[Model, Count], Meta(max_length=2)] = {}
    recommended: Model = "shared"
    cut: Annotated[tuple[Model, ...], Meta(max_length=2)] = ()
    missing: Missing | None = None


def without_numbers(run: str, missing: Missing) -> Comparison:
    """The message of a peer that has no comparison."""
    return Comparison(run=run, metric="", rows=0, models={}, missing=missing)


def has_bounds(found: Comparison) -> bool:
    """True if all numbers are within the bounds of a message: models that diverge exceed them."""
    every = (*found.models.values(), *found.gains.values())
    return all(abs(n) <= MAX_NUMBER for one in every for n in (one.value, one.low, one.high))


def with_blend(found: Comparison, of_blend: Comparison) -> Comparison:
    """A comparison with the blend of another one by the same metric. The other models stay as they
    are."""
    models, gains = of_blend.models | found.models, of_blend.gains | found.gains
    return replace(found, models=models, gains=gains, recommended=recommend(gains))


def without_blend(found: Comparison) -> Comparison:
    """What leaves of a comparison: no metric of the blend, as its other models may be versions that
    this machine has told no evaluation of."""
    models: dict[Model, Estimate] = {m: one for m, one in found.models.items() if m != "blend"}
    gains: dict[Model, Estimate] = {m: one for m, one in found.gains.items() if m != "blend"}
    return replace(found, models=models, gains=gains, recommended=recommend(gains))


def recommend(gains: dict[Model, Estimate]) -> Model:
    """The model for this peer, by the gains over the shared one: the one with the largest gain, of
    those whose interval is above 0, and of a blend that has none below 0. A blend needs no
    interval, as the shared model has its part in it. Else the shared model."""
    sure = {
        model: gain.value
        for model, gain in gains.items()
        if gain.low > 0 or (model == "blend" and gain.value >= 0)
    }
    return max(sure, key=lambda model: sure[model], default="shared")


def lines_of(found: Comparison) -> list[str]:
    """The comparison for people: a line for each model, and what is recommended."""
    lines = []
    for model in MODELS:
        if (of := found.models.get(model)) is None:
            continue
        mark = "→" if model == found.recommended else " "
        text = f"{mark} {model:<8}  {found.metric} {_number(of.value)}"
        text += f" ({_number(of.low)} to {_number(of.high)})"
        if (gain := found.gains.get(model)) is not None:
            text += f", against shared {gain.value:+.3g} ({gain.low:+.3g} to {gain.high:+.3g})"
        lines.append(text)
    return [*lines, f"  {cut_text(found)}"] if found.cut else lines


def cut_text(found: Comparison) -> str:
    """Says that models were trained for less time than they could use."""
    models = " and ".join(found.cut)
    return f"training of {models} was cut: it takes no longer here than that of the run"


def _number(value: float) -> str:
    return f"{value:.4g}"
