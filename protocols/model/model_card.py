"""The model card of an exported model: its run, task, contributors and metrics. Pure.

A JSON file beside the safetensors file: `gait.safetensors`, `gait.json`. It is for people and for
programs other than commonweight. `commonweight-agent models export` reads it to convert the model.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
from msgspec import Struct

from protocols.errors import UsageError
from protocols.model.weights import Schema, file_digest

KIND = "commonweight model 1"
MAX_BYTES = 64 * 1024 * 1024


class TensorCard(Struct, frozen=True):
    """The dtype, as named by safetensors, and the shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


class Contributor(Struct, frozen=True):
    """A peer whose updates are in the model, and the number of rounds with one."""

    peer: str
    name: str
    rounds: int


class ModelCard(Struct, frozen=True, kw_only=True):
    """What is known about a model.

    `sha256` is that of the file, `version` the digest of the run's version; they differ if versions
    hold more than the model. `parents`: the versions before it, newest first, down to the first
    weights. `traits`: what all peers had in common, such as the classes.
    """

    kind: str = KIND
    sha256: str
    version: str
    run: str
    round: int
    task: str
    task_version: str = ""
    settings: dict[str, str | int | float | bool] = {}
    seed: int = 0
    strategy: str = ""
    tensors: dict[str, TensorCard]
    traits: dict[str, tuple[str, ...]] = {}
    parents: tuple[str, ...] = ()
    contributors: tuple[Contributor, ...] = ()
    metrics: dict[str, float | None] = {}
    made_by: str = ""


def tensor_cards(schema: Schema) -> dict[str, TensorCard]:
    return {name: TensorCard(spec.dtype, spec.shape) for name, spec in sorted(schema.items())}


def card_path(model: Path) -> Path:
    """The path of the card of this file."""
    return model.with_suffix(".json")


def encode(card: ModelCard) -> bytes:
    return msgspec.json.format(msgspec.json.encode(card), indent=2) + b"\n"


def read(model: Path) -> ModelCard:
    """The card of an exported model, checked against its file. Raises UsageError."""
    path = card_path(model)
    try:
        with path.open("rb") as file:
            card = msgspec.json.decode(file.read(MAX_BYTES), type=ModelCard)
        found = file_digest(model)
    except OSError as err:
        raise UsageError(
            f"cannot read {err.filename}: {err.strerror}",
            "commonweight models export RUN MODEL.safetensors writes both files",
        ) from err
    except (msgspec.DecodeError, UnicodeDecodeError) as err:
        raise UsageError(f"{path} is not a model card: {err}") from err
    if card.kind != KIND:
        raise UsageError(f"{path} is a card of an unknown kind: {card.kind!r}")
    if card.sha256 != found:
        raise UsageError(
            f"{model} does not match its card {path.name}: the SHA-256 differs",
            "copy both files again",
        )
    return card
