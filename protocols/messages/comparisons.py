"""The result of a run for one peer: how good models are on its own held-out rows. Pure.

*Alone* was trained on this peer's rows only, *shared* is the run's best version, and *personal* is
the shared model after further training on this peer's rows.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from protocols.messages.envelope import Count, Id, Name

COMPARISONS_PATH = "/cw/v1/comparisons"
MAX_COMPARISON_BYTES = 4096

Model = Literal["alone", "shared", "personal"]
#: Why a peer has no comparison: its task cannot measure models row by row, it has too few rows, or
#: the work failed. The owner knows more.
Missing = Literal["task", "rows", "failed"]
#: Infinity and NaN are none of them.
_Number = Annotated[float, Meta(ge=-1e18, le=1e18)]


class Estimate(Struct, frozen=True):
    """A value, and the ends of its interval of 95 %."""

    value: _Number
    low: _Number
    high: _Number


class Comparison(Struct, frozen=True, kw_only=True):
    """The models on the same `rows` held-out rows of one peer.

    `models`: the metric of each. `gains`: by how much another model is better than the shared one,
    so that a positive number is better for each metric. `rounds`: how many rounds of local training
    a model had. `recommended`: the shared model, unless the interval of another one's gain is above
    0; then the one with the largest gain. `cut`: models whose training ended early, as it had taken
    as long as it may. `missing`: why there is none; then it has no numbers.
    """

    run: Id
    metric: Name
    rows: Count
    models: Annotated[dict[Model, Estimate], Meta(max_length=3)]
    gains: Annotated[dict[Model, Estimate], Meta(max_length=2)] = {}
    rounds: Annotated[dict[Model, Count], Meta(max_length=2)] = {}
    recommended: Model = "shared"
    cut: Annotated[tuple[Model, ...], Meta(max_length=2)] = ()
    missing: Missing | None = None


def without_numbers(run: str, missing: Missing) -> Comparison:
    """The message of a peer that has no comparison."""
    return Comparison(run=run, metric="", rows=0, models={}, missing=missing)


def recommend(gains: dict[Model, Estimate]) -> Model:
    """The model for this peer, by the gains over the shared one."""
    sure = {model: gain.value for model, gain in gains.items() if gain.low > 0}
    return max(sure, key=lambda model: sure[model], default="shared")


def lines_of(found: Comparison) -> list[str]:
    """The comparison for people: a line for each model, and what is recommended."""
    lines = []
    for model in ("alone", "shared", "personal"):
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
