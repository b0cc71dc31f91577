"""How simulated peers describe themselves before round 1, and compare their schema cards."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from coordinator.storage.run_events import RunSpec
from protocols.errors import BadMessage, SchemaMismatch, UpdateRefused
from protocols.messages.work import Work
from protocols.model import schema_card
from protocols.model.schema_card import Description, SchemaCard
from protocols.model.weights import TensorSpec
from protocols.tables import preprocessing
from protocols.tables.statistics import ColumnStatistics, Moments, TableStatistics

#: Separates a claim and its description; neither contains a line end.
_BETWEEN = b"\n"
_FAILED = b"failed "


class Told(NamedTuple):
    """Encode a peer's answer: a claim, with a description if that was requested."""

    claim: bytes
    description: bytes = b""

    def pack(self) -> bytes:
        return _BETWEEN.join(self) if self.description else self.claim


def unpack(payload: bytes) -> Told:
    """Raise UpdateRefused if the peer says that it cannot do the work."""
    if payload.startswith(_FAILED):
        code, _, words = payload.removeprefix(_FAILED).decode().partition(": ")
        raise UpdateRefused(code, words)
    claim, _, description = payload.partition(_BETWEEN)
    return Told(claim, description)


def failure(err: SchemaMismatch) -> bytes:
    return _FAILED + f"{err.code}: {err.message}".encode()


def read(told: Told, digest: str) -> Description:
    """The description that a claim is for. Raises UpdateRefused."""
    if hashlib.sha256(told.description).hexdigest() != digest:
        raise UpdateRefused("bad description", "it is not the one that was claimed")
    try:
        return schema_card.decode(told.description)
    except BadMessage as err:
        raise UpdateRefused("bad description", err.message) from err


def settings(spec: RunSpec, fixed: str) -> dict[str, str | int | float | bool]:
    """The settings of a run as sent to peers."""
    return {**spec.settings, **({"preprocessing": fixed} if fixed else {})}


def describe(work: Work, *, fits: bool) -> Description:
    """A table, if the run needs a preprocessing that is not agreed yet; else a card."""
    fixed = str(work.settings.get("preprocessing", ""))
    if "target" in work.settings and not fixed:
        some = ColumnStatistics(kind="number", moments=Moments(10, 1.0, 2.0))
        return TableStatistics(rows=10, columns={"x": some, "y" if fits else "z": some})
    traits = {"preprocessing": preprocessing.digest(fixed)} if fixed else {}
    return schema_card.make_card("t", "", {"w": TensorSpec("F32", (2 if fits else 3,))}, traits)


def compare(work: Work, *, fits: bool) -> None:
    """Raise SchemaMismatch unless this peer has the schema in the work."""
    if work.kind == "describe" or not work.card:
        return
    own = describe(work, fits=fits)
    if not isinstance(own, SchemaCard):
        raise SchemaMismatch("schema", "a model", "data whose preprocessing is not agreed on")
    if (
        difference := schema_card.first_difference(schema_card.decode_card(work.card), own)
    ) is not None:
        raise difference
