"""`commonweight demo --write-trial FOLDER`: synthetic tables of a trial at three clinics.

The rows are random numbers with a fixed seed, not data of persons, and each call writes the same
bytes. The clinics write their tables in different ways, as real ones do: lund has YES and NO where
the others have 1 and 0, and turku separates columns with `;` and has decimal commas.
"""

from __future__ import annotations

import math
from pathlib import Path
from random import Random

from coordinator.cli.demo.sample_tables import NEW_PATIENTS, Table, bell, write_tables

#: Rows and mean age of each clinic.
CLINICS = {"bergen": (900, 61.0), "lund": (640, 57.0), "turku": (480, 66.0)}
_KNOWN = ("age", "sex", "bmi", "smoker", "treatment")
COLUMNS = (*_KNOWN, "time", "event", "outcome")
#: The longest observation.
_MONTHS = 36.0
_MISSING = 0.08


def write(folder: Path) -> list[Path]:
    """bergen.csv, lund.csv, turku.csv, and new-patients.csv without what is known at the end.

    `time`: months until death (`event` 1) or the last visit. `outcome`: 1 for a complication.
    Raises UsageError if one of the files exists already, or the folder cannot be written.
    """
    random, tables = Random(36), list[Table]()
    for name, (count, mean_age) in CLINICS.items():
        rows = [
            {"patient": f"{name}-{number:04}"} | _as_written(name, _row(random, mean_age))
            for number in range(1, count + 1)
        ]
        separator = ";" if name == "turku" else ","
        tables.append(Table(f"{name}.csv", ("patient", *COLUMNS), rows, separator))
    new = [{"patient": f"new-{number:04}"} | _row(random, 61.0) for number in range(1, 21)]
    return write_tables(folder, [*tables, Table(NEW_PATIENTS, ("patient", *_KNOWN), new)])


def _as_written(clinic: str, row: dict[str, str]) -> dict[str, str]:
    match clinic:
        case "lund":
            return row | {"smoker": {"1": "YES", "0": "NO", "": ""}[row["smoker"]]}
        case "turku":
            return {name: text.replace(".", ",") for name, text in row.items()}
        case _:
            return row


def _row(random: Random, mean_age: float) -> dict[str, str]:
    age = min(92.0, max(30.0, mean_age + 10 * bell(random)))
    is_male, smokes, is_treated = (random.random() < chance for chance in (0.5, 0.3, 0.5))
    bmi = min(45.0, max(16.0, 26.5 + 4 * bell(random)))
    risk = 0.045 * (age - 60) + 0.35 * is_male + 0.03 * (bmi - 26) + 0.5 * smokes
    months = -math.log(1 - random.random()) * 30 * math.exp(0.6 * is_treated - risk)
    seen = min(_MONTHS, 10 + 40 * random.random())
    complication = random.random() < 1 / (1 + math.exp(0.4 + 0.8 * is_treated - 2 * risk))
    row = {
        "age": f"{age:.0f}",
        "sex": "male" if is_male else "female",
        "bmi": f"{bmi:.1f}",
        "smoker": str(int(smokes)),
        "treatment": "drug" if is_treated else "control",
        "time": f"{min(months, seen):.2f}",
        "event": str(int(months <= seen)),
        "outcome": str(int(complication)),
    }
    for name in ("bmi", "smoker", "outcome"):
        if random.random() < _MISSING:
            row[name] = ""
    return row
