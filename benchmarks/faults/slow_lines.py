"""A large update over slow lines that are cut: the run continues, and no byte is sent in vain.

    python -m benchmarks.faults.slow_lines [--keep] [--megabytes 96] [--mbit 5] [--mode fold]

Replays what users of another system reported: an update of 758 MB over a hospital's line held up
everybody for five hours. Two of five peers have such a line (`fault_proxy`), which is cut with a
chance of 2 % in each MB up. One of the two is killed in the middle of its first upload, as by a
reboot, and starts again when the others have made another version. Bytes are those on the line, all
requests with their TLS included. `--megabytes 758 --train 200 --updates 1` is the whole case. It
takes half an hour for each mode, and 12 GB of memory.
"""

from __future__ import annotations

import argparse
import itertools
import operator
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.faults.paced import BYTES_PER_MBIT, Paced, fleet, paced, write_first
from benchmarks.speed import report
from tests.support.fault_proxy import Fault, Proxy
from tests.support.fleet_harness import descendants
from tests.support.waiting import wait_for

NAMES = ("ada", "bob", "cyd", "dan", "eve")
SLOW, REBOOTED = ("dan", "eve"), "eve"
DOWN_MBIT = 50.0
_STEP_S = 0.1
#: As docs/training.md advises for slow peers.
MODES = {
    "fold": ("--quorum", "3", "--late", "fold"),
    "buffered": ("--mode", "buffered", "--buffer", "3"),
}


class Case(NamedTuple):
    """An update of `megabytes` over a line of `mbit` up; a round's training takes `train_s`."""

    mode: str
    megabytes: float = 96.0
    mbit: float = 5.0
    train_s: float = 20.0
    #: Of each slow peer.
    updates: int = 2
    #: The chance that a line is cut in an MB up.
    cut: float = 0.02

    @property
    def upload_s(self) -> float:
        return self.megabytes * 8 / self.mbit

    @property
    def poll_s(self) -> float:
        """Time between two looks at the ledger, in which a slow line sends 0.1 %."""
        return max(0.2, self.upload_s / 1000)

    @property
    def limit_s(self) -> float:
        """Only a failure takes longer, also on a machine with other work."""
        return 600 + 8 * self.updates * (self.upload_s + self.train_s)


def measured(case: Case) -> dict[str, Any]:
    """A row of the table. Raises AssertionError if an update is lost or counts twice."""
    parameters = int(case.megabytes * 1e6 / 4)
    with (
        tempfile.TemporaryDirectory(prefix="cw-slow-") as text,
        fleet(Path(text), NAMES, SLOW, paced(parameters, _STEP_S)) as (made, lines),
    ):
        first = Path(text) / "first.safetensors"
        write_first(parameters, first)
        for line in lines.values():
            line.fault = Fault(
                line_bytes_per_s=case.mbit * BYTES_PER_MBIT,
                line_down_bytes_per_s=DOWN_MBIT * BYTES_PER_MBIT,
                drop_up_per_mb=case.cut,
            )
        run = made.start_run(
            made.paced, "--from", str(first), *MODES[case.mode], "--rounds", "1000",
            "--max-staleness", "1000", "--set", f"max_steps={round(case.train_s / _STEP_S)}",
            "--deadline", f"{1.5 * case.train_s + 5:.0f}s",
        )  # fmt: skip
        return _watched(made, run, lines, case)


