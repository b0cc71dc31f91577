"""Results of a fault's cases: as a row of the table, of fault-results.json, and of the docs."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


@dataclass
class Row:
    """One fault. `figure` is what FAULTS.md asks for, `about` says what that is; a `{worst}` in it
    stands for `worst`, the largest of the cases' figures."""

    fault: str
    about: str
    cases: int = 0
    passed: int = 0
    violations: list[str] = field(default_factory=list)
    figure: str = ""
    seed: str = ""
    worst: float = 0.0

    def add(self, case: str, seed: int, found: Sequence[str], figure: float = 0.0) -> None:
        """Count one case; print a finding at once, with the arguments to reproduce it."""
        self.cases += 1
        self.passed += not found
        self.worst = max(self.worst, figure)
        if str(seed) not in self.seed.split():
            self.seed = f"{self.seed} {seed}".strip()
        self.violations += [f"{case}, seed {seed}: {text}" for text in found]
        told = "; ".join(found) or "ok"
        print(f"  {case} (seed {seed}): {told}, {figure:.1f}", flush=True)

    def entry(self) -> Entry:
        """The row for the results file."""
        return {
            "fault": self.fault,
            "cases": self.cases,
            "violations": len(self.violations),
            "figure": self.figure.format(worst=self.worst),
            "about": self.about,
            "worst": round(self.worst, 2),
            "seed": self.seed,
            "load": round(os.getloadavg()[0], 1),
        }

    def entry_with(self, before: Entry) -> Entry:
        """The row merged with an earlier part, which had other seeds."""
        both = self.entry() | {
            key: self.entry()[key] + before[key] for key in ("cases", "violations")
        }
        worst = max(self.worst, before["worst"])
        seeds = sorted({*before["seed"].split(), *self.seed.split()})
        told = {"figure": self.figure.format(worst=worst), "worst": worst, "seed": " ".join(seeds)}
        return both | told


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    lines = [f"{'fault':58} {'cases':>8} {'violations':>10}  figure"]
    for row in rows:
        figure = row.entry()["figure"] + (f" ({row.about})" if row.about else "")
        lines.append(f"{row.fault[:58]:58} {row.cases:8,} {len(row.violations):10}  {figure}")
    return "\n".join(lines)


def _number(fault: str) -> int:
    """The number of the first row of the fault list in this row."""
    found = re.match(r"\d+", fault)
    return int(found[0]) if found else 99


def write(path: Path, rows: Sequence[Row], uncovered: dict[str, str], *, add: bool = False) -> None:
    """The results as one JSON file; rows of faults that were not played this time stay in it.
    `add`: what was played is a further part of rows that are in it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text())["rows"] if path.exists() else []
    entries: dict[str, Entry] = {entry["fault"]: entry for entry in known}
    for row in rows:
        part = add and row.fault in entries
        entries[row.fault] = row.entry_with(entries[row.fault]) if part else row.entry()
    told = sorted(entries.values(), key=lambda row: (_number(row["fault"]), row["fault"]))
    whole = {"rows": told, "not_covered": uncovered}
    path.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n")


def page(whole: dict[str, Any]) -> str:
    """The results file as a table in Markdown."""
    lines = ["| fault | cases | violations | figure |", "|---|---|---|---|"]
    for row in whole["rows"]:
        about = f" ({row['about']})" if row.get("about") else ""
        told = f"{row['cases']:,} | {row['violations']} | {row['figure']}{about}"
        lines.append(f"| {row['fault']} | {told} |")
    for fault, why in whole["not_covered"].items():
        lines.append(f"| {fault} | – | – | not run: {why} |")
    return "\n".join(lines) + "\n"
