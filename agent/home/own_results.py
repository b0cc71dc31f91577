"""What runs brought to this machine: comparisons of models on its own held-out rows, in its home.

A folder for each run that this machine trained in: the run, the result, and the weights of the
models that were trained here alone. `agent.clientapp.own_comparison` writes them.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from msgspec import Meta, Struct

from protocols.local.atomic_files import read_json
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
        "tell the coordinator the metrics of plain runs; local, only show them here; off, only "
        "fetch its best version"
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

    @property
    def models(self) -> tuple[OwnModel, ...]:
        """All models that this machine trained, in order."""
        return (*self.earlier, OwnModel(self.begun, self.settings))

    def model_of(self, number: int) -> OwnModel:
        """The model that the version of this number is of."""
        found = [one for one in self.models if one.begun <= number]
        return found[-1] if found else self.models[0]

    def settings_of(self, number: int, model: str = "") -> Settings:
        """The settings with which the version of this number was trained. `model`: its kind, if it
        is known; this machine may not have trained it."""
        settings = self.model_of(number).settings
        return settings | {"model": model} if model else settings


class OwnResult(Struct, frozen=True, kw_only=True):
    """The comparison after a run, or why there is none.

    `digest`: the run's best version, made in `round`; `model`: its kind, for a table, and `choice`:
    what the run says of it, for the owner. `at`: Unix s. `why`: the reason as text, `missing`: the
    word for it that the coordinator gets. `is_told`: the coordinator has it; `to_tell`: it is to
    get it.
    """

    run: str
    task: str
    at: float
    round: int = 0
    digest: str = ""
    model: str = ""
    choice: str = ""
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


def result_files(home: Path) -> list[Path]:
    """The results of ended runs."""
    return [file for folder in folders(home) if (file := result_file(folder)).exists()]


def model_file(folder: Path, model: Model) -> Path:
    """The weights of a model that was trained here, or of the shared one."""
    return folder / f"{model}.safetensors"


def other_file(folder: Path, begun: int) -> Path:
    """The version that a model of the run was trained from last here, whose first weights have this
    number (`agent.clientapp.other_models`)."""
    return folder / f"other-{begun}.safetensors"


def read_run(folder: Path) -> OwnRun | None:
    """The run of a folder; None if it is incomplete."""
    return read_json(run_file(folder), OwnRun)


def read_result(folder: Path) -> OwnResult | None:
    """The result in a folder; None if there is none yet."""
    return read_json(result_file(folder), OwnResult)


def results(home: Path) -> list[OwnResult]:
    """All results, that of the newest run first."""
    return [found for folder in folders(home) if (found := read_result(folder)) is not None]


class ModelFile(NamedTuple):
    """A model in the home after a run: its file, the settings of its training, and the result."""

    model: Model
    path: Path
    settings: Settings
    result: OwnResult


def recommended(home: Path, run: str, model: Model | None = None) -> ModelFile | None:
    """The model that is recommended here after a run, or this one, if it is in the home: one that
    was trained here, or the best version of the run."""
    folder = folder_of(home, run)
    result, of = read_result(folder), read_run(folder)
    if result is None or of is None:
        return None
    model = model or (result.comparison.recommended if result.comparison else "shared")
    file = model_file(folder, model)
    if not file.exists():
        return None
    return ModelFile(model, file, of.settings_of(result.round, result.model), result)


def best_versions(home: Path) -> list[ModelFile]:
    """The best versions of ended runs that are in the home, that of the newest run first."""
    found = (recommended(home, result.run, "shared") for result in results(home))
    return [one for one in found if one is not None]


def newest(home: Path) -> OwnResult | None:
    """The result of the newest run that has one."""
    return next(iter(results(home)), None)


def text_of_model(run: str, choice: str, found: OwnResult | None) -> str:
    """The text for the owner about the model of a run: `choice`, which came with its work, or after
    the end which model is kept."""
    return found.choice if found is not None and found.run == run and found.choice else choice


def text_of_better(home: Path, run: str, digest: str) -> str:
    """Why another version than this one may be better, as the end of a sentence; empty if this is
    the best version of an ended run, or if nothing is known of the run."""
    folder = folder_of(home, run)
    result = read_result(folder)
    if result is None and read_run(folder) is None:
        return ""
    if result is None:
        why = "as far as this machine knows, the run has not ended; it may keep a better version"
    elif result.digest and result.digest != digest:
        why = f"the run has kept another version, after round {result.round}"
    else:
        return ""
    return f"; {why}. The coordinator has it: --run {run}"


def lines_of(found: OwnResult) -> list[str]:
    """A result for its owner."""
    if (of := found.comparison) is None:
        return [f"run {found.run}: no comparison: {found.why}"]
    kept = f", model {found.model}," if found.model else ""
    return [
        f"run {found.run}{kept} on {of.rows} held-out rows of yours, with intervals of 95 %:",
        *comparisons.lines_of(of),
    ]
