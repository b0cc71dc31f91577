"""python -m benchmarks.speed.tree_fleet [--peers N] [--rows N] [--trees N] [--keep]

Wall time of a round of trees (one level) on a real fleet on this machine, with TLS and signatures:
a coordinator, a broker, agents and their trainers, by their public commands, without and with
--secure. Prints the median and the 90th percentile from one closed round to the next, the parts of
a round, and the CPU seconds a round by kind of process. A loaded machine makes it longer. `--keep`
writes docs/bench/trees-results.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from agent.home import settings
from benchmarks.speed import report
from benchmarks.speed.ours import cpu
from benchmarks.speed.tree_rounds import write_table
from coordinator.storage import run_events
from coordinator.storage.run_events import RoundClosed
from coordinator.storage.sqlite_ledger import SqliteLedger
from protocols.model.built_in_settings import BY_TASK
from tests.support.fleet_harness import ALLOW, Fleet, fleet

_DEPTH = int(BY_TASK["tabular"]["depth"].default)


def measure(site: Fleet, asked: argparse.Namespace, *, secure: bool) -> dict[str, Any]:
    """A run to its end: seconds by name."""
    _train(site, asked, 1, secure=secure)  # starts the trainers
    before = cpu(site)
    ended = _train(site, asked, asked.trees, secure=secure)
    used = {kind: seconds - before[kind] for kind, seconds in cpu(site).items()}
    closed, rounds = _closed_at(site, ended["id"]), len(ended["history"])
    # The first rounds load tables and make bins; an evaluated round does more.
    plain = [
        number
        for number in range(3, rounds)
        if not ended["history"][number]["metrics"] and not ended["history"][number - 1]["metrics"]
    ]
    walls = [closed[number] - closed[number - 1] for number in plain]
    spent = [ended["history"][number]["spent"] for number in plain]
    return {
        "rounds": len(plain),
        "seconds": float(np.median(walls)),
        "seconds_p90": float(np.quantile(walls, 0.9)),
        "parts": {
            name: float(np.median([one.get(name, 0.0) for one in spent]))
            for name in sorted({name for one in spent for name in one})
        },
        "cpu_s_per_round": {kind: seconds / rounds for kind, seconds in used.items()},
    }


def _train(site: Fleet, asked: argparse.Namespace, trees: int, *, secure: bool) -> dict[str, Any]:
    """The JSON output of a run that has ended."""
    rounds = 1 + trees * _DEPTH
    words = ["--target", "y", "--set", "model=trees", "--set", f"trees={trees}"]
    words += ["--rounds", str(rounds), "--quorum", str(asked.peers)]
    run = site.start_run("tabular", *words, *(["--secure"] if secure else []))
    # Named so that `cpu` does not count it.
    name = f"run-{run}"
    code = site.background(name, "run", "metrics", run, "--follow").wait(1_800.0)
    assert code == 0, site.programs[name].log
    ended = site.run(run)
    assert ended["state"] == "finished", ended["ended_because"]
    assert all(len(closed["contributors"]) == asked.peers for closed in ended["history"])
    return ended


def _closed_at(site: Fleet, run: str) -> list[float]:
    """When each round was closed, Unix s, by the ledger."""
    with closing(SqliteLedger(site.home / "ledger.db", read_only=True)) as ledger:
        found = [(entry.at, run_events.decode(entry.body)) for entry in ledger.entries(run)]
    return [at for at, event in found if isinstance(event, RoundClosed)]


def _join(site: Fleet, folder: Path, asked: argparse.Namespace) -> list[str]:
    names = [f"peer{number}" for number in range(asked.peers)]
    ticket = site.ticket(len(names))
    for number, name in enumerate(names):
        table = write_table(folder / f"{name}.csv", asked.rows, number)
        words = ("join", "-", "--name", name, "--data", str(table), *ALLOW)
        done = site.ask_agent(name, *words, given=ticket)
        assert done.returncode == 0, done.stderr
    ids = {
        name: json.loads((site.folder / name / "enrolled.json").read_bytes())["peer"]
        for name in names
    }
    for name in names:
        others = {peer: other for other, peer in ids.items() if other != name}
        settings.change(site.folder / name, compare="off", trust=others)
    return names


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.tree_fleet", description=__doc__
    )
    parser.add_argument("--peers", type=int, default=5)
    parser.add_argument("--rows", type=int, default=1000, help="of each peer")
    parser.add_argument("--trees", type=int, default=10)
    parser.add_argument("--keep", action="store_true", help="write the figures of the docs")
    asked = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="commonweight-trees-") as folder,
        fleet(Path(folder)) as site,
    ):
        site.up()
        site.start(*_join(site, Path(folder), asked))
        found = {
            "peers": asked.peers,
            "rows": asked.rows,
            "plain": measure(site, asked, secure=False),
            "secure": measure(site, asked, secure=True),
        }
    print(json.dumps(found, indent=1))
    if asked.keep:
        report.keep("trees", found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
