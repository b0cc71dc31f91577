"""python -m benchmarks.quality.models [--held-out | --trees] [--only WORD] [--again] [--out FILE]

Models of the task `tabular` on real tables that packages ship: what three peers learn together,
what the best one learns alone, and what XGBoost learns from all rows. Writes
`docs/quality/tables-results.json`: AUC or RMSE on a quarter of the rows, which no peer has. A table
with results is only measured again with `--again`.

All runs have the options that `commonweight run start` gives them, so they end by themselves, and
their best version counts. The personal model is trained by the agent's own comparison.

`--held-out`: of tables that no default was chosen by, what a run gives without any setting. Writes
`docs/quality/tables-held-out.json`. Of a table whose results have no blend, only this is measured,
if the run gives the same shared model again.

`--trees`: trees of secure sums beside XGBoost with the same cuts and the same rows to train on.
Writes `docs/quality/secure-trees.json`.

Needs `xgboost-cpu`, and the packages of `real_tables` or `held_out_tables`; a table whose package
is absent is left out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec.structs import replace

from agent.data.settings import DataSettings
from benchmarks import figures
from benchmarks.quality.central import Central, cuts_of
from benchmarks.quality.held_out_tables import HELD_OUT
from benchmarks.quality.real_tables import TABLES, Array, Table
from benchmarks.quality.table_models import (
    Peers,
    Trained,
    alone,
    blend,
    choose,
    keep,
    order,
    own,
    prepare,
    together,
)
from protocols.tables.model_scores import MODELS, Model

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "quality"
RESULTS, HELD_OUT_RESULTS = FOLDER / "tables-results.json", FOLDER / "tables-held-out.json"
TREES_RESULTS = FOLDER / "secure-trees.json"
#: The shares of the rows that peers at random have; grouped ones have a third each.
SHARES = (0.6, 0.3, 0.1)
SPLITS = {False: "60, 30 and 10 %", True: "grouped"}
#: Enough for trees.
MANY_ROUNDS = 10_000
#: Every fourth row is at no peer, and is used to test.
TEST_OF = 4


class Split(NamedTuple):
    """A table on disk: the rows of each peer, of all peers, and those of the test."""

    table: Table
    parts: list[DataSettings]
    every: DataSettings
    test: Path

    @property
    def first(self) -> DataSettings:
        """The peer with the most rows, if they are at random."""
        return self.parts[0]


Scores = Callable[[Split], dict[str, Any]]


def places_of(table: Table, *, grouped: bool, seed: int = 0) -> list[Array]:
    """Places of the rows of each peer, and last those of the test."""
    shuffled = np.random.default_rng(seed).permutation(len(table))
    test, rest = np.split(shuffled, [len(table) // TEST_OF])
    if grouped:
        return [*np.array_split(table.by_group(rest), len(SHARES)), np.sort(test)]
    ends = (np.cumsum(SHARES)[:-1] * len(rest)).astype(int)
    return [*np.split(rest, ends), np.sort(test)]


def split(table: Table, folder: Path, *, grouped: bool) -> Split:
    """Write the parts of a table to a folder."""
    *places, test = places_of(table, grouped=grouped)
    paths = [table.write(folder / f"{number}.csv", at) for number, at in enumerate(places)]
    parts = [DataSettings(path=str(p), device="cpu", index=n) for n, p in enumerate(paths)]
    whole = table.write(folder / "all.csv", np.concatenate(places))
    every = DataSettings(path=str(whole), device="cpu", min_count=1)
    return Split(table, parts, every, table.write(folder / "test.csv", test))


def every_model(of: Split) -> dict[str, Any]:
    """What all peers learn together: each model, the one that a run with `--rounds` chooses, and
    trees of a run with `--secure`. `personal`: the chosen one after further training at the first
    peer."""
    found = {model: together(of.table, of.parts, of.test, model) for model in MODELS}
    (chosen,) = choose(of.table, of.parts, _agreed(of).settings, rounds=MANY_ROUNDS)
    return {
        **{model: one.test for model, one in found.items()},
        "secure": together(of.table, of.parts, of.test, "trees", secure=True).test,
        "chosen": chosen,
        "auto": found[chosen].test,
        "personal": own(of.first, of.test, found[chosen]),
        "alone": best_alone(of, of.parts),
        **_central(of),
    }


def by_default(of: Split) -> dict[str, Any]:
    """What a run gives without any setting, and with `--secure`; and trees with `--secure`."""
    plain, masked = (_models(of, secure=secure) for secure in (False, True))
    chosen, secure = keep(of.table, plain), keep(of.table, masked)
    return {
        "chosen": chosen,
        "auto": plain[chosen].test,
        "tried": _told(plain),
        "personal": own(of.first, of.test, plain[chosen]),
        **blend(of.first, of.test, plain, chosen),
        "secure_chosen": secure,
        "secure": masked[secure].test,
        "secure_tried": _told(masked),
        "secure_trees": masked["trees"].test,
        "alone": best_alone(of, [of.first]),
        **_central(of),
    }


def _models(of: Split, *, secure: bool) -> dict[Model, Trained]:
    """All models that a run without any setting trains."""
    chosen = choose(of.table, of.parts, _agreed(of).settings, secure=secure)
    return {m: together(of.table, of.parts, of.test, m, secure=secure) for m in chosen}


def add_blend(row: dict[str, Any]) -> dict[str, Any] | None:
    """An older row of `by_default` with the blend; None if the run gives another model now."""
    table = HELD_OUT[row["table"]]()
    with tempfile.TemporaryDirectory(prefix="commonweight-tables-") as folder:
        of = split(table, Path(folder), grouped=False)
        plain = _models(of, secure=False)
        kept = keep(of.table, plain)
        if (kept, plain[kept].test) != (row["chosen"], row["auto"]):
            return None
        return {**row, **blend(of.first, of.test, plain, kept)}


def secure_trees(of: Split) -> dict[str, Any]:
    """Trees of secure sums, also with `data.min_count` 1 at each peer, and XGBoost with the same
    cuts: on the rows of all peers together, of which each peer holds out the same ones."""
    ones = [replace(part, min_count=1) for part in of.parts]
    peers = prepare(ones, of.test, order(of.table, "trees", len(of.parts)).settings)
    return {
        "secure": together(of.table, of.parts, of.test, "trees", secure=True).test,
        "secure_one": together(of.table, ones, of.test, "trees", secure=True).test,
        "central_cuts": Central(peers, cuts_of(peers)).score(),
    }


def _told(tried: Mapping[Model, Trained]) -> dict[str, dict[str, Any]]:
    """Of each model, the metrics of its best version on the rows that peers hold out, and its score
    on those of the test."""
    best = {model: one.standing.best for model, one in tried.items()}
    return {
        model: {
            **{name: round(v, 6) for name, v in closed.metrics.items() if v is not None},
            "decisive": {n: round(v, 6) for n, v in closed.decisive.items() if v is not None},
            "round": closed.round,
            "test": tried[model].test,
        }
        for model, closed in best.items()
        if closed is not None
    }


def _agreed(of: Split) -> Peers:
    return prepare(of.parts, of.test, order(of.table, "trees", len(of.parts)).settings)


def best_alone(of: Split, parts: Sequence[DataSettings]) -> float:
    """The best score of these peers alone. Each chooses of the three models by the rows that it
    holds out."""
    best = max if of.table.kind == "classification" else min
    return best(
        best(
            (alone(of.table, part, of.test, model) for model in MODELS),
            key=lambda one: one.held_out,
        ).test
        for part in parts
    )


def _central(of: Split) -> dict[str, float]:
    peers = prepare([of.every], of.test, order(of.table, "trees", 1).settings)
    cuts = cuts_of(peers)
    return {
        "central": Central(peers).score(),
        "central_cuts": Central(peers, cuts).score(),
        "central_defaults": Central(peers).score_of_defaults(),
    }


def measure(name: str, scores_of: Scores, *, grouped: bool) -> dict[str, Any]:
    """A row of the results. Raises ImportError for an absent package."""
    importlib.import_module("xgboost")
    table, began = (HELD_OUT if scores_of is by_default else TABLES)[name](), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="commonweight-tables-") as folder:
        of = split(table, Path(folder), grouped=grouped)
        scores = scores_of(of)
    return {
        "table": name,
        "rows": len(table) - len(table) // TEST_OF,
        "split": SPLITS[grouped],
        "metric": "AUC" if table.kind == "classification" else "RMSE",
        **scores,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.models", description=__doc__
    )
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--held-out", action="store_true", help="tables that chose no default")
    kinds.add_argument("--trees", action="store_true", help="secure trees beside XGBoost")
    parser.add_argument("--only", default="", help="tables whose name contains this")
    parser.add_argument("--again", action="store_true", help="measure what was measured before")
    parser.add_argument("--out", type=Path, help="where the results go")
    options = parser.parse_args()
    names = list(HELD_OUT if options.held_out else TABLES)
    scores_of, usual = every_model, RESULTS
    if options.held_out:
        scores_of, usual = by_default, HELD_OUT_RESULTS
    elif options.trees:
        scores_of, usual = secure_trees, TREES_RESULTS
    out: Path = options.out or usual
    rows = json.loads(out.read_bytes())["rows"] if out.exists() else []
    wanted = [
        (name, grouped)
        for grouped in ((False,) if options.held_out else (True, False))
        for name in names
        if options.only in name
    ]
    for name, grouped in wanted:
        of = [row for row in rows if (row["table"], row["split"]) == (name, SPLITS[grouped])]
        is_old = options.held_out and of and "blend" not in of[0]
        if of and not options.again and not is_old:
            continue
        try:
            made = add_blend(of[0]) if is_old and not options.again else None
            made = made or measure(name, scores_of, grouped=grouped)
        except ImportError as err:
            print(f"{name}: left out, {err}", file=sys.stderr)
            continue
        rows = [row for row in rows if row not in of] + [made]
        rows.sort(key=lambda row: (names.index(row["table"]), row["split"]))
        out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        print(made, flush=True)
    if options.out is None:
        figures.write_tables()
    return 0


if __name__ == "__main__":
    sys.exit(main())
