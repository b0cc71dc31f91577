"""Kills coordinator and agents at every step of a job's unit; the result must not change.

Covers scatter jobs (infer), evaluation on each peer's own rows (eval) and analytics queries
(analyze). A verified unit is final: it must not be leased, requested or returned again.
"""

from __future__ import annotations

import csv
import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from random import Random

import msgspec

from benchmarks.faults import checker, failpoint_names
from benchmarks.faults.checker import Fact
from benchmarks.faults.crashes import PEERS
from benchmarks.faults.results import Row
from benchmarks.faults.site import WITHIN_S, Site
from benchmarks.speed import rows_task
from coordinator.jobs import output
from coordinator.jobs.input import prepare
from coordinator.jobs.state import Job
from coordinator.jobs.store import JobStore
from coordinator.remote.api_client import Remote
from coordinator.storage.job_events import PREFIX, JobSpec
from protocols.analytics import parser
from protocols.errors import CommonweightError
from protocols.messages.jobs import ModelRef
from tests.support.fleet_harness import closing
from tests.support.waiting import wait_for

KINDS = ("infer", "eval", "analyze")
#: Enough for several units per peer, and for a second request of the last rows.
_ROWS, _FEATURES = 640, 3
#: Small answers are sent in their message.
_LONG_ANSWERS_ONLY = "agent.unit.sent"


class JobSite(Site):
    """Agents with a table each, whose owners allow all queries of this case."""

    def _env(self, name: str = "coordinator") -> dict[str, str]:
        return super()._env(name) | {"COMMONWEIGHT_AGENT_DATA": str(self.folder / f"{name}.csv")}


@contextmanager
def job_site(folder: Path) -> Iterator[JobSite]:
    """A fleet with a model, and rows for scatter jobs."""
    made = JobSite(
        folder,
        {
            "COMMONWEIGHT_AGENT_TASK_FILES": f"rows={rows_task.__file__}:Rows",
            "COMMONWEIGHT_AGENT_JOBS_SCATTER": "on",
            "COMMONWEIGHT_AGENT_ANALYZE": "on",
        },
    )
    for seed, name in enumerate(("rows", *PEERS)):
        _table(folder / f"{name}.csv", _ROWS if name == "rows" else 60, seed)
    with closing(made):
        made.rise()
        made.enlist(*PEERS)
        yield made


def _table(path: Path, rows: int, seed: int) -> None:
    chance = Random(seed)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([f"x{column}" for column in range(_FEATURES)])
        writer.writerows([chance.random() for _ in range(_FEATURES)] for _ in range(rows))


# --- a job, and what it comes to -------------------------------------------------------------


class Jobs:
    """The jobs of one fleet: the specification of each kind, and its result without faults."""

    def __init__(self, fleet: JobSite) -> None:
        self._fleet = fleet
        self._lane = JobStore(fleet.home / "jobs")
        run = fleet.order(
            task="rows", settings={"features": _FEATURES}, seed=1, rounds=1, quorum=len(PEERS)
        )
        self._model = ModelRef(checker.digests(fleet.outcome(run))[-1], 0)
        given = prepare(fleet.folder / "rows.csv", self._lane.folder, self._lane.suffix)
        shared = {"task": "rows", "settings": {"features": _FEATURES}, "models": (self._model,)}
        asked = parser.parse_query("count, mean(x0), quantile(x1, 0.5)", "")
        peers = tuple(
            sorted(map(fleet.peer, PEERS))
        )  # by name, because right after a start no agent is connected
        self._specs = {
            "infer": JobSpec(
                kind="scatter",
                input=given.digest,
                suffix=given.suffix,
                blocks=given.blocks,
                **shared,
            ),
            "eval": JobSpec(kind="private", min_group=1, peers=peers, **shared),
            "analyze": JobSpec(
                kind="analyze", query=msgspec.json.encode(asked).decode(), peers=peers
            ),
        }
        self.undisturbed = {kind: self.outcome(self.order(kind)) for kind in KINDS}

    def order(self, kind: str) -> str:
        """Start a job; return its id from the ledger, also if the coordinator dies meanwhile."""
        known = checker.run_names(self._fleet.home)
        remote, said = Remote(self._fleet.home), "nothing"
        try:
            remote.start_job(self._specs[kind])
        except CommonweightError as err:
            said = err.message
        finally:
            remote.close()
        new = sorted(checker.run_names(self._fleet.home) - known)
        assert len(new) == 1, f"the order has led to {new}: {said}"
        return new[0].removeprefix(PREFIX)

    def facts(self, job: str) -> list[Fact]:
        return self._fleet.facts(PREFIX + job)

    def ended(self, job: str) -> bool:
        return bool(self._fleet.facts(PREFIX + job, "JobEnded"))

    def outcome(self, job: str) -> str:
        """A digest of the job's result: all rows in order, or the answer of each peer."""
        wait_for(lambda: self.ended(job), f"job {job} ended", WITHIN_S, every_s=0.1)
        remote = Remote(self._fleet.home)
        try:
            # The ledger is one step ahead of the coordinator's API.
            wait_for(lambda: remote.job(job).ended, f"job {job} has ended")
            found = remote.job(job)
        finally:
            remote.close()
        return self._found(found)

    def _found(self, job: Job) -> str:
        if not job.is_scattered:
            answers = sorted((unit.only, unit.verified) for unit in job.units.values())
            return json.dumps(answers)
        out = self._fleet.folder / f"{job.id}.csv"
        rows = output.merge(job, self._lane, out)
        return f"{rows} rows {hashlib.sha256(out.read_bytes()).hexdigest()}"


