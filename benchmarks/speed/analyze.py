"""Analytics queries over 337,000 flights of 16 carriers, one peer each, compared with pandas.

    python -m benchmarks.speed.analyze [--rows 336776]

The table has the columns and sizes of nycflights13, generated from a seed. Each peer answers in a
process of its own like an agent, with disclosure rules and log.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import msgspec
import numpy as np
import pandas as pd

from agent.analytics import job_handler
from agent.home import settings
from coordinator.cli.analysis_table import format_figure
from coordinator.jobs.analysis import combine, validate
from protocols.analytics.mergeable_states import PeerAnswer
from protocols.analytics.parser import parse_query

#: Carriers and their shares of a year's flights from New York.
CARRIERS = {
    "UA": 58665, "B6": 54635, "EV": 54173, "DL": 48110, "AA": 32729, "MQ": 26397, "US": 20536,
    "9E": 18460, "WN": 12275, "VX": 5162, "FL": 3260, "AS": 714, "F9": 685, "YV": 601, "HA": 342,
    "OO": 32,
}  # fmt: skip
EXACT = (
    "count, missing(dep_delay), sum(distance), mean(dep_delay), var(arr_delay), std(air_time), "
    "cov(distance, air_time), corr(dep_delay, arr_delay), histogram(distance, 20, 0, 5000)"
)
SKETCHED = "quantile(arr_delay, 0.5), quantile(distance, 0.9), distinct(tailnum), distinct(dest)"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.analyze", description=__doc__)
    parser.add_argument("--rows", type=int, default=sum(CARRIERS.values()))
    rows = parser.parse_args().rows
    flights = made(rows)
    with tempfile.TemporaryDirectory(prefix="cw-analyze-") as text:
        peers = _peers(Path(text), flights)
        for asked in (EXACT, SKETCHED, "count, mean(dep_delay) by origin, month"):
            _measure(asked, peers, flights)


def made(rows: int) -> pd.DataFrame:
    """A year of flights, generated from a seed."""
    chance = np.random.default_rng(2013)
    share = np.array(list(CARRIERS.values()), float)
    carrier = chance.choice(list(CARRIERS), rows, p=share / share.sum())
    distance = np.round(chance.gamma(2.0, 520.0, rows) + 80)
    dep = np.round(chance.exponential(20.0, rows) - 8)
    arr = dep + np.round(chance.normal(-6, 18, rows))
    lost = chance.random(rows) < 0.0245
    minutes = chance.normal(20, 9, rows)
    return pd.DataFrame(
        {
            "month": chance.integers(1, 13, rows),
            "dep_delay": np.where(lost, np.nan, dep),
            "arr_delay": np.where(lost, np.nan, arr),
            "carrier": carrier,
            "tailnum": [f"N{n}" for n in chance.integers(10_000, 14_044, rows)],
            "origin": chance.choice(["EWR", "JFK", "LGA"], rows),
            "dest": [f"D{n:02}" for n in chance.integers(0, 105, rows)],
            "air_time": np.where(lost, np.nan, np.round(distance / 7.5 + minutes)),
            "distance": distance,
        }
    )


def _peers(folder: Path, flights: pd.DataFrame) -> dict[str, Path]:
    found = {}
    for carrier, part in flights.groupby("carrier"):
        home = folder / str(carrier)
        home.mkdir()
        part.to_csv(home / "flights.csv", index=False)
        settings.change(home, analyze="on", data=str(home / "flights.csv"), data_min_count=5)
        found[str(carrier)] = home
    return found


def _measure(text: str, peers: dict[str, Path], flights: pd.DataFrame) -> None:
    asked, told, sizes, began = parse_query(text), {}, {}, time.monotonic()
    for peer, home in peers.items():
        body = job_handler.answer(asked, home)
        sizes[peer] = len(body)
        told[peer] = msgspec.json.decode(body, type=PeerAnswer)
        assert not validate(asked, told[peer]), validate(asked, told[peer])
    found = combine(asked, told, list(told))
    seconds = time.monotonic() - began
    print(f"\n{text}\n  {found.label}, {seconds:.1f} s one peer after the other")
    print(f"  bytes that left: {', '.join(f'{p} {n:,}' for p, n in sizes.items())}")
    if text == EXACT:
        print(
            f"  largest relative error beside pandas: {_exact_error(found.groups[0], flights):.1e}"
        )
    elif text == SKETCHED:
        _show_sketches(found.groups[0].figures, flights)
    else:
        means = flights.groupby(["origin", "month"]).dep_delay.mean()
        errors = [abs(g.figures[1] - means[g.group[0], int(g.group[1] or 0)]) for g in found.groups]  # type: ignore[operator]
        print(f"  {len(found.groups)} groups; largest difference {max(errors):.1e}")


def _exact_error(group: object, flights: pd.DataFrame) -> float:
    figures = list(group.figures)  # type: ignore[attr-defined]
    bins = figures.pop()
    expected = [
        len(flights),
        flights.dep_delay.isna().sum(),
        flights.distance.sum(),
        flights.dep_delay.mean(),
        flights.arr_delay.var(),
        flights.air_time.std(),
        flights.distance[flights.air_time.notna()].cov(flights.air_time.dropna()),
        flights.dep_delay.corr(flights.arr_delay),
    ]
    counts = np.histogram(flights.distance, 20, (0, 5000))[0]
    assert bins["counts"] == counts.tolist()
    return float(np.max(np.abs(np.array(figures, float) / np.array(expected, float) - 1)))


def _show_sketches(figures: tuple[object, ...], flights: pd.DataFrame) -> None:
    for got, column, q in ((figures[0], "arr_delay", 0.5), (figures[1], "distance", 0.9)):
        exact = flights[column].quantile(q, interpolation="lower")
        share = (flights[column].dropna() <= float(got)).mean()  # type: ignore[arg-type]
        print(f"  quantile({column}, {q:g}): {got:g} for {exact:g}, which is at {share:.1%}")
    for got, column in ((figures[2], "tailnum"), (figures[3], "dest")):
        exact = flights[column].nunique()
        print(f"  distinct({column}): {format_figure(got)} for {exact}")  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
