"""python -m benchmarks.quality.models [--only WORD] [--rounds N] [--trees N] [--out FILE]

Models of the task `tabular` on real tables that packages ship: what three peers learn together,
what the largest learns alone, and what one machine learns with all rows. Writes
`docs/quality/tables-results.json`: AUC or RMSE on a quarter of the rows, which no peer has. Of each
training, the version counts that is best on the rows that its peers hold out.

Needs `xgboost-cpu`, and the packages of `real_tables`; a table whose package is absent is left out.

Trees are added up in this process. Masked sums are exact, so a secure run gives the same trees
(tests/coordinator/runs/test_tree_runs.py compares the digests).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from agent.data.features import EncodedRows
from agent.data.settings import DataSettings
from agent.tasks.tabular import Tabular
from agent.tasks.tabular_trees import TreeModel
from benchmarks.quality.fleet import fleet_of
from benchmarks.quality.real_tables import TABLES, Array, Table
from coordinator.storage.run_events import RunSpec
from protocols.model import weights
from protocols.model.built_in_settings import BY_TASK
from protocols.tables import preprocessing
from protocols.tables.trees import growth, layout

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "quality" / "tables-results.json"
#: The shares of the rows that peers at random have; grouped ones have a third each.
SHARES = (0.6, 0.3, 0.1)
#: Every fourth row is at no peer, and is used to test.
TEST_OF = 4
#: Trees between two evaluations.
_EVERY = 5
Settings = Mapping[str, Any]


def split(table: Table, *, grouped: bool, seed: int = 0) -> list[Array]:
    """Places of the rows of each peer, and last those of the test."""
    order = np.random.default_rng(seed).permutation(len(table))
    test, rest = np.split(order, [len(table) // TEST_OF])
    if grouped:
        return [*np.array_split(table.by_group(rest), len(SHARES)), np.sort(test)]
    ends = (np.cumsum(SHARES)[:-1] * len(rest)).astype(int)
    return [*np.split(rest, ends), np.sort(test)]


class Peers(NamedTuple):
    """Rows as a run encodes them: of each peer to train on and held out, and those of the test."""

    settings: Settings
    train: list[EncodedRows]
    held_out: EncodedRows
    test: EncodedRows

    @property
    def is_class(self) -> bool:
        return bool(self._made.target.classes)

    @property
    def _made(self) -> preprocessing.Preprocessing:
        return preprocessing.decode(str(self.settings["preprocessing"]))

    def score(self, outputs: Array, rows: EncodedRows) -> float:
        """AUC of outputs float[n, classes], or RMSE of float[n, 1], in the target's units."""
        from sklearn.metrics import roc_auc_score

        if not self.is_class:
            return float(np.sqrt(np.mean((outputs - rows.y) ** 2))) * self._made.target.scale
        return float(roc_auc_score(rows.y, outputs[:, 1] - outputs[:, 0]))

    def model(self) -> TreeModel:
        chosen = {name: spec.default for name, spec in BY_TASK["tabular"].items()}
        return TreeModel.of(self._made, {**chosen, **self.settings})


def prepare(parts: Sequence[DataSettings], test: Path, settings: Settings) -> Peers:
    """What the peers of a run agree on, and their rows."""
    tasks = [Tabular() for _ in parts]
    for task, part in zip(tasks, parts, strict=True):
        task.load(part)
    surveys = {str(number): task.survey(settings) for number, task in enumerate(tasks)}
    made = preprocessing.derive(surveys, settings).preprocessing
    settings = {**settings, "preprocessing": preprocessing.encode(made)}
    other = Tabular()
    other.load(DataSettings(path=str(test), device="cpu", min_count=1))
    found = [task._sets(settings) for task in tasks]
    held_out = _together([rows for _, rows in found])
    return Peers(settings, [rows for rows, _ in found], held_out, _together(other._sets(settings)))


def _together(parts: Sequence[EncodedRows]) -> EncodedRows:
    return EncodedRows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class Score(NamedTuple):
    """Of the best version, on the rows that its peers hold out, and on the test."""

    held_out: float
    test: float


def network(parts: Sequence[DataSettings], test: Path, settings: Settings, rounds: int) -> Score:
    """A linear model or an MLP, by the real run loop."""
    metric, direction = ("auc", "max") if settings["kind"] == "classification" else ("rmse", "min")
    spec = RunSpec(
        task="tabular", rounds=rounds, quorum=len(parts), settings=dict(settings),
        deadline_s=3600.0, handshake=True, best_metric=metric, best_direction=direction,
    )  # fmt: skip
    with fleet_of(parts) as fleet:
        run = fleet.run(spec)
        assert run.best is not None
        version = weights.load(fleet.lane.version_path(run.best.digest))
    peers = prepare(parts, test, settings)
    assert peers.settings["preprocessing"] == run.preprocessing
    task = Tabular()
    task.load(parts[0])
    outputs = task._ready(version, peers.settings)
    held_out, told = (
        peers.score(outputs(torch.from_numpy(np.asarray(rows.x))).detach().numpy(), rows)
        for rows in (peers.held_out, peers.test)
    )
    return Score(held_out, told)