def verified(facts: Iterable[Fact]) -> set[int]:
    """The units with a final answer."""
    return {fact["unit"] for fact in facts if fact["type"] == "UnitVerified"}


def done_again(facts: Sequence[Fact]) -> list[str]:
    """Findings: verified units that were worked on again, according to the ledger."""
    found, done = [], set[int]()
    for fact in facts:
        if fact["type"] in ("UnitLeased", "UnitReturned", "UnitVerified") and fact["unit"] in done:
            found.append(f"unit {fact['unit']} was verified, and then came {fact['type']}")
        if fact["type"] == "UnitVerified":
            done.add(fact["unit"])
    if not (facts and facts[-1]["type"] == "JobEnded" and facts[-1]["state"] == "finished"):
        found.append(f"the job has not finished: {facts[-1:]}")
    return found


def seen(fleet: Site, what: str, job: str) -> Counter[tuple[str, int]]:
    """By peer and unit: how often it was asked ("unit") or has worked ("did"), by its own word."""
    found: Counter[tuple[str, int]] = Counter()
    for name in PEERS:
        for line in fleet.truth_file(name).read_text().splitlines():
            told = json.loads(line)
            if (told["what"], told.get("job")) == (what, job):
                found[name, told["unit"]] += 1
    return found


# --- deaths ----------------------------------------------------------------------------------


def coordinator_points(kind: str) -> list[str]:
    """Every step of a unit; for scatter jobs some steps again, after other units are verified."""
    if kind != "infer":
        return list(failpoint_names.JOBS)
    again = [
        p for p in failpoint_names.JOBS if "Unit" in p or p in ("job.pushed", "job.reply.pulled")
    ]
    return [*failpoint_names.JOBS, *(f"{point}:3" for point in again)]


def coordinator(folder: Path, kind: str, points: Sequence[str] = ()) -> Row:
    """SIGKILL and a restart at each point: same result, and no verified unit is repeated."""
    row = Row(f"1 coordinator kill -9 at every unit state of a job: {kind}", "back within s")
    row.figure = "{worst:.1f} s"
    with job_site(folder) as fleet:
        jobs = Jobs(fleet)
        for point in points or coordinator_points(kind):
            _coordinator_dies(fleet, jobs, row, kind, point)
    return row


def _coordinator_dies(fleet: JobSite, jobs: Jobs, row: Row, kind: str, point: str) -> None:
    fleet.programs["up"].stop()
    fleet.rise(point)
    job = jobs.order(kind)
    fleet.dead("up")
    known = jobs.facts(job)
    asked = seen(fleet, "unit", job)
    began = time.monotonic()
    fleet.rise()
    wait_for(
        lambda: jobs.ended(job) or len(jobs.facts(job)) > len(known), f"{point}: work continues"
    )
    back_s = time.monotonic() - began
    found = _judged(fleet, jobs, kind, job)
    for (name, unit), times in seen(fleet, "unit", job).items():
        if unit in verified(known) and times > asked[name, unit]:
            found.append(f"{name} was asked for unit {unit}, which was verified")
    row.add(f"{kind} {point}", 1, found, back_s)


def _judged(fleet: JobSite, jobs: Jobs, kind: str, job: str) -> list[str]:
    """The findings about a job that ends after a crash, as sentences."""
    outcome = jobs.outcome(job)
    found = [*done_again(jobs.facts(job)), *fleet.violations(PEERS)]
    if outcome != jobs.undisturbed[kind]:
        found.append(f"{job} has found {outcome[:40]}, not {jobs.undisturbed[kind][:40]}")
    for (name, unit), times in seen(fleet, "did", job).items():
        if times > 1:
            found.append(f"{name} did unit {unit} {times} times")
    return found


def agent_points() -> list[str]:
    return [point for point in failpoint_names.AGENT_JOBS if point != _LONG_ANSWERS_ONLY]


def agent(folder: Path, points: Sequence[str] = ()) -> Row:
    """SIGKILL and a start of one of two agents at each point of each kind; same result."""
    row = Row("3 agent kill -9 at every step of a unit", "units done twice")
    with job_site(folder) as fleet:
        jobs = Jobs(fleet)
        for kind, point in product(KINDS, points or agent_points()):
            for name in PEERS:
                fleet.programs[name].stop()
            # The other one is stopped until then: it could finish the few rows first.
            fleet.come_back("ada", point)
            job = jobs.order(kind)
            fleet.dead("ada")
            for name in PEERS:
                fleet.come_back(name)
            row.add(f"{kind} {point}", 1, _judged(fleet, jobs, kind, job))
    row.figure = "0"
    return row
