"""Tables for tests of readers, and their expected statistics."""

from __future__ import annotations

import csv
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Rows = list[dict[str, Any]]


def mixed(count: int) -> Rows:
    """Rows with all kinds of columns and of missing values, and text that needs quoting."""
    return [
        {
            "age": "" if n % 7 == 0 else str(20 + n % 50),
            "income": f"{1000.5 * n:.2f}" if n % 11 else "NA",
            "member": "true" if n % 3 else "False",
            "since": f"20{10 + n % 12}-0{1 + n % 9}-1{n % 10}",
            "city": ["Bern", "Zürich", " Basel ", 'a "b", c', "n/a"][n % 5],
            "note": f"only once {n}",
            "empty": "",
            "label": "yes" if n % 3 else "no",
        }
        for n in range(count)
    ]


MIXED = mixed(200)


def write_csv(path: Path, rows: Rows, columns: Sequence[str] = (), separator: str = ",") -> Path:
    names = list(columns or rows[0])
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, delimiter=separator, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def patients(path: Path, count: int, seed: int, turn: float = 1.0) -> Path:
    """Who is ill follows from three numbers; `turn` -1 turns it around."""
    chance = np.random.default_rng(seed)
    x = chance.normal(size=(count, 3))
    ill = turn * (x @ [2.0, -1.5, 1.0]) + 0.3 * chance.normal(size=count) > 0
    cost = 50 + 10 * (x @ [1.0, 2.0, -1.0]) + chance.normal(size=count)
    rows = [
        {"a": a, "b": b, "c": c, "ill": "ny"[int(i)], "cost": f"{y:.3f}"}
        for (a, b, c), i, y in zip(x, ill, cost, strict=True)
    ]
    return write_csv(path, rows)


def write_parquet(path: Path, rows: Rows) -> Path:
    columns = {name: [row[name] or None for row in rows] for name in rows[0]}
    pq.write_table(pa.table(columns), path, row_group_size=64)
    return path


def write_sqlite(path: Path, rows: Rows) -> str:
    """The address of a table with these rows, all of them text."""
    with closing(sqlite3.connect(path)) as made, made:
        made.execute(f"CREATE TABLE people ({', '.join(rows[0])})")
        values = [[row[name] or None for name in rows[0]] for row in rows]
        made.executemany(f"INSERT INTO people VALUES ({', '.join('?' * len(rows[0]))})", values)
    return f"sqlite:///{path}?table=people"
