"""`commonweight demo --write-sample FOLDER`: synthetic tables of three clinics.

The rows are random numbers with a fixed seed, not data of persons, and each call writes the same
bytes. The clinics differ in size and in their patients' age, and west separates columns with `;`.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from protocols.errors import UsageError
from protocols.local.os_errors import os_errors_as

TARGET = "readmitted"
#: Rows, mean age and separator of each clinic.
CLINICS = {"north": (600, 58.0, ","), "south": (350, 44.0, ","), "west": (150, 66.0, ";")}
_NEW = "new-patients"
NEW_PATIENTS = f"{_NEW}.csv"
_COLUMNS = ("patient", "age", "sex", "pressure", "smoker", "visits", TARGET)


def write(folder: Path) -> list[Path]:
    """north.csv, south.csv, west.csv, and new-patients.csv without the target.

    Raises UsageError if one of them exists already, or the folder cannot be written.
    """
    random, tables = Random(20), list[Table]()
    for name, (count, mean_age, separator) in (*CLINICS.items(), (_NEW, (20, 55.0, ","))):
        columns = _COLUMNS[:-1] if name == _NEW else _COLUMNS
        rows = [
            {"patient": f"{name}-{number:04}"} | _row(random, mean_age)
            for number in range(1, count + 1)
        ]
        tables.append(Table(f"{name}.csv", columns, rows, separator))
    return write_tables(folder, tables)


class Table(NamedTuple):
    """A CSV file; `rows` may have more than its columns."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Mapping[str, str]]
    separator: str = ","


def write_tables(folder: Path, tables: Sequence[Table]) -> list[Path]:
    """Write new files; raises UsageError as `write` does."""
    for table in tables:
        if (folder / table.name).exists():
            raise UsageError(f"{folder / table.name} exists already", "name another folder")
    with os_errors_as(UsageError, f"cannot write into {folder}", "name another"):
        folder.mkdir(parents=True, exist_ok=True)
        for table in tables:
            with (folder / table.name).open("w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(
                    file, table.columns, delimiter=table.separator, extrasaction="ignore"
                )
                writer.writeheader()
                writer.writerows(table.rows)
    return [folder / table.name for table in tables]


def _row(random: Random, mean_age: float) -> dict[str, str]:
    age = min(95.0, max(18.0, mean_age + 14 * bell(random)))
    sex = random.choice(("female", "male"))
    pressure = 95 + 0.6 * age + 9 * bell(random)
    smoker = random.random() < 0.28
    visits = int(6 * random.random() ** 2)
    score = 0.11 * (age - 55) + 0.09 * (pressure - 128) + 2.2 * smoker + 0.7 * (visits - 2)
    readmitted = random.random() < 1 / (1 + math.exp(-score))
    return {
        "age": f"{age:.0f}",
        "sex": sex,
        # Some values are missing, as in real tables.
        "pressure": "" if random.random() < 0.05 else f"{pressure:.0f}",
        "smoker": "yes" if smoker else "no",
        "visits": str(visits),
        TARGET: "yes" if readmitted else "no",
    }


def bell(random: Random) -> float:
    """An approximately normal number (mean 0, deviation 1), from four uniform ones."""
    return math.sqrt(3.0) * (sum(random.random() for _ in range(4)) - 2.0)
