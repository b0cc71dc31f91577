"""Journeys for minutes, with a new seed or a given one. `make journeys MINUTES=30 SEED=7`

`SEED=7.3` plays sequence 3 of seed 7 again, alone.
"""

from __future__ import annotations

import argparse
import secrets
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.journeys import invariants
from tests.journeys.fleet import JourneyFleet
from tests.journeys.machine import Coverage, Violation, possible_pairs, run_sequence
from tests.journeys.operations import OPERATIONS

STEPS = 30


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", default="")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of a sequence")
    parser.add_argument("--keep", type=Path, help="folder for the fleets with a violation")
    given = parser.parse_args()
    # As Ctrl-C does: the fleet ends too.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    base, _, only = (given.seed or str(secrets.randbelow(1_000_000))).partition(".")
    until, number, found = time.monotonic() + given.minutes * 60, 0, []
    coverage = Coverage(len(possible_pairs()))
    while time.monotonic() < until:
        # A violation ends a sequence early: the next ones are planned as if it had not.
        planned = set(coverage.planned)
        run_sequence(int(base) + number, given.steps, coverage)
        after, coverage.planned = coverage.planned, planned
        if not only or int(only) == number:
            name = f"{base}.{number}"
            if said := play(name, int(base) + number, given, coverage, until):
                found.append(f"make journeys SEED={name}\n{said}")
            report(base, coverage, found)
        coverage.planned = after
        if only and int(only) == number:
            break
        number += 1
    print("\n\n".join(found))
    return bool(found)


def play(
    name: str, number: int, given: argparse.Namespace, coverage: Coverage, until: float
) -> str:
    """Run one sequence on a fleet of its own; its violation, or an empty text."""
    folder = Path(tempfile.mkdtemp(prefix=f"journey-{name}-"))
    print(f"sequence {name} in {folder}", flush=True)
    fleets: list[JourneyFleet] = []

    def make_fleet() -> JourneyFleet:
        fleets.append(JourneyFleet(folder))
        return fleets[0]

    def say(text: str) -> None:
        print(f"  {time.strftime('%H:%M:%S')} {text}", flush=True)

    try:
        run_sequence(number, given.steps, coverage, make_fleet, until, say)
        if left := [text for fleet in fleets for text in invariants.at_end(fleet)]:
            raise Violation("\n".join(left))
    except (Violation, AssertionError) as err:
        print(f"VIOLATION {name}\n{err}", flush=True)
        if given.keep:
            shutil.copytree(folder, given.keep / name, dirs_exist_ok=True, symlinks=True)
        return str(err)
    finally:
        coverage.sequences += 1
        shutil.rmtree(folder, ignore_errors=True)
    return ""


def report(base: str, coverage: Coverage, found: list[str]) -> None:
    pairs = (
        f"{len(coverage.run)} of {coverage.possible} possible pairs of {len(OPERATIONS)} operations"
    )
    print(
        f"seed {base}: {coverage.steps} steps, {coverage.sequences} sequences, {pairs}, "
        f"{len(found)} violations",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
