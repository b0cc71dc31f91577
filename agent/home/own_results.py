"""What runs brought to this machine: comparisons of models on its own held-out rows, in its home.

A folder for each run that this machine trained in: the run, the result, and the weights of the
models that were trained here alone. `agent.clientapp.own_comparison` writes them.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import replace

from protocols.messages import comparisons
from protocols.messages.comparisons import Comparison, Missing, Model
from protocols.messages.envelope import Settings

FOLDER = "comparisons"
#: Older ones are deleted, with their models.
MAX_RUNS = 8
_RUN, _RESULT = "run.json", "result.json"

#: The owner's setting.
Compare = Annotated[
    Literal["on", "local", "off"],
    Meta(
        description="after a run, compare a model of your rows alone with the shared one: on, and "
        "tell the coordinator the metrics of plain runs; local, only show them here; off"
    ),
]


class OwnModel(Struct, frozen=True):
    """A model that a run has trained before its last one: the number of its first weights, and the
    settings."""

    begun: int
    settings: Settings


class OwnRun(Struct, frozen=True, kw_only=True):
    """A run that this machine trained in. `settings`: those of its last training, of a model whose
    first weights have the number `begun`; `earlier`: the models before, in order.

    `is_local`: the run was secure or had noise, so that no metric of this machine alone leaves.
    `trained_s`: how long its trainings took here, in seconds.
    """

    run: str
    task: str
    settings: Settings
    is_local: bool
    trained_s: float = 0.0
    begun: int = 0
    earlier: tuple[OwnModel, ...] = ()

    def settings_of(self, number: int) -> Settings:
        """The settings with which the version of this number was trained."""
        models = (*self.earlier, OwnModel(self.begun, self.settings))
        found = [one.settings for one in models if one.begun <= number]
        return found[-1] if found else models[0].settings


class OwnResult(Struct, frozen=True, kw_only=True):
    """The comparison after a run, or why there is none.

    `digest`: the run's best version, made in `round`, and `model`: its kind, if the run trained
    several. `at`: Unix s. `why`: the reason as text, `missing`: the word for it that the
    coordinator gets. `is_told`: the coordinator has it; `to_tell`: it is to get it.
    """

    run: str
    task: str
    at: float
    round: int = 0
    digest: str = ""
    model: str = ""
    comparison: Comparison | None = None
    why: str = ""
    missing: Missing | None = None
    is_told: bool = False
    to_tell: bool = False


def folder_of(home: Path, run: str) -> Path:
    """The folder of a run. Its id came from the network, so no part of it enters a path."""
    return home / FOLDER / hashlib.sha256(run.encode()).hexdigest()[:32]


def folders(home: Path) -> list[Path]:
    """The folders of runs, the newest first."""
    try:
        found = [home / FOLDER / name for name in os.listdir(home / FOLDER)]
        return sorted(found, key=lambda path: -(path / _RUN).stat().st_mtime)
    except OSError:
        return []


def run_file(folder: Path) -> Path:
    return folder / _RUN


def result_file(folder: Path) -> Path:
    return folder / _RESULT


def model_file(folder: Path, model: Model) -> Path:
    """The weights of a model that was trained here, or of the shared one."""
    return folder / f"{model}.safetensors"


def read_run(folder: Path) -> OwnRun | None:
    """The run of a folder; None if it is incomplete."""
    try:
        return msgspec.json.decode(run_file(folder).read_bytes(), type=OwnRun)
    except (OSError, msgspec.DecodeError):
        return None


def read_result(folder: Path) -> OwnResult | None:
    """The result in a folder; None if there is none yet."""
    try:
        return msgspec.json.decode(result_file(folder).read_bytes(), type=OwnResult)
    except (OSError, msgspec.DecodeError):
        return None


def results(home: Path) -> list[OwnResult]:
    """All results, that of the newest run first."""
    return [found for folder in folders(home) if (found := read_result(folder)) is not None]


def recommended(
    home: Path, run: str, model: Model | None = None
) -> tuple[Model, Path, OwnRun] | None:
    """The model that is recommended here after a run, or this one, if it is in the home: one that
    was trained here, or the best version of a run that trained several models."""
    folder = folder_of(home, run)
    result, of = read_result(folder), read_run(folder)
    if result is None or of is None or result.comparison is None:
        return None
    model = model or result.comparison.recommended
    file = model_file(folder, model)
    if not file.exists():
        return None
    return model, file, replace(of, settings=of.settings_of(result.round))


def newest(home: Path) -> OwnResult | None:
    """The result of the newest run that has one."""
    return next(iter(results(home)), None)


def lines_of(found: OwnResult) -> list[str]:
    """A result for its owner."""
    if (of := found.comparison) is None:
        return [f"run {found.run}: no comparison: {found.why}"]
    kept = f", model {found.model}," if found.model else ""
    return [
        f"run {found.run}{kept} on {of.rows} held-out rows of yours, with intervals of 95 %:",
        *comparisons.lines_of(of),
    ]
