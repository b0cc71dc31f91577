"""What the cases of one fault came to: a row of the table and of fault-results.json."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Row:
    """One fault. `figure` is what FAULTS.md asks for; `worst` the largest of the cases' figures."""

    fault: str
    about: str
    cases: int = 0
    passed: int = 0
    violations: list[str] = field(default_factory=list)
    figure: str = ""
    seed: str = ""
    worst: float = 0.0

    def add(self, case: str, seed: int, found: Sequence[str], figure: float = 0.0) -> None:
        """Count one case; what was found is said at once, with what is needed to see it again."""
        self.cases += 1
        self.passed += not found
        self.worst = max(self.worst, figure)
        if str(seed) not in self.seed.split():
            self.seed = f"{self.seed} {seed}".strip()
        self.violations += [f"{case}, seed {seed}: {text}" for text in found]
        told = "; ".join(found) or "ok"
        print(f"  {case} (seed {seed}): {told}, {figure:.1f}", flush=True)


def table(rows: Sequence[Row]) -> str:
    """The rows for a person."""
    lines = [f"{'fault':58} {'cases':>8} {'violations':>10}  figure"]
    for row in rows:
        figure = f"{row.figure} ({row.about})" if row.about else row.figure
        lines.append(f"{row.fault[:58]:58} {row.cases:8,} {len(row.violations):10}  {figure}")
    return "\n".join(lines)


def _number(fault: str) -> int:
    """Of the first row of the fault list that a row here is about."""
    found = re.match(r"\d+", fault)
    return int(found[0]) if found else 99


def write(path: Path, rows: Sequence[Row], uncovered: dict[str, str]) -> None:
    """The results as one JSON file; rows of faults that were not played this time stay in it."""
    told: list[dict[str, Any]] = [
        {
            "fault": row.fault,
            "cases": row.cases,
            "violations": len(row.violations),
            "figure": row.figure,
            "seed": row.seed,
        }
        for row in rows
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    played = {row["fault"] for row in told}
    if path.exists():
        before = json.loads(path.read_text())["rows"]
        told = [row for row in before if row["fault"] not in played] + told
    told.sort(key=lambda row: (_number(row["fault"]), row["fault"]))
    whole = {"rows": told, "not_covered": uncovered}
    path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")
