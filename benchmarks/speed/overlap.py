"""Which part of the time peers train for, with and without `--overlap 1`, on slow lines.

    python -m benchmarks.speed.overlap [--keep] [--rounds 6] [--case 0 1 2 3 4]

A coordinator and two agents as processes, each agent behind a line of its own (`fault_proxy`). A
step takes 20 ms, as it sleeps: so two cores act as three machines. The result is the time of the
steps, divided by that from the first step of the run to the last one. Versions are evaluated each
round, which takes no time here, and agents do not share them. Without overlap there are no
fragments, but as many bytes: that run has rounds of the whole model and as many times the steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults.paced import BYTES_PER_MBIT, MARK, fleet, paced
from benchmarks.faults.site import Site
from benchmarks.speed import report
from tests.support.fault_proxy import Fault

STEP_S, UP_MBIT, PARAMETERS = 0.02, 2.0, 1_000_000
NAMES = ("ada", "bob")
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "bench" / "overlap-results.json"


class Case(NamedTuple):
    """A line down in Mbit/s, a codec, the steps of a round, and the fragments of the model."""

    down_mbit: float
    codec: str
    steps: int
    fragments: int = 1


CASES = (
    Case(2, "sparse2:64", 200),
    Case(16, "int8", 400),
    Case(2, "int8", 1100),
    Case(2, "int8", 300, 5),
    Case(2, "int8", 400),
)


def utilisation(made: Site, case: Case, rounds: int, overlap: int) -> dict[str, Any]:
    """The share of the time in which the slower peer trains, and the bytes of a round."""
    fragments = case.fragments if overlap else 1
    steps = case.steps * (case.fragments // fragments)
    logs = [made.folder / name / "trainer" / "trainer.log" for name in NAMES]
    before = [len(_intervals(log)) for log in logs]
    plain = ("server_learning_rate=1", "server_momentum=0", "keep_optimiser=false")
    words = [word for argument in plain for word in ("--strategy-arg", argument)]
    run = made.start_run(
        made.paced, "--strategy", "diloco", *words,
        "--rounds", str(rounds), "--quorum", "2", "--codec", case.codec, "--set",
        f"max_steps={steps}", "--overlap", str(overlap), "--fragments", str(fragments),
        "--deadline", "30m",
    )  # fmt: skip
    made.outcome(run, within_s=1500.0)
    shown = made.run(run)
    assert [len(closed["contributors"]) for closed in shown["history"]] == [2] * rounds
    shares = []
    for log, skip in zip(logs, before, strict=True):
        trained = _intervals(log)[skip:]
        assert len(trained) == rounds
        worked = sum(end - begin for begin, end in trained)
        shares.append(worked / (trained[-1][1] - trained[0][0]))
    last = shown["history"][-1]
    return {"share": round(min(shares), 3), "bytes_up": last["bytes_up"] // 2,
            "bytes_down": last["bytes_down"] // 2}  # fmt: skip


def _intervals(log: Path) -> list[tuple[float, float]]:
    if not log.exists():
        return []
    lines = [line.partition(MARK)[2].split() for line in log.read_text().splitlines()]
    return [(float(line[0]), float(line[1])) for line in lines if line]


def measured(rounds: int, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """A row for each case."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="cw-overlap-") as text:
        source = paced(PARAMETERS, STEP_S)
        with fleet(Path(text), NAMES, NAMES, source) as (made, lines):
            for case in cases:
                for line in lines.values():
                    line.fault = Fault(
                        line_bytes_per_s=UP_MBIT * BYTES_PER_MBIT,
                        line_down_bytes_per_s=case.down_mbit * BYTES_PER_MBIT,
                    )
                found = [
                    utilisation(made, case, rounds * (case.fragments if overlap else 1), overlap)
                    for overlap in (0, 1)
                ]
                row = {
                    **case._asdict(),
                    "up_mbit": UP_MBIT,
                    "parameters": PARAMETERS,
                    "waiting": found[0]["share"],
                    "overlapped": found[1]["share"],
                    "bytes_up": found[1]["bytes_up"],
                    "bytes_down": found[1]["bytes_down"],
                }
                print(row, flush=True)
                rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.overlap", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="write the results to docs/bench")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--case", type=int, nargs="+", default=[*range(len(CASES))])
    asked = parser.parse_args()
    kept = json.loads(RESULTS.read_bytes())["rows"] if RESULTS.exists() else []
    rows = {_case(row): row for row in kept}
    rows |= {_case(row): row for row in measured(asked.rounds, [CASES[n] for n in asked.case])}
    if asked.keep:
        report.keep("overlap", {"rows": [rows[case] for case in CASES if case in rows]})


def _case(row: dict[str, Any]) -> Case:
    return Case(row["down_mbit"], row["codec"], row["steps"], row.get("fragments", 1))


if __name__ == "__main__":
    main()
