"""Exports a version for other programs: a safetensors file and a model card with its origin."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from coordinator.runs import candidates
from coordinator.runs.state import Run
from protocols import VERSION
from protocols.errors import CommonweightError, UnknownName, UsageError
from protocols.local.atomic_files import replacing
from protocols.local.os_errors import os_errors_as
from protocols.model import model_card, personalization, weights
from protocols.model.model_card import Contributor, ModelCard
from protocols.model.weights import Schema

_SUFFIX = ".safetensors"


def resolve_version(run: Run, which: str) -> str:
    """The digest of "best", "latest", or a prefix of a digest. Raises UnknownName."""
    if which == "best":
        digests = [run.best.digest] if run.best else []
    elif which == "latest":
        newest = run.head or (run.history[-1].digest if run.history else "")
        digests = [newest] if newest else []
    else:
        first = (run.first, *(one.first for one in run.trained))
        known = {*first, run.head, *(closed.digest for closed in run.history)} - {""}
        digests = [digest for digest in known if which and digest.startswith(which)]
    if len(digests) != 1:
        raise UnknownName(f"run {run.id} has no version {which!r}", "commonweight models list")
    return digests[0]


def build_card(
    run: Run, version: str, sha256: str, schema: Schema, names: Mapping[str, str]
) -> ModelCard:
    """The card of a version of this run. `names`: the peers' names by id."""
    run = candidates.of_version(run, version)
    upto = next((n for n, closed in enumerate(run.history, 1) if closed.digest == version), 0)
    is_open = version == run.head and version != run.first and not upto  # its round is not closed
    rounds = run.history if is_open else run.history[:upto]
    rounds = tuple(closed for closed in rounds if closed.round > run.begun)
    counted = Counter(peer for closed in rounds for peer in closed.contributors)
    counted.update(run.contributors if is_open else ())
    # Preprocessing is part of a model of tables.
    shared = {"preprocessing": run.preprocessing} if run.preprocessing else {}
    lineage = (run.first, *(closed.digest for closed in rounds))
    return ModelCard(
        sha256=sha256,
        version=version,
        run=run.id,
        round=run.round if is_open else upto and rounds[-1].round,
        task=run.spec.task,
        task_version=run.card.version if run.card else "",
        settings={**run.spec.settings, **shared},
        seed=run.spec.seed,
        strategy=run.spec.strategy,
        tensors=model_card.tensor_cards(schema),
        traits=run.card.traits if run.card else {},
        parents=tuple(digest for digest in reversed(lineage) if digest != version),
        contributors=tuple(
            Contributor(peer, names.get(peer, ""), count) for peer, count in sorted(counted.items())
        ),
        metrics=dict(rounds[-1].metrics) if upto else {},
        made_by=f"commonweight {VERSION}",
    )


def check_target(out: Path) -> None:
    """Raise CommonweightError unless a model and its card can be written here."""
    card_path = model_card.card_path(out)
    if card_path == out:
        raise UsageError(
            "the model and its card would be one file", "name the model MODEL.safetensors"
        )
    if out.suffix not in ("", _SUFFIX):
        raise UsageError(
            f"this command writes safetensors, not {out.suffix}",
            f"name it {out.with_suffix(_SUFFIX).name}; for ONNX: commonweight-agent models export",
        )
    for taken in (out, card_path):
        if taken.exists():
            raise CommonweightError(f"{taken} exists already", "choose another name")


def export(file: Path, run: Run, version: str, names: Mapping[str, str], out: Path) -> str:
    """Write the model in a version's file, and its card. Returns the version's digest.

    Raises CommonweightError.
    """
    check_on_disk(file, run, version)
    check_target(out)
    model = personalization.without_controls(weights.load(file))
    with os_errors_as(CommonweightError, f"cannot write {out}", "name a file in a folder of yours"):
        sha256 = weights.save(model, out)
        with replacing(model_card.card_path(out)) as card:
            card.write(model_card.encode(build_card(run, version, sha256, model.schema, names)))
    return version


def check_on_disk(file: Path, run: Run, version: str) -> None:
    """Raise UnknownName unless the version is on the coordinator's disk."""
    if not file.exists():
        raise UnknownName(
            f"version {version[:12]} of run {run.id} is no longer on disk",
            "commonweight models list",
        )
