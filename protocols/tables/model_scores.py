"""The scores that a peer sends for the models that a run of `model=auto` chooses from. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from msgspec import Meta, Struct

from protocols.messages.envelope import Name

#: The setting `model` of a run that has not chosen yet.
AUTO = "auto"
Model = Literal["linear", "mlp", "trees"]
#: From the simplest to the most complex. If scores are equal, the simplest is chosen.
MODELS: tuple[Model, ...] = ("linear", "mlp", "trees")
#: At most this many peers of a run compare models: those with the most rows.
MAX_ASKED = 16
#: A cross-validation uses at most this many rows of a peer.
MAX_ROWS = 10_000

#: By name; None for one that is not finite.
Scores = Annotated[dict[Name, float | None], Meta(max_length=32)]


def is_open(task: str, settings: Mapping[str, object]) -> bool:
    """True for a run of tables that has not chosen its model."""
    return task == "tabular" and settings.get("model") == AUTO


def kind_of(task: str, settings: Mapping[str, object]) -> Model | None:
    """The kind of model of a version that was trained with these settings; None if it is not of a
    table."""
    found = settings.get("model")
    return next((one for one in MODELS if task == "tabular" and one == found), None)


class ModelScores(Struct, frozen=True, kw_only=True, tag="models"):
    """The metrics of each model by a cross-validation over `rows` rows of one peer.

    A peer with too few rows sends no metrics and 0 rows. Models that it cannot train are left out.
    """

    rows: Annotated[int, Meta(ge=0, le=MAX_ROWS)] = 0
    metrics: Annotated[dict[Model, Scores], Meta(max_length=len(MODELS))] = {}
