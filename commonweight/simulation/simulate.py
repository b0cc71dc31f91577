"""`cw.simulate`: a run over many simulated peers, with a home of its own as its result."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import platformdirs
from msgspec import Struct
from msgspec.structs import replace

from agent.home.settings_schema import AgentSettings
from commonweight.own_tasks import place_task
from commonweight.run import Run
from commonweight.simulation import shared_data
from commonweight.simulation.fleet import SimulatedFleet
from commonweight.simulation.log_filters import NewRefusals
from commonweight.simulation.plan import Plan, check_owner, make_keys, read_owner
from commonweight.simulation.pool import ProcessWorker, Worker
from commonweight.simulation.worker import VARIABLE
from coordinator.remote import run_options
from coordinator.remote.stopped_home import StoppedHome
from coordinator.runs.options import OPTIONS
from coordinator.runs.state import Run as RunRecord
from coordinator.storage import settings
from coordinator.storage.run_events import RunSpec
from coordinator.storage.settings import Keys
from coordinator.storage.weight_store import WeightStore
from protocols.enrollment import identity
from protocols.errors import BadWeights, CommonweightError, HomeError, TaskUnusable, UsageError
from protocols.local import homes
from protocols.local.atomic_files import write_private
from protocols.messages.states import RunState
from protocols.model import foreign_weights

OnRound = Callable[[RunRecord], None]

MAX_PEERS = 65_536
FILE = "simulation.json"


class Saved(Struct, frozen=True, kw_only=True):
    """What a simulation needs to continue, in its home."""

    run: str
    plan: Plan
    dropout: float = 0.0


class Simulation:
    """A run in a home of its own. `run` works until the run has ended, also after a stop."""

    def __init__(self, home: Path, saved: Saved, *, is_new: bool = False) -> None:
        self.home, self.run_id = home, saved.run
        self._saved = replace(saved, plan=replace(saved.plan, home=str(home)))
        self._is_new = is_new

    @classmethod
    def create(
        cls,
        home: Path,
        spec: RunSpec,
        plan: Callable[[Keys], Plan],
        *,
        dropout: float = 0.0,
        first: Path | None = None,
    ) -> Simulation:
        """Make the home and record the run in it. Raises HomeError, UsageError."""
        if (home / homes.STAMP).exists() or (home / homes.SIMULATION).exists():
            raise HomeError(
                f"{home} is in use already",
                f"continue its simulation: commonweight simulate --resume --out {home}; or name "
                "another folder",
            )
        is_new = not home.exists() or (home.is_dir() and not any(home.iterdir()))
        try:
            saved = cls._make(home, spec, plan, dropout, first)
        except BaseException:
            if is_new:
                shutil.rmtree(home, ignore_errors=True)
            raise
        return cls(home, saved, is_new=is_new)

    @staticmethod
    def _make(
        home: Path, spec: RunSpec, plan: Callable[[Keys], Plan], dropout: float, first: Path | None
    ) -> Saved:
        settings.init([], at=home)
        keys = settings.open_keys(home)
        (home / homes.SIMULATION).mkdir(mode=0o700)
        held = homes.lock_home(home, "simulation")
        try:
            digest = _save_first(home, first) if first is not None else ""
            fleet = SimulatedFleet(plan(keys), keys)
            try:
                run_id = fleet.runs.start(spec, digest)
            finally:
                fleet.close()
            saved = Saved(run=run_id, plan=plan(keys), dropout=dropout)
            write_private(home / homes.SIMULATION / FILE, msgspec.json.encode(saved))
        finally:
            held.release()
        return saved

    @property
    def source(self) -> str:
        """The file and class of the task; empty for an installed one."""
        return self._saved.plan.source

    def moved(self, home: Path) -> Simulation:
        """The same simulation in another folder, before its work begins."""
        self.home.rename(home)
        return Simulation(home, self._saved, is_new=self._is_new)

    def check(self, run: RunRecord) -> None:
        """Raise CommonweightError if the run has failed. The home of a new simulation in which no
        round was closed is deleted: there is nothing to read or to continue."""
        if run.state is not RunState.FAILED:
            return
        hint = f"COMMONWEIGHT_HOME={self.home} commonweight run show {run.id}"
        if self._is_new and not run.history:
            shutil.rmtree(self.home, ignore_errors=True)
            hint = ""
        raise CommonweightError(f"{run.id} failed: {run.ended_because}", hint)

    @classmethod
    def open(cls, home: Path) -> Simulation:
        """A simulation that was stopped. Raises HomeError."""
        try:
            return cls(
                home, msgspec.json.decode((home / homes.SIMULATION / FILE).read_bytes(), type=Saved)
            )
        except (OSError, msgspec.DecodeError) as err:
            raise HomeError(
                f"there is no simulation in {home}", "begin one: commonweight simulate mnist"
            ) from err

    def run(
        self,
        workers: int = 0,
        on_round: OnRound = lambda run: None,
        make_worker: Callable[[Plan], Worker] = ProcessWorker,
        ray: str = "",
    ) -> RunRecord:
        """Work until the run has ended; return it. `workers`: how many; 0: one for each core.
        `ray`: the address of a Ray cluster, whose nodes then work; "auto" finds or starts one.

        Ctrl-C stops the work, and `run` continues it. Raises HomeLocked, CommonweightError.
        """
        held = homes.lock_home(self.home, "simulation")
        log, is_new = logging.getLogger("commonweight.run"), NewRefusals()
        log.addFilter(is_new)
        try:
            if not ray:
                made = [make_worker(self._saved.plan) for _ in range(workers or _cores())]
                return _run_apart(lambda: self._run(made, on_round))
            from commonweight.simulation.ray_workers import Cluster, RayWorker

            cluster = Cluster(self._saved.plan, ray)
            try:
                actors = [RayWorker(cluster) for _ in range(workers or cluster.cores)]
                return _run_apart(lambda: self._run(actors, on_round))
            finally:
                cluster.close()
        finally:
            log.removeFilter(is_new)
            held.release()

    async def _run(self, workers: Sequence[Worker], on_round: OnRound) -> RunRecord:
        saved = self._saved
        fleet = SimulatedFleet(
            saved.plan, settings.open_keys(self.home), dropout=saved.dropout, on_round=on_round
        )
        try:
            run = fleet.runs.find(self.run_id)
            if run.state in (RunState.STOPPED, RunState.FAILED):
                fleet.runs.resume(run.id)
            elif run.ended:
                return run
            return await fleet.finish(run.id, workers)
        finally:
            fleet.close()


def simulate(
    task: str | type,
    peers: int = 10,
    *,
    per_round: int = 0,
    split: str = "",
    dropout: float = 0.0,
    workers: int = 0,
    ray: str = "",
    owner: Mapping[str, Any] = {},
    out: str | Path | None = None,
    **options: Any,
) -> Run:
    """Train with many simulated peers on this machine; return the run when it has ended.

    `task`: a name, "./my_task.py:MyTask", or a class in a file. Peer i of `peers` gets part i of
    the data: see `split` ("iid", which is the default, "shards" or "dirichlet:0.3") and `owner`,
    the settings of every owner, in which `{part}` is the peer's number. `per_round`: ask this many
    peers in each round; 0: all. `dropout`: the share of them that leaves in the work. `workers`:
    processes, by default one for each core. `ray`: the address of a Ray cluster that works in their
    place, or "auto". `out`: the home of the result, a new folder; by default one with the name of
    the run. The options are those of `commonweight run start`, as keywords of `Fleet.train`.

    In a script, call it below `if __name__ == "__main__":`. Raises UsageError and others of
    `cw.errors`.
    """
    known = {option.keyword for option in OPTIONS}
    if mine := (options.keys() - known) & set(AgentSettings.__struct_fields__):
        one = min(mine)
        raise UsageError(
            f"{one} is a setting of the owners", f"owner={{'{one}': {options[one]!r}}}"
        )
    name, source = place_task(task)
    typed = run_options.from_keywords({"task": name, **options})
    made = create(
        typed,
        peers,
        source=source,
        per_round=per_round,
        split=split,
        dropout=dropout,
        owner=owner,
        out=Path(out) if out is not None else None,
    )
    run = made.run(workers, ray=ray)
    made.check(run)
    return Run(StoppedHome(made.home), run.id)


def create(
    typed: Mapping[str, Any],
    peers: int,
    *,
    source: str = "",
    per_round: int = 0,
    split: str = "",
    dropout: float = 0.0,
    owner: Mapping[str, Any] = {},
    out: Path | None = None,
) -> Simulation:
    """A new simulation of a run with these options, by their names in the table. Raises UsageError.

    The others are as for `simulate`.
    """
    if os.environ.get(VARIABLE):
        raise TaskUnusable(
            "a task's file simulates while a worker imports it",
            'put the call below: if __name__ == "__main__":',
        )
    if not 1 <= peers <= MAX_PEERS:
        raise UsageError(f"--peers must be from 1 to {MAX_PEERS}, not {peers}")
    if not 0 <= dropout < 1:
        raise UsageError(f"--dropout must be 0 or more and below 1, not {dropout:g}")
    if not 0 <= per_round <= peers:
        raise UsageError(f"--per-round must be from 1 to the {peers} peers, not {per_round}")
    if typed.get("flower"):
        raise UsageError("a Flower app is not simulated here", "in its folder: flwr run")
    chosen = dict(typed)
    first = chosen.pop("from", None)
    if per_round:
        chosen["quorum"] = per_round
        chosen["select"] = chosen.get("select") or "1x"
    spec = run_options.build_order(chosen).spec
    shared_data.check_split(split or "iid")
    chosen_owner = {"split": split or "iid", **read_owner(owner)}
    check_owner(chosen_owner, peers)
    is_shared = shared_data.is_shared(spec.task, source, split, chosen_owner, peers)
    home = (out or _new_home()).expanduser().absolute()

    def plan(keys: Keys) -> Plan:
        return Plan(
            home=str(home),
            fleet=keys.fleet,
            coordinator_public=identity.public_bytes(keys.sign_key),
            keys=make_keys(peers, spec.seed),
            owner=chosen_owner,
            source=source,
            task=spec.task,
            is_shared=is_shared,
            trusts=spec.secure,
        )

    made = Simulation.create(home, spec, plan, dropout=dropout, first=first)
    return made if out is not None else made.moved(home.with_name(made.run_id))


def _cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _new_home() -> Path:
    """A folder for a simulation without `out`. Later it gets the name of its run."""
    usual = platformdirs.user_data_path("commonweight")
    chosen = os.environ.get("COMMONWEIGHT_HOME")
    folder = (homes.home_path("coordinator") if chosen else usual) / "simulations"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder / f"new-{secrets.token_hex(3)}"


def _save_first(home: Path, path: Path) -> str:
    """Save a safetensors file as a version of the home; its digest. Raises UsageError."""
    try:
        return WeightStore(home).save(foreign_weights.load(path))
    except (OSError, BadWeights) as err:
        raise UsageError(f"cannot use {path} as first weights: {err}") from err


def _run_apart(make: Callable[[], Coroutine[Any, Any, RunRecord]]) -> RunRecord:
    """The result of a coroutine, in a thread of its own if this one has an event loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(make())
    begun: Future[Callable[[], object]] = Future()

    async def work() -> RunRecord:
        task, loop = asyncio.current_task(), asyncio.get_running_loop()
        assert task is not None
        begun.set_result(lambda: loop.call_soon_threadsafe(task.cancel))
        return await make()

    with ThreadPoolExecutor(1, "simulation") as thread:
        working = thread.submit(lambda: asyncio.run(work()))
        try:
            return working.result()
        except KeyboardInterrupt:
            begun.result()()
            raise