def trees(peers: Peers, min_count: int, *, masked: bool) -> Score:
    """The best version of the trees that a run grows."""
    model, state = peers.model(), dict[str, Array]()
    version: dict[str, Array] = dict(model.first())
    growing = [model.rows(rows, min_count) for rows in peers.train]
    count, found = sum(len(rows.y) for rows in peers.train), list[Score]()
    slots = {id(rows): model.slots(rows.x) for rows in (peers.held_out, peers.test)}
    for number in range(1 + model.shape.trees * model.shape.depth):
        at, numbers = layout.read(version, model.shape)
        sums = [one.sums(version, at, numbers, masked=masked).astype(np.int64) for one in growing]
        version, state = growth.grow(version, (at, numbers), state, sum(sums), count, bytes(32))
        if number and number % (model.shape.depth * _EVERY) == 0:
            scores = (
                peers.score(
                    model.objective.outputs_of(model.margins(version, slots[id(rows)])), rows
                )
                for rows in (peers.held_out, peers.test)
            )
            found.append(Score(*scores))
    return best(found, is_class=peers.is_class)


def best(found: Sequence[Score], *, is_class: bool) -> Score:
    return (max if is_class else min)(found, key=lambda score: score.held_out)


def xgboost(peers: Peers) -> float:
    """XGBoost on all rows of all peers, with its own cuts and the settings of our trees."""
    import xgboost

    model, rows = peers.model(), _together([*peers.train, peers.held_out])
    count = len(model.gaps)

    def matrix(rows: EncodedRows, y: Array | None = None) -> Any:
        numbers, gap = np.array(rows.x[:, :count]), count
        for place, has_gaps in enumerate(model.gaps):
            if has_gaps:
                numbers[rows.x[:, gap] == 1, place] = np.nan
                gap += 1
        kinds = ["c" if feature.categories else "float" for feature in model.features]
        x = np.concatenate([numbers, rows.x[:, gap:]], 1)
        return xgboost.DMatrix(x, y, feature_types=kinds, enable_categorical=True)

    params = {
        "objective": "binary:logistic" if peers.is_class else "reg:squarederror",
        "base_score": 0.5 if peers.is_class else 0.0,
        "tree_method": "hist",
        "max_depth": model.shape.depth,
        "eta": model.numbers.eta,
        "lambda": model.numbers.l2,
        "min_child_weight": model.numbers.min_weight,
        "nthread": 1,
    }
    booster = xgboost.train(params, matrix(rows, rows.y.reshape(-1)), model.shape.trees)
    margins = np.asarray(booster.predict(matrix(peers.test), output_margin=True), np.float64)
    outputs = model.objective.outputs_of(margins.reshape(-1, 1))
    return peers.score(outputs, peers.test)


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the results for each split."""
    table, made = TABLES[name](), list[dict[str, Any]]()
    with tempfile.TemporaryDirectory(prefix="commonweight-tables-") as folder:
        for grouped in (False, True):
            began = time.monotonic()
            *places, test = split(table, grouped=grouped)
            base = Path(folder, str(grouped))
            base.mkdir()
            other = table.write(base / "test.csv", test)
            parts = [
                DataSettings(
                    path=str(table.write(base / f"{number}.csv", at)), device="cpu", index=number
                )
                for number, at in enumerate(places)
            ]
            path = table.write(base / "all.csv", np.concatenate(places))
            together = [DataSettings(path=str(path), device="cpu", min_count=1)]
            row = _scores(table, parts, other, options)
            if grouped:  # the same rows together as before
                row |= {key: one for key, one in made[0].items() if key.startswith("central")}
            else:
                row |= _central(table, together, other, options)
            numbers = {
                "table": name,
                "rows": sum(map(len, places)),
                "split": "grouped" if grouped else "60, 30 and 10 %",
                "metric": "AUC" if table.kind == "classification" else "RMSE",
                **row,
                "seconds": round(time.monotonic() - began, 1),
            }
            made.append(numbers)
    return made


def _settings(table: Table, model: str, options: argparse.Namespace) -> Settings:
    return {
        "target": table.target, "kind": table.kind, "model": model,
        **({"trees": options.trees} if model == "trees" else {}),
    }  # fmt: skip


def _scores(
    table: Table, parts: list[DataSettings], test: Path, options: argparse.Namespace
) -> dict[str, float]:
    found, least = dict[str, float](), parts[0].min_count
    alone = list[Score]()
    for model in ("linear", "mlp"):
        chosen = _settings(table, model, options)
        found[model] = network(parts, test, chosen, options.rounds).test
        alone.append(network(parts[:1], test, chosen, options.rounds))
    chosen = _settings(table, "trees", options)
    peers = prepare(parts, test, chosen)
    found["trees"] = trees(peers, least, masked=False).test
    found["secure"] = trees(peers, least, masked=True).test
    alone.append(trees(prepare(parts[:1], test, chosen), least, masked=True))
    found["alone"] = best(alone, is_class=peers.is_class).test
    return found


def _central(
    table: Table, together: list[DataSettings], test: Path, options: argparse.Namespace
) -> dict[str, float]:
    found = {
        f"central_{model}": network(
            together, test, _settings(table, model, options), options.rounds
        ).test
        for model in ("linear", "mlp")
    }
    peers = prepare(together, test, _settings(table, "trees", options))
    return {**found, "central_xgboost": xgboost(peers)}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality.models", description=__doc__
    )
    parser.add_argument("--only", default="", help="tables whose name contains this")
    parser.add_argument("--rounds", type=int, default=30, help="of a linear model or an MLP")
    parser.add_argument("--trees", type=int, default=100)
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args()
    rows = json.loads(options.out.read_bytes())["rows"] if options.out.exists() else []
    for name in TABLES:
        if options.only not in name:
            continue
        try:
            made = measure(name, options)
        except ImportError as err:
            print(f"{name}: left out, {err}", file=sys.stderr)
            continue
        rows = [row for row in rows if row["table"] != name] + made
        rows.sort(key=lambda row: list(TABLES).index(row["table"]))
        options.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")
        print(*made, sep="\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
