"""python -m benchmarks.faults [--quick] [--only WORD…] [--seeds N…] [--points P…] [--add] …

Runs all faults of the list that can be tested on one machine, with real processes and in the
simulator. Prints a table, writes docs/faults/fault-results.json and the table in
docs/reliability.md, and exits with 1 if an invariant was violated. You can split a long case:
`--only coordinator --seeds 1`, then `--seeds 2 3 --add`.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from benchmarks import figures
from benchmarks.faults import (
    crashes,
    disk,
    elsewhere,
    job_crashes,
    network,
    results,
    schedules,
    soak,
    stampede,
)
from benchmarks.faults.results import Row

_DOCS = Path(__file__).resolve().parents[2] / "docs"
_OUT = _DOCS / "faults" / "fault-results.json"

Case = Callable[[Path], Row | list[Row]]


def cases(seeds: list[int], points: list[str], *, quick: bool) -> dict[str, Case]:
    """All cases by their word for `--only`, quick ones first."""
    cut_s = 8.0 if quick else 60.0
    many = 200 if quick else 2000
    found: dict[str, Case] = {
        "simulator": lambda _: schedules.simulate(2_000 if quick else 100_000),
        "planted": lambda _: schedules.planted(),
        "broker": network.no_broker,
        "stopped": lambda folder: network.stopped_peer(folder, 4.0 if quick else 10.0),
        "dead": network.lost_peer,
        "late": network.late_update,
        "twins": network.twins,
        "links": lambda folder: network.cut_links(folder, cut_s),
        "lines": lambda folder: network.slow_and_flapping(folder, 10.0 if quick else 60.0),
        "ledger": disk.spoilt_ledger,
        "versions": disk.spoilt_versions,
        "lost": disk.lost_disk,
        "stampede": lambda folder: stampede.real(folder, 50),
        "many": lambda folder: stampede.protocol(folder, many),
        "agent": lambda folder: crashes.agent(folder, seeds, points),
        "trainer": lambda folder: crashes.trainer(folder, seeds, points),
        "coordinator": lambda folder: crashes.coordinator(folder, seeds, points),
        "meeting": lambda folder: crashes.meeting(folder, seeds),
        "job-agent": lambda folder: job_crashes.agent(folder, points),
        "job-infer": lambda folder: job_crashes.coordinator(folder, "infer", points),
        "job-eval": lambda folder: job_crashes.coordinator(folder, "eval", points),
        "job-analyze": lambda folder: job_crashes.coordinator(folder, "analyze", points),
    }
    if disk.can_mount():
        found |= {"full-coordinator": disk.full_coordinator, "full-agent": disk.full_agent}
    if not quick:
        found["elsewhere"] = elsewhere.run
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, shorter faults")
    parser.add_argument("--only", nargs="+", default=[""], help="cases whose word begins so")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the crash cases"
    )
    parser.add_argument("--points", nargs="+", default=[], help="only these, of the crash cases")
    parser.add_argument("--add", action="store_true", help="to the cases that the results hold")
    parser.add_argument("--soak", type=float, default=0.0, help="only the soak, so many minutes")
    parser.add_argument("--seed", type=int, default=0, help="of the soak; 0 is by the clock")
    parser.add_argument("--out", type=Path, default=_OUT, help="where the results go")
    asked = parser.parse_args()
    # Handle SIGTERM like Ctrl-C, also if that is ignored, as in the background of a shell,
    # so that we end the processes that we have started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    seeds = [1] if asked.quick else asked.seeds
    chosen = cases(seeds, asked.points, quick=asked.quick)
    if asked.soak:
        seed = asked.seed or int(time.time())
        chosen = {"soak": lambda folder: soak.soak(folder, asked.soak, seed)}
    rows: list[Row] = []
    for word, case in chosen.items():
        if word.startswith(tuple(asked.only)):
            played = _played(word, case)
            results.write(asked.out, played, _uncovered(), add=asked.add)
            rows += played
    print(results.table(rows))
    if asked.out == _OUT:
        figures.write_tables()
    wrong = [text for row in rows for text in row.violations]
    for text in wrong:
        print(f"VIOLATION {text}", file=sys.stderr)
    return 1 if wrong else 0


def _played(word: str, case: Case) -> list[Row]:
    """The rows of a case. A case that fails counts as a violation, and the others still run."""
    print(f"--- {word}", flush=True)
    with tempfile.TemporaryDirectory(prefix="cwf", ignore_cleanup_errors=True) as folder:
        try:
            found = case(Path(folder))
        except Exception as err:
            traceback.print_exc()
            row = Row(word, "")
            row.add(word, 0, [f"{type(err).__name__}: {str(err)[:300]}"])
            return [row]
    return found if isinstance(found, list) else [found]


def _uncovered() -> dict[str, str]:
    more = (
        {} if disk.can_mount() else {"14, 15 disk full": "needs root on Linux, for a small tmpfs"}
    )
    return elsewhere.NOT_COVERED | more


if __name__ == "__main__":
    sys.exit(main())
