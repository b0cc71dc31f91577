"""The tables of the demo: every row is in one clinic's file, each with its own order of columns."""

from __future__ import annotations

import csv
from pathlib import Path

from coordinator.cli.demo import datasets


def test_each_row_is_in_one_table(tmp_path: Path) -> None:
    paths = datasets.write(tmp_path, 5, seed=3)
    tables = [list(csv.DictReader(path.open())) for path in paths]
    sizes = [len(table) for table in tables]
    assert sum(sizes) == 569
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 4
    orders = [tuple(table[0]) for table in tables]
    assert len(set(orders)) == 5
    assert len({frozenset(order) for order in orders}) == 1
    rows = {tuple(sorted(row.items())) for table in tables for row in table}
    assert len(rows) == 569
    assert {row[datasets.TARGET] for row in tables[-1]} == {"benign", "malignant"}
