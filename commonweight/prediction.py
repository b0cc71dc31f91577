"""Predicts rows of Python with a version, by the task's code on this machine."""

from __future__ import annotations

import csv
import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from agent.cli.local_trainer import LocalTrainer, paths_of
from agent.cli.models import LocalModel, with_task
from agent.home import settings
from coordinator.jobs import model_refs
from coordinator.runs.state import Run
from protocols.errors import UsageError
from protocols.local import homes
from protocols.local.cli_entry import printable

log = logging.getLogger("commonweight")

#: A list of dicts, a pandas DataFrame, an array [n, …], or a path or text.
Rows = Any


def predict(run: Run, file: Path, rows: Any, source: str = "") -> list[dict[str, Any]]:
    """One dict for each row. `file`: the version; `source`: the file and class of its task, if it
    is not registered here. Raises CommonweightError."""
    model_refs.check_whole(run)
    model = LocalModel(file, run.spec.task, model_refs.settings_of(run))
    chosen = with_task(settings.read(homes.home_path("agent")), model, source)
    with tempfile.TemporaryDirectory(prefix="commonweight-") as folder:
        table = source_of(rows, Path(folder))
        with LocalTrainer(chosen, Path(folder), [file, *paths_of(table)]) as trainer:
            batches = trainer.predict(model, table)
            for line in trainer.said():
                log.warning("%s", printable(line))
            return [
                dict(zip(batch, row, strict=True))
                for batch in batches
                for row in zip(*batch.values(), strict=True)
            ]


def simulated_source(home: Path) -> str:
    """The file and class of the task of a simulation in this home; empty for any other home."""
    if not (home / homes.SIMULATION).exists():
        return ""
    from commonweight.simulation.simulate import Simulation

    return Simulation.open(home).source


def source_of(rows: Any, folder: Path) -> str:
    """What a task reads: a path or a text as it is, else the rows in a CSV file in `folder`.

    Raises UsageError.
    """
    if isinstance(rows, str | Path):
        return str(rows)
    names, values = _names_and_values(rows)
    if not values:
        raise UsageError("there are no rows to predict", "give one or more")
    table = folder / "rows.csv"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(values)
    return str(table)


def _names_and_values(rows: Any) -> tuple[list[str], list[list[Any]]]:
    if hasattr(rows, "itertuples"):  # a data frame
        plain = rows.astype(object).where(rows.notna(), None)
        return list(map(str, rows.columns)), plain.to_numpy().tolist()
    if hasattr(rows, "reshape") and rows.ndim >= 2:  # an array
        values = rows.reshape(len(rows), -1).tolist() if rows.size else []
        return [f"x{number}" for number in range(len(values[0]) if values else 0)], values
    if not isinstance(rows, Iterable) or hasattr(rows, "reshape"):
        raise _not_rows()
    given = list(rows)
    if not all(isinstance(row, Mapping) for row in given):
        raise _not_rows()
    names = list(dict.fromkeys(name for row in given for name in row))
    return list(map(str, names)), [[row.get(name) for name in names] for row in given]


def _not_rows() -> UsageError:
    return UsageError(
        "the rows must be a list of dicts, a data frame, an array [n, …] or a path",
        'run.predict([{"age": 41}])',
    )
