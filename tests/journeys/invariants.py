"""What is true after each step of a journey. `violations` returns what is not, as sentences.

Each check is repeated until it holds or its time is over, because agents and the coordinator need a
moment: a round ends, a session opens, an upload is swept.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from agent.home import audit_log
from benchmarks.faults import checker
from coordinator.fleet.readings import num_available, num_enrolled, shown_state
from coordinator.jobs import state as jobs
from coordinator.runs import retention, transitions
from coordinator.runs.state import Run
from coordinator.storage import job_events, run_events
from protocols.errors import AwaitingTrust
from protocols.messages.states import AVAILABLE
from tests.journeys.fleet import JourneyFleet
from tests.journeys.model import NAMES, Model

#: Time for a fleet to reach the state of the model. Only a violation needs all of it.
WITHIN_S = 45.0
LOOK_EVERY_S = 0.25
#: What no log may contain.
BAD_LOG = re.compile(
    r"Traceback \(most recent|Exception in callback|Task was destroyed|ResourceWarning"
    r"|never retrieved|unexpected error|never awaited|Fatal error|HTTP 413|\(413\)"
)
#: Reasons for which a run may leave out an update: it came too late. And an agent may be asked
#: before it has read whom its owner trusts.
HARMLESS = {"late", "too stale", "replay", AwaitingTrust.code}
#: A ternary update of an early build is refused by design.
EARLY_BUILD = "does the sender run another version"


def violations(fleet: JourneyFleet, model: Model) -> list[str]:
    """The violations that remain when the time is over."""
    checks: list[Callable[[JourneyFleet, Model], Iterator[str]]] = [
        same_peers,
        disk,
        refusals,
        ledger,
        owners_ledgers,
    ]
    found = [f"logs: {text}" for text in logs(fleet)]
    for check in checks:
        until = time.monotonic() + WITHIN_S
        left = set(check(fleet, model))
        while left and time.monotonic() < until:
            time.sleep(LOOK_EVERY_S)
            left &= set(check(fleet, model))  # the next round may have begun during a look
        found += [f"{check.__name__}: {text}" for text in sorted(left)]
    return found


# --- peers ---


def same_peers(fleet: JourneyFleet, model: Model) -> Iterator[str]:
    """`status`, the monitor and `peers list` show the peers of the model, and in its state."""
    shown = fleet.client().fleet()
    listed = {
        p["name"]: p["standing"] for p in fleet.client().peers() if p["standing"] != "removed"
    }
    wanted = {n: p.standing for n, p in model.peers.items() if p.standing != "gone"}
    if listed != wanted:
        yield f"peers list has {listed}, not {wanted}"
    if (named := {p.name: p.standing for p in shown.peers.values()}) != wanted:
        yield f"status has {named}, not {wanted}"
    if num_enrolled(shown) != len(model.enrolled):
        yield f"status counts {num_enrolled(shown)} enrolled peers, not {len(model.enrolled)}"
    counted = num_available(shown, shown.at)
    # Pauses and the death of an agent are not known at once without the broker.
    if counted < len(model.available) or (model.has_broker and counted > len(model.available)):
        yield f"status counts {counted} available peers, not {model.available}"
    for peer in shown.peers.values():
        state = shown_state(peer, shown.at)
        is_available = peer.flower is not False and state in AVAILABLE
        if is_available != (peer.name in model.available) and (
            model.has_broker or not is_available
        ):
            yield f"status shows {peer.name} as {state} ({peer.reason})"
        # The session of a killed agent ends with its heartbeats.
        if model.peers[peer.name].is_running and not peer.flower:
            yield f"status shows no session of {peer.name}"
        if model.peers[peer.name].is_running and model.has_broker and peer.no_presence:
            yield f"status shows no MQTT presence of {peer.name}"


# --- disk ---


def runs_of(fleet: JourneyFleet) -> dict[str, Run]:
    """The runs of the ledger that were not deleted."""
    found: dict[str, list[run_events.RunEvent]] = {}
    for line in checker.read_ledger(fleet.home):
        if line.subject != "fleet" and not line.subject.startswith(job_events.PREFIX):
            found.setdefault(line.subject, []).append(run_events.decode(line.body))
    return {
        run: transitions.replay(run, events)
        for run, events in found.items()
        if not isinstance(events[-1], run_events.RunDeleted)
    }


def jobs_of(fleet: JourneyFleet) -> list[jobs.Job]:
    found: dict[str, list[job_events.JobEvent]] = {}
    for line in checker.read_ledger(fleet.home):
        if line.subject.startswith(job_events.PREFIX):
            name = line.subject.removeprefix(job_events.PREFIX)
            found.setdefault(name, []).append(job_events.decode(line.body))
    return [jobs.replay(name, events) for name, events in found.items()]


def disk(fleet: JourneyFleet, model: Model) -> Iterator[str]:
    """Spool, versions, states and jobs hold what the ledger still needs."""
    runs, all_jobs = runs_of(fleet), jobs_of(fleet)
    working = [run for run in runs.values() if not run.ended]
    for job in all_jobs:
        if not job.ended:
            yield f"job {job.id} has not ended"
    needed, states = set[str](), set[str]()
    for run in runs.values():
        keep = retention.versions_to_keep(run) if run.ended else retention.all_versions(run)
        needed |= keep
        states |= retention.states_to_keep(run, keep)
    home = fleet.home
    for path in _files(home / "versions"):
        if path.stem not in needed and not path.name.startswith("."):
            yield f"version {path.name[:12]} is kept for no run"
    for path in _files(home / "states"):
        if path.stem not in states and not path.name.startswith(".") and not working:
            yield f"state {path.name[:12]} is kept for no run"
    spooled = [path.name for path in _files(home / "spool")]
    if spooled and not working:
        yield f"the spool has {spooled} without a run"
    if left := [path.name for path in _files(home / "jobs" / "spool")]:
        yield f"the spool of the jobs has {left}"
    untaken = {digest for job in all_jobs if not job.taken for digest in job.on_disk}
    for path in _files(home / "jobs" / "versions"):
        if path.stem not in untaken and time.time() - path.stat().st_mtime > 3600:
            yield f"{path.name[:12]} is kept for no job"


def _files(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.exists() else []


# --- ledgers ---


def refusals(fleet: JourneyFleet, model: Model) -> Iterator[str]:
    """No run has failed, and none has refused a peer for more than a late update."""
    for run, facts in checker.facts_by_run(checker.read_ledger(fleet.home)).items():
        for fact in facts:
            is_refusal = fact["type"] == "UpdateRefused" and fact["reason"] not in HARMLESS
            if is_refusal and EARLY_BUILD not in fact["detail"]:
                yield f"run {run} refused {fact['peer'][:8]}: {fact['reason']}: {fact['detail']}"
            if fact["type"] == "RunEnded" and fact.get("state") == "failed":
                yield f"run {run} failed: {fact}"


def ledger(fleet: JourneyFleet, model: Model) -> Iterator[str]:
    """The ledger is intact, and each acknowledged update counts once."""
    yield from fleet.violations(NAMES)


def owners_ledgers(fleet: JourneyFleet, model: Model) -> Iterator[str]:
    """Each update that a run accepted is in the ledger of its owner."""
    told = {name: _digests(fleet.folder / name) for name in NAMES}
    everything = fleet.told_before.union(*told.values())
    for run, facts in checker.facts_by_run(checker.read_ledger(fleet.home)).items():
        for fact in facts:
            if fact["type"] == "UpdateAccepted":
                digest = fact["update"].get("digest", "")
                if digest and digest not in everything:
                    yield f"an update of {run}, {digest[:12]}, is in no owner's ledger"
    for name in NAMES:
        file = fleet.folder / name / audit_log.FILE
        for line in file.read_bytes().splitlines() if file.exists() else []:
            try:
                line and json.loads(line)
            except ValueError:
                yield f"{name}'s ledger has a broken line"


def _digests(home: Path) -> set[str]:
    return {entry.digest for entry in audit_log.read(home)}


# --- logs ---


def logs(fleet: JourneyFleet) -> Iterator[str]:
    """No log has a traceback or a warning of Python. What an older agent logs does not count."""
    for path in fleet.logs():
        lines = fleet.unread(path).splitlines()
        bad = next((n for n, line in enumerate(lines) if BAD_LOG.search(line)), None)
        if bad is not None:
            yield f"{path.relative_to(fleet.folder)}: " + "\n    ".join(lines[bad : bad + 12])


# --- at the end ---


def at_end(fleet: JourneyFleet) -> Iterator[str]:
    """After all programs have ended: no file is left in the folder for temporary files."""
    known = {"coordinator", "stranger", "files", "backups", "old", "data"}
    known |= {text for name in NAMES for text in (name, f"{name}.csv")}
    for path in sorted(fleet.folder.iterdir()):
        if path.name not in known and path.suffix not in (".log", ".truth"):
            yield f"left behind: {path.name}"
    if left := [path.name for path in fleet.files.iterdir()]:
        yield f"left behind: {left}"