def _watched(made: Paced, run: str, lines: dict[str, Proxy], case: Case) -> dict[str, Any]:
    """Kills one agent in its upload, notes what the lines carry, and stops the run at the end."""
    peers = {made.peer(name): name for name in SLOW}
    first_up = {name: line.bytes_up for name, line in lines.items()}
    #: By peer: the bytes on its line whenever another of its updates counted.
    carried: dict[str, list[int]] = {name: [] for name in SLOW}
    versions: list[float] = []
    nbytes, down_since = 0, -1
    is_rebooted = False
    began = time.monotonic()
    while min(map(len, carried.values())) < case.updates:
        assert not made.ended(run), made.facts(run, "RunEnded")
        assert time.monotonic() - began < case.limit_s, f"not in {case.limit_s:.0f} s: the updates"
        time.sleep(case.poll_s)
        done = len(made.facts(run, "VersionCommitted"))
        versions += [time.monotonic()] * (done - len(versions))
        nbytes = max((f["update"]["nbytes"] for f in _updates(made, run)), default=0)
        for peer, name in peers.items():
            if len(_updates(made, run, peer)) > len(carried[name]):
                carried[name].append(lines[name].bytes_up - first_up[name])
        up = lines[REBOOTED].bytes_up - first_up[REBOOTED]
        if not is_rebooted and nbytes and up > nbytes // 3 and not carried[REBOOTED]:
            _kill(made, REBOOTED)
            lines[REBOOTED].reset()  # also what its kernel has still to send
            is_rebooted, down_since = True, done
        if down_since >= 0 and done > down_since:
            made.background_agent(REBOOTED)
            down_since = -1
    assert is_rebooted
    # Updates of the slow peers are in a version before the run is stopped.
    wait_for(
        lambda: _in_versions(made, run, peers) >= case.updates,
        "all of them are in a version",
        within_s=120 + 4 * case.train_s,
        every_s=case.poll_s,
    )
    assert made.ask("run", "stop", run).returncode == 0
    made.outcome(run)
    rows = {}
    for peer, name in peers.items():
        facts = _updates(made, run, peer)[: len(carried[name])]
        assert len({(f["round"], f["update"]["turn"]) for f in facts}) == len(facts)
        whole = len(facts) * nbytes
        rows[name] = {
            "updates": len(facts),
            "versions_behind": max(f["update"]["staleness"] for f in facts),
            "cuts": lines[name].drops,
            "killed": name == REBOOTED,
            "sent_twice": carried[name][len(facts) - 1] / whole - 1,
        }
    gaps = [later - earlier for earlier, later in itertools.pairwise(versions)]
    return {
        **case._asdict(),
        "nbytes": nbytes,
        "upload_s": round(case.upload_s),
        "versions": len(versions),
        "longest_s": round(max(gaps), 1),
        "peers": rows,
    }


def _updates(made: Paced, run: str, peer: str = "") -> list[dict[str, Any]]:
    """The updates of training that count, of this peer or of all."""
    facts = made.facts(run, "UpdateAccepted")
    return [f for f in facts if f["update"]["nbytes"] and peer in ("", f["peer"])]


def _in_versions(made: Paced, run: str, peers: dict[str, str]) -> int:
    """How many versions have an update of each of these peers."""
    closed = made.facts(run, "VersionCommitted")
    return min(sum(peer in fact["contributors"] for fact in closed) for peer in peers)


def _kill(made: Paced, name: str) -> None:
    """Kill an agent with all of its processes, as a power cut would."""
    agent = made.programs[name].process
    family = descendants(agent.pid)
    os.killpg(agent.pid, signal.SIGKILL)
    for child in family:
        if child.is_running():
            child.kill()
    agent.wait()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults.slow_lines", description=__doc__
    )
    parser.add_argument("--keep", action="store_true", help="write the results to docs/bench")
    parser.add_argument("--megabytes", type=float, default=96.0)
    parser.add_argument("--mbit", type=float, default=5.0)
    parser.add_argument("--train", type=float, default=20.0, help="seconds of a round's training")
    parser.add_argument("--updates", type=int, default=2, help="of each slow peer")
    parser.add_argument("--cut", type=float, default=0.02, help="chance of a cut in each MB up")
    parser.add_argument("--mode", nargs="+", default=[*MODES], choices=[*MODES])
    asked = parser.parse_args()
    for mode in asked.mode:
        case = Case(mode, asked.megabytes, asked.mbit, asked.train, asked.updates, asked.cut)
        row = measured(case)
        print(row, flush=True)
        if asked.keep:
            report.keep("slow-lines", {"rows": with_row(report.kept("slow-lines")["rows"], row)})


def with_row(rows: Sequence[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """The results with this one, in place of an earlier one of the same mode and size."""
    key = operator.itemgetter("megabytes", "mode")
    others = (row for row in rows if key(row) != key(new))
    return sorted([*others, new], key=lambda row: (row["megabytes"], [*MODES].index(row["mode"])))


if __name__ == "__main__":
    main()
