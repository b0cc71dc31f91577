"""Whole rounds of a fleet, plain and secure in turns: python -m benchmarks.speed.secure_rounds

    --pairs 3 --rounds 6   three runs of six measured rounds each way
    --agents 8 --megabytes 40 --codec int8
    --keep                 write docs/bench/secure-results.json, for make figures

All agents are on this machine. The coordinator is started anew before each run, so that its peak
memory is that of one run. The first round of a run starts trainers and is not measured. Steps are
times between events of the ledger, as the mean over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.speed import ours, report
from benchmarks.speed.cases import MB, Case
from coordinator.storage import run_events
from coordinator.storage.run_events import RunEvent
from coordinator.storage.sqlite_ledger import SqliteLedger
from tests.support.fleet_harness import Fleet, fleet, two_free_ports

#: An event of the ledger, and what a round has done since the event before it.
_STEPS: dict[type, str] = {
    run_events.UpdateAccepted: "train",
    run_events.TrainingClosed: "train",
    run_events.CohortFixed: "cards",
    run_events.SharersFixed: "share",
    run_events.MaskedUpdateAccepted: "mask, upload",
    run_events.SurvivorsFixed: "mask, upload",
    run_events.VersionCommitted: "unmask, fold",
}


class Pass(NamedTuple):
    """A run: `seconds` of each measured round, CPU seconds a round and peak memory by process."""

    seconds: list[float]
    cpu_s: dict[str, float]
    peak_bytes: dict[str, int]
    bytes_up: int
    steps_s: dict[str, float]


def measure(site: Fleet, case: Case, ports: tuple[int, int], options: Sequence[str]) -> Pass:
    """A run with these options, with a coordinator that was just started."""
    if "up" in site.programs:
        site.programs["up"].stop()
    _up(site, ports)
    ours.ping(site, case, 1, seed=1, options=options)  # agents have found the coordinator
    before = ours.cpu(site)
    told = ours.ping(site, case, case.rounds + 1, options=options)
    history = told["history"]
    spent = {kind: seconds - before.get(kind, 0.0) for kind, seconds in ours.cpu(site).items()}
    return Pass(
        [closed["seconds"] for closed in history[1:]],
        {kind: seconds / len(history) for kind, seconds in spent.items()},
        ours.peaks(site),
        sum(closed["bytes_up"] for closed in history[1:]) // case.rounds,
        _steps(site, told["id"]),
    )


def _up(site: Fleet, ports: tuple[int, int]) -> None:
    site.up("--mqtt-port", str(ports[1]), port=ports[0])


def _steps(site: Fleet, run_id: str) -> dict[str, float]:
    ledger = SqliteLedger(site.home / "ledger.db", read_only=True)
    told = [(entry.at, run_events.decode(entry.body)) for entry in ledger.entries(run_id)]
    ledger.close()
    second = [at for at, event in told if _opens(event, 2)]
    found: dict[str, float] = defaultdict(float)
    is_evaluation = False
    for (before, _), (at, event) in pairwise((at, e) for at, e in told if at >= second[0]):
        is_evaluation |= isinstance(event, run_events.EvaluationOpened)
        name = "evaluate" if is_evaluation else _STEPS.get(type(event), "other")
        found[name] += at - before
        is_evaluation &= not isinstance(event, run_events.RoundClosed)
    rounds = sum(isinstance(event, run_events.RoundClosed) for _, event in told) - 1
    return {name: seconds / rounds for name, seconds in found.items()}


def _opens(event: RunEvent, number: int) -> bool:
    return isinstance(event, run_events.RoundOpened) and event.round == number


def trust_each_other(site: Fleet, names: Iterable[str]) -> None:
    """All owners trust all peers: what `trust add` writes, without a process for each pair."""
    ids = {n: json.loads((site.folder / n / "enrolled.json").read_bytes())["peer"] for n in names}
    for name, peer in ids.items():
        others = [other for other in ids.values() if other != peer]
        done = site.ask_agent(name, "trust", "add", *others)
        assert done.returncode == 0, done.stderr


def compare(case: Case, codec: str, pairs: int) -> dict[str, Any]:
    """Runs of a fleet in turns: plain ones with fp32, secure ones with `codec`."""
    names = [f"agent{number}" for number in range(case.agents)]
    found: dict[str, list[Pass]] = {"plain": [], "secure": []}
    with (
        tempfile.TemporaryDirectory(prefix="commonweight-bench-") as folder,
        fleet(Path(folder)) as site,
    ):
        ports = two_free_ports()
        _up(site, ports)
        site.join(*names)
        trust_each_other(site, names)
        site.start(*names)
        for pair in range(pairs):
            for kind, passes in found.items():
                options = () if kind == "plain" else ("--secure", "--codec", codec)
                passes.append(measure(site, case, ports, options))
                _show(f"{pair + 1} {kind}", passes[-1])
    return _row(case, codec, found)


def _show(name: str, one: Pass) -> None:
    cpu = ", ".join(f"{kind} {seconds:.2f}" for kind, seconds in one.cpu_s.items() if seconds)
    steps = ", ".join(f"{step} {seconds:.2f}" for step, seconds in one.steps_s.items())
    print(
        f"{name}: a round {statistics.median(one.seconds):.2f} s "
        f"({min(one.seconds):.2f} to {max(one.seconds):.2f}); CPU s: {cpu}; coordinator "
        f"{one.peak_bytes['coordinator'] / MB:.0f} MB; up {one.bytes_up / MB:.1f} MB\n    {steps}",
        flush=True,
    )


def _row(case: Case, codec: str, found: dict[str, list[Pass]]) -> dict[str, Any]:
    row: dict[str, Any] = {"name": case.name, "agents": case.agents, "codec": codec}
    for kind, passes in found.items():
        row[f"{kind}_s"] = statistics.median(s for one in passes for s in one.seconds)
        row[f"{kind}_rounds_s"] = [one.seconds for one in passes]
        for process in ("coordinator", "agent"):
            spent = statistics.fmean(one.cpu_s[process] for one in passes)
            row[f"{kind}_{process}_cpu_s"] = spent
        peaks = [one.peak_bytes["coordinator"] for one in passes]
        row[f"{kind}_peak_rss_bytes"] = statistics.median(peaks)
        row[f"{kind}_bytes_up"] = passes[0].bytes_up
        row[f"{kind}_steps_s"] = {
            step: statistics.fmean(one.steps_s.get(step, 0.0) for one in passes)
            for step in passes[0].steps_s
        }
    row["bytes_ratio"] = row["secure_bytes_up"] / row["plain_bytes_up"]
    row["more_rss_bytes"] = row["secure_peak_rss_bytes"] - row["plain_peak_rss_bytes"]
    row["allowed_s"] = 1.25 * row["plain_s"] + 0.5
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--agents", type=int, default=8)
    parser.add_argument("--megabytes", type=float, default=40)
    parser.add_argument("--codec", choices=["fp32", "int8"], default="fp32")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--keep", action="store_true")
    asked = parser.parse_args()
    name = f"{asked.megabytes:g} MB × {asked.agents}"
    case = Case(name, asked.agents, round(asked.megabytes * MB), asked.rounds, 0)
    row = compare(case, asked.codec, asked.pairs)
    print(
        f"{name}, {asked.codec}: plain {row['plain_s']:.2f} s, secure {row['secure_s']:.2f} s "
        f"(at most {row['allowed_s']:.2f}: 1.25 × plain + 0.5); bytes {row['bytes_ratio']:.4f}; "
        f"coordinator {row['more_rss_bytes'] / MB:+.0f} MB"
    )
    if asked.keep:
        report.keep("secure", {f"rounds {asked.codec}": row})


if __name__ == "__main__":
    main()
