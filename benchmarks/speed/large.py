"""What a version of several gigabytes costs in memory, on the way through coordinator and peers.

    python -m benchmarks.speed.large [--gb 4] [--keep]

A coordinator and two agents as processes. The first agent trains for a round and is paused. Then
the second one trains for a round from the version that the first one has. The agents share versions
(`share`), so it comes from there. Needs about nine times the size on the disk, and twice in memory.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.speed import ours, report
from benchmarks.speed.cases import GB, Case
from tests.support.fleet_harness import Fleet, fleet
from tests.support.waiting import wait_for

_FIRST, _SECOND = "first", "second"
_WITHIN_S = 3600.0


def measured(gigabytes: float) -> dict[str, Any]:
    """Peak memory by process, and the bytes that came from the coordinator and from a peer."""
    case = Case("large", 2, round(gigabytes * GB), 1, 0)
    with (
        tempfile.TemporaryDirectory(prefix="cw-large-") as folder,
        fleet(Path(folder), COMMONWEIGHT_AGENT_SHARE="on") as made,
    ):
        made.up()
        made.join(_FIRST, _SECOND)
        made.start(_FIRST)
        trained = _round_of(made, case)
        sent = _sent(made)
        assert made.ask("peers", "pause", _FIRST).returncode == 0
        made.start(_SECOND)
        version = made.home / "versions" / f"{trained['digest']}.safetensors"
        shared = _round_of(made, case, "--from", str(version))
        wait_for(lambda: _sent(made) - sent >= case.model_bytes, "it came from the first agent")
        peaks = ours.peaks(made)
        return {
            "version_bytes": case.model_bytes,
            "coordinator_peak_bytes": peaks["coordinator"],
            "agent_peak_bytes": peaks["agent"],
            "bytes_down": shared["bytes_down"],
            "bytes_from_peer": _sent(made) - sent,
        }


def _sent(made: Fleet) -> int:
    """What the first agent has sent so far, to the coordinator and to peers."""
    return int(json.loads((made.folder / _FIRST / "traffic.json").read_bytes())["up"])


def _round_of(made: Fleet, case: Case, *words: str) -> dict[str, Any]:
    """What was recorded of a run of one round by one peer."""
    run = made.start_run(
        "ping", "--set", f"kilobytes={case.kilobytes}", *words, "--rounds", "1", "--quorum", "1",
        "--keep-versions", "1", "--deadline", "1h",
    )  # fmt: skip
    shown: dict[str, Any] = {}

    def ended() -> bool:
        shown.update(made.run(run))
        return shown["state"] in ("finished", "stopped", "failed")

    wait_for(ended, "the run ended", within_s=_WITHIN_S, every_s=5.0)
    assert shown["state"] == "finished", shown["ended_because"]
    (closed,) = shown["history"]
    return dict(closed)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.large", description=__doc__)
    parser.add_argument("--gb", type=float, default=4.0)
    parser.add_argument("--keep", action="store_true", help="write the results to docs/bench")
    asked = parser.parse_args()
    found = measured(asked.gb)
    print(found)
    if asked.keep:
        report.keep("large", found)


if __name__ == "__main__":
    main()
