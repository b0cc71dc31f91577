"""What a version of several gigabytes costs in memory, on the way through coordinator and peers.

    python -m benchmarks.speed.large [--gb 4] [--rounds 4] [--keep]

A coordinator and two agents as processes, one of which trains in each round, as the trainer has the
whole model in memory. The agents share versions (`share`), so the other one gets a version from
there. Needs about nine times the size on the disk, and twice in memory.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speed import ours, report
from benchmarks.speed.cases import GB, Case
from tests.support.waiting import wait_for

_WITHIN_S = 3600.0


def measured(gigabytes: float, rounds: int) -> dict[str, Any]:
    """Peak memory by process, and what went over the coordinator's and the peers' connections."""
    case = Case("large", 2, round(gigabytes * GB), rounds, 0)
    with (
        tempfile.TemporaryDirectory(prefix="cw-large-") as folder,
        ours.started(case.agents, Path(folder)) as (fleet, _),
    ):
        run = fleet.start_run(
            "ping", "--set", f"kilobytes={case.kilobytes}", "--rounds", str(rounds),
            "--quorum", "1", "--select", "1x", "--keep-versions", "1", "--deadline", "1h",
        )  # fmt: skip
        shown: dict[str, Any] = {}

        def ended() -> bool:
            shown.update(fleet.run(run))
            return shown["state"] in ("finished", "stopped", "failed")

        wait_for(ended, "the run ended", within_s=_WITHIN_S, every_s=5.0)
        assert shown["state"] == "finished", shown["ended_because"]
        peers = {peer for closed in shown["history"] for peer in closed["contributors"]}
        peaks = ours.peaks(fleet)
        down = sum(closed["bytes_down"] for closed in shown["history"])
        return {
            "version_bytes": case.model_bytes,
            "rounds": rounds,
            "peers": len(peers),
            "coordinator_peak_bytes": peaks["coordinator"],
            "agent_peak_bytes": peaks["agent"],
            "bytes_down": down,
        }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.large", description=__doc__)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--keep", action="store_true", help="write the results to docs/bench")
    asked = parser.parse_args()
    found = measured(asked.gb, asked.rounds)
    print(found)
    if asked.keep:
        report.keep("large", found)


if __name__ == "__main__":
    main()
