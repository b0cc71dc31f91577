"""python -m benchmarks.speed [--full|--tiny] [--only WORD] [--no-stock] [--no-load] [--out DIR]"""

from __future__ import annotations

import argparse
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import figures
from benchmarks.speed import cases, codecs, floor, load, ours, report, stock, training
from benchmarks.speed.cases import Case
from benchmarks.speed.figures import merged

_ROOT = Path(__file__).resolve().parents[2]
_OUT = _ROOT / "docs" / "bench"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--full",
        action="store_true",
        help="all cases; writes the tables of docs/benchmarks.md and the README too",
    )
    size.add_argument("--tiny", action="store_true", help="only to see that the benchmark works")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-stock", action="store_true", help="leave stock Flower out")
    parser.add_argument("--no-load", action="store_true", help="leave the load client out")
    parser.add_argument("--load", action="store_true", help="only the load client")
    parser.add_argument("--present", type=int, help="only the load client, with so many agents")
    parser.add_argument("--working", type=int, default=1_000, help="of those, in the rounds")
    parser.add_argument("--kilobytes", type=int, default=10, help="the size of their model")
    parser.add_argument("--rounds", type=int, default=3, help="after the first one")
    parser.add_argument("--within", type=float, default=load.RUN_WITHIN_S, help="s for all rounds")
    parser.add_argument("--out", type=Path, default=_OUT, help="where the results go")
    asked = parser.parse_args()
    # Handle SIGTERM like Ctrl-C, so that we end the processes that we have started.
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))

    results: dict[str, Any] = {"machine": report.machine(), "cases": []}
    results |= {"codecs": [], "training": [], "load": [], "idle": {}}
    chosen = cases.FULL if asked.full else cases.TINY if asked.tiny else cases.QUICK
    only_load = asked.load or asked.present
    for case in chosen:
        if asked.only in case.name and not only_load:
            _say(case.name)
            results["cases"].append(_measured(case, with_stock=not asked.no_stock))
            report.write(asked.out, results)
    if asked.only in "training" and not only_load:
        _say("training")
        courses = training.FULL if asked.full else training.TINY if asked.tiny else training.QUICK
        with _folder() as folder:
            results["training"] = training.measure(courses, folder, 1 if asked.tiny else 3)
    if asked.only == "" and not only_load:
        _say("codecs")
        results["codecs"] = codecs.run(4 if asked.tiny else 64)
    if asked.only == "" and not only_load and (asked.full or asked.tiny):
        _say("at rest")
        with _folder() as folder:
            results["idle"] = ours.idle(folder, 1, 20.0 if asked.full else 3.0)
    if not asked.no_load and (asked.full or asked.tiny or only_load):
        for present, working, rounds in _loads(asked):
            _say(f"{present} stand-ins, {working} of them in rounds")
            with _folder() as folder:
                found = load.run(present, working, rounds, folder, asked.kilobytes, asked.within)
                results["load"].append(found)
            report.write(asked.out, results)
    report.write(asked.out, results)
    if len(results["cases"]) > 1:
        report.plot(asked.out, results)
    report.show(results)
    if asked.full and asked.out == _OUT and not (asked.only or asked.no_stock or asked.no_load):
        figures.write_tables()


def _loads(asked: argparse.Namespace) -> tuple[tuple[int, int, int], ...]:
    if asked.present:
        return ((asked.present, min(asked.present, asked.working), asked.rounds),)
    return cases.TINY_LOADS if asked.tiny else cases.LOADS


def _measured(case: Case, *, with_stock: bool) -> dict[str, Any]:
    """Measure one row: alternating passes of ours and of stock Flower, and the floor."""
    with_stock = with_stock and case.stock_rounds > 0
    own, theirs = [], []
    with _folder() as folder:
        least = floor.measure(case, folder, 5 if case.model_bytes < 100 * cases.MB else 3)
    for _ in range(case.passes):
        with _folder() as folder:
            own.append(ours.run(case, folder))
        if with_stock:
            with _folder() as folder:
                theirs.append(stock.run(case, folder))
    wire = None
    if with_stock and case.counted:
        once = case._replace(rounds=2, stock_rounds=1)
        with _folder() as folder, _folder() as other:
            wire = (
                ours.run(once, folder, counted=True),
                stock.run(once, other, counted=True),
            )
    return report.row(case, merged(own), merged(theirs) if theirs else None, least, wire)


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="commonweight-bench-") as folder:
        yield Path(folder)


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


if __name__ == "__main__":
    main()
