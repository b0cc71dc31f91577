"""Trains one course with one seed; stores and loads its results as JSON."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from agent.data.settings import DataSettings
from agent.tasks.demo.mnist import Mnist
from benchmarks.quality.courses import Course
from benchmarks.quality.fleet import fleet_of
from coordinator.runs.state import Round
from coordinator.storage.run_events import RunSpec
from protocols.errors import CommonweightError
from protocols.model import weights

#: A list of numbers.
_NUMBERS = re.compile(r"\[[\d\s.,eE+null-]*\]")
RESULTS = "quality-results.json"
Row = dict[str, Any]


def measure(course: Course, seed: int, rounds: int, cache: str) -> Row:
    """Train the course from its first weights; accuracies and losses by round. `newcomer`: the
    accuracy without the peers' own layers, where `accuracy` is with them."""
    accuracy: list[float | None] = []
    newcomer: list[float | None] = []
    loss: list[float | None] = []
    bytes_up: list[int] = []

    def note(closed: Round) -> None:
        accuracy.append(_rounded(closed.metrics.get(course.metric)))
        newcomer.append(_rounded(closed.metrics.get("accuracy")))
        loss.append(_rounded(closed.metrics.get(course.metric.replace("accuracy", "loss"))))
        bytes_up.append(closed.bytes_up)

    began = time.monotonic()
    with fleet_of(course.parts(seed, cache), attack=course.attack) as fleet:
        if course.judged:
            judge = _judge(fleet.lane.version_path, course.spec(seed, rounds), cache)
            noted, note = note, lambda closed: noted(judge(closed))
        try:
            run = fleet.run(course.spec(seed, rounds), note)
            chosen = accuracy[run.best.round - 1] if run.best else None
        except CommonweightError:  # diverged: it reads no better than chance from here on
            chosen = 0.0
            accuracy += [0.0] * (rounds - len(accuracy))
    return {
        "course": course.name,
        "split": course.split,
        "codec": course.codec,
        "strategy": course.strategy,
        "strategy_args": dict(course.strategy_args),
        "settings": dict(course.settings),
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "bytes_up_a_round": statistics.mean(bytes_up),
        **figures(accuracy),
        "accuracy": accuracy,
        "loss": loss,
        **({"newcomer": newcomer} if course.metric != "accuracy" else {}),
        **({"chosen": chosen} if course.judged else {}),
    }


def _judge(path_of: Callable[[str], Path], spec: RunSpec, cache: str) -> Callable[[Round], Round]:
    """Puts the accuracy on all held-out digits in place of what the peers report."""
    task = Mnist()
    task.load(DataSettings(seed=spec.seed, cache=cache, device="cpu"))

    def judge(closed: Round) -> Round:
        found = task.evaluate(weights.load(path_of(closed.digest)), spec.settings, lambda *_: None)
        return replace(closed, metrics=dict(found.metrics))

    return judge


def figures(accuracy: list[float | None]) -> dict[str, Any]:
    """Best and last accuracy, and the rounds until 90, 92 and 93 % (None if not reached)."""
    told = [value if value is not None else 0.0 for value in accuracy]
    reached = {
        f"to_{percent}": next(
            (number for number, value in enumerate(told, 1) if value >= percent / 100), None
        )
        for percent in (90, 92, 93)
    }
    return {"best": max(told), "end": told[-1], **reached}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def read(folder: Path) -> list[Row]:
    """The earlier rows; none if there is no file."""
    try:
        rows: list[Row] = json.loads((folder / RESULTS).read_text())["rows"]
    except FileNotFoundError:
        return []
    return rows


def write(folder: Path, new: Iterable[Row]) -> list[Row]:
    """Replace older rows of the same course and seed; return all rows."""
    rows = {(row["course"], row["seed"]): row for row in (*read(folder), *new)}
    ordered = [rows[key] for key in sorted(rows)]
    machine = {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "numpy", "flwr", "commonweight")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    about = (
        "accuracy of the shared model on the held-out digits after each round; where there is a "
        "newcomer's, accuracy and loss are those with each peer's own layers"
    )
    body = {"about": about, "machine": machine, "rows": ordered}
    text = json.dumps(body, indent=1)
    # One line per curve, not per number.
    text = _NUMBERS.sub(lambda found: " ".join(found.group().split()), text)
    (folder / RESULTS).write_text(text + "\n")
    return ordered
