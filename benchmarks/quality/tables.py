"""Tables of real data that come with packages, and what is public about them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from protocols.errors import CommonweightError
from protocols.tables.preprocessing import Feature, Preprocessing, Target

#: One row of so many is at no peer.
_OTHERS_OF = 5


class Table(NamedTuple):
    """A data set. `ranges`: the public range of each column of numbers.

    `peers` have its rows at random, and `shared` of them have enough noise together. `rounds`: what
    `--choose` tries.
    """

    rows: pa.Table
    target: str
    classes: tuple[str, ...]
    ranges: dict[str, tuple[float, float]]
    categories: dict[str, tuple[str, ...]]
    with_gaps: frozenset[str]
    peers: int
    shared: int
    rounds: tuple[int, ...]

    def preprocessing(self) -> Preprocessing:
        """The middle of the range becomes 0. The scale is a quarter of the range, since the range
        of a few hundred rows has about four standard deviations."""
        numbers = [
            Feature(
                name=name,
                kind="number",
                mean=(low + high) / 2,
                scale=(high - low) / 4,
                missing=name in self.with_gaps,
            )
            for name, (low, high) in self.ranges.items()
        ]
        texts = [
            Feature(name=name, kind="text", categories=values)
            for name, values in self.categories.items()
        ]
        return Preprocessing(
            features=(*numbers, *texts),
            target=Target(name=self.target, kind="text", classes=self.classes),
        )

    def split(self) -> tuple[pa.Table, pa.Table]:
        """The rows of all peers, and the others."""
        order = np.random.default_rng(0).permutation(len(self.rows))
        others = len(order) // _OTHERS_OF
        return self.rows.take(order[others:]), self.rows.take(order[:others])


def breast_cancer() -> Table:
    """569 biopsies of the breast, benign or malignant (Wolberg et al. 1995), in scikit-learn. The
    ranges are those of its description."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer()
    names = [str(name) for name in data.feature_names]
    found = re.findall(r":\s+([\d.]+)\s+([\d.]+)\n", data.DESCR)[: len(names)]
    ranges = {
        name: (float(low), float(high)) for name, (low, high) in zip(names, found, strict=True)
    }
    columns: dict[str, Any] = {name: data.data[:, place] for place, name in enumerate(names)}
    classes = tuple(sorted(map(str, data.target_names)))
    columns["diagnosis"] = [str(data.target_names[one]) for one in data.target]
    rows = pa.table(columns)
    return Table(rows, "diagnosis", classes, ranges, {}, frozenset(), 5, 4, (10, 20, 40, 80))


def flchain() -> Table:
    """7,874 people above 50, dead or alive after up to 14 years, by age, sex and blood tests
    (Dispenzieri et al. 2012), in scikit-survival. The ranges are those of the study (age, year) and
    the reference ranges of laboratories (free light chains in mg/dL, creatinine in mg/dL)."""
    from importlib.util import find_spec

    found = find_spec("sksurv")
    if found is None or found.origin is None:
        raise CommonweightError(
            "the table flchain is in scikit-survival", "pip install --no-deps scikit-survival"
        )
    text = (Path(found.origin).parent / "datasets/data/flchain.arff").read_text()
    head, _, body = text.partition("@data\n")
    names = re.findall(r"@attribute (\S+)", head)
    table = pa_csv.read_csv(
        pa.BufferReader(body.encode()),
        pa_csv.ReadOptions(column_names=names),
        convert_options=pa_csv.ConvertOptions(null_values=["?"], strings_can_be_null=True),
    )
    ranges = {
        "age": (50.0, 100.0),
        "sample.yr": (1995.0, 2003.0),
        "kappa": (0.33, 1.94),
        "lambda": (0.57, 2.63),
        "creatinine": (0.6, 1.2),
    }
    rows = table.select([*ranges, "sex", "death"])
    return Table(
        rows, "death", ("alive", "dead"), ranges, {"sex": ("F", "M")}, frozenset({"creatinine"}),
        peers=10, shared=7, rounds=(10, 20, 40),
    )  # fmt: skip


TABLES: dict[str, Callable[[], Table]] = {"breast cancer": breast_cancer, "flchain": flchain}
