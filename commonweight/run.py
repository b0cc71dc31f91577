"""A run for Python programs: its rounds as they close, its metrics, its model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from commonweight import prediction
from commonweight.html import table
from commonweight.own_tasks import place_task
from commonweight.prediction import Rows
from coordinator.cli import run_text
from coordinator.remote import version_files
from coordinator.remote.api_client import Remote
from coordinator.runs import candidates, export
from coordinator.runs import state as run_state
from protocols.errors import CommonweightError, UnknownName
from protocols.extras import needs_extra
from protocols.local.cli_entry import printable
from protocols.messages.comparisons import Comparison
from protocols.messages.states import RunState
from protocols.model import personalization

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from matplotlib.axes import Axes

log = logging.getLogger("commonweight")


@dataclass(frozen=True)
class Round:
    """A closed round. `metrics`: over all peers; None for one that could not be computed.

    `peers`: ids of those whose updates are in the version. `digest`: the version. `seconds`: how
    long the round took. `bytes_up` and `bytes_down`: to and from the coordinator.
    """

    number: int
    metrics: Mapping[str, float | None]
    peers: tuple[str, ...]
    digest: str
    num_examples: int
    seconds: float
    bytes_up: int
    bytes_down: int


class Run:
    """A run of a fleet, from `Fleet.train`, `Fleet.run` or `Fleet.runs`.

    Each use asks the coordinator, so that a run of a day ago is as good as a new one.
    """

    def __init__(self, remote: Remote, run_id: str) -> None:
        self._remote, self.id = remote, run_id

    @property
    def state(self) -> str:
        """The state now: such as "waiting", "training", "finished", "stopped" or "failed"."""
        return str(self._now().state)

    @property
    def options(self) -> Mapping[str, Any]:
        """The settings of the run by name, as the coordinator has stored them."""
        run = self._now()
        spec = run.ordered or run.spec  # of several models, those they have in common
        return {name: getattr(spec, name) for name in spec.__struct_fields__}

    @property
    def history(self) -> tuple[Round, ...]:
        """The closed rounds so far."""
        return tuple(map(_round, self._now().history))

    @property
    def best(self) -> Round | None:
        """The round with the best version so far; None before the first one is evaluated."""
        best = self._now().best
        return None if best is None else _round(best)

    @property
    def comparisons(self) -> Mapping[str, Comparison]:
        """By id of a peer, what it told after the end: models on its own held-out rows, with
        intervals, and the one that is recommended there; or in `missing` why it has none."""
        return self._now().comparisons

    def rounds(self, *, every_s: float = run_text.POLL_S) -> Iterator[Round]:
        """Each closed round, those of now at once and later ones as they close, until the run ends.

        What the run waits for, and which peers are refused, is logged. The run continues if the
        loop is left. Raises CommonweightError if the run has failed.
        """
        for step in run_text.follow(self._remote, self.id, every_s):
            for line in (*step.refusals, *step.waits):
                log.warning("%s: %s", self.id, printable(line))
            yield from map(_round, step.closed)
        if step.run.state is RunState.FAILED:
            raise CommonweightError(
                f"{self.id} failed: {step.run.ended_because}", f"commonweight run show {self.id}"
            )

    def wait(self) -> Run:
        """Wait until the run has ended; return it. Raises CommonweightError if it has failed."""
        for _ in self.rounds():
            pass
        return self

    def stop(self) -> None:
        """Stop the run. Its versions stay."""
        self._remote.stop_run(self.id)

    def resume(self) -> None:
        """Resume a run that was stopped or failed, from its newest version."""
        self._remote.resume_run(self.id)

    # --- metrics ---

    def frame(self) -> pd.DataFrame:
        """The closed rounds as a pandas DataFrame: a column for each metric, indexed by round."""
        with needs_extra("notebook", "a data frame"):
            import pandas as pd
        rows = [
            {
                "round": one.number,
                **one.metrics,
                "peers": len(one.peers),
                "examples": one.num_examples,
                "seconds": one.seconds,
                "bytes_up": one.bytes_up,
                "bytes_down": one.bytes_down,
            }
            for one in self.history
        ]
        return pd.DataFrame(rows).set_index("round") if rows else pd.DataFrame()

    def plot(self, *metrics: str, ax: Axes | None = None) -> Axes:
        """Draw these metrics by round with matplotlib, by default all; return the axes.

        `ax`: the axes to draw on, else new ones. Raises UnknownName.
        """
        with needs_extra("notebook", "a plot"):
            import matplotlib.pyplot as plt
        history = self.history
        known = list(dict.fromkeys(name for one in history for name in one.metrics))
        axes: Axes = plt.subplots()[1] if ax is None else ax
        for name in metrics or known:
            if name not in known:
                raise UnknownName(f"run {self.id} has no metric {name!r}", f"it has {known}")
            # None, where a metric could not be computed, is a gap.
            values = [float("nan") if (v := r.metrics.get(name)) is None else v for r in history]
            axes.plot([r.number for r in history], values, marker=".", label=name)
        axes.set_xlabel("round")
        if known:
            axes.legend()
        return axes

    # --- the model ---

    def state_dict(self, which: str = "best") -> dict[str, torch.Tensor]:
        """The tensors of a version, for `model.load_state_dict`.

        `which`: "best", "latest", or the beginning of a version's digest. Raises UnknownName, and
        MissingPackage without torch.
        """
        with needs_extra("agent", "a state dict of torch"):
            from safetensors.torch import load_file
        tensors = load_file(self._version(which)[1])
        return {
            name: tensor for name, tensor in tensors.items() if not personalization.is_control(name)
        }

    def export(self, path: str | Path, which: str = "best") -> str:
        """Write a version as safetensors, with a model card beside it; return its digest.

        It is `commonweight models export`: nothing is overwritten. Raises CommonweightError.
        """
        return version_files.export_version(self._remote, self._now(), which, Path(path))

    def predict(
        self, rows: Rows, which: str = "best", *, task: str | type = ""
    ) -> list[dict[str, Any]]:
        """Predict with a version, on this machine: one dict for each row.

        `rows`: a list of dicts, a pandas DataFrame, an array [n, …] of numbers without names, or
        the path of what the task reads (a table, a folder of pictures, a text). `task`: a class in
        a file, or "./my_task.py:MyTask", for a task of your own that is not registered on this
        machine; a simulation knows its file. The task runs in the sandbox of `commonweight-agent
        predict`. Raises CommonweightError.
        """
        run, file = self._version(which)
        source = place_task(task)[1] or prediction.simulated_source(self._remote.home)
        return prediction.predict(run, file, rows, source)

    # --- in a terminal and a notebook ---

    def __repr__(self) -> str:
        run = self._now()
        return f"<Run {run.id}: {run.state}, round {run.round}/{run.spec.rounds}>"

    def _repr_html_(self) -> str:
        history = self.history
        names = list(dict.fromkeys(name for one in history for name in one.metrics))
        rows = ((r.number, *map(r.metrics.get, names), len(r.peers)) for r in history)
        return table((repr(self)[1:-1],), ()) + table(("round", *names, "peers"), rows)

    def _now(self) -> run_state.Run:
        return self._remote.run(self.id)

    def _version(self, which: str) -> tuple[run_state.Run, Path]:
        """The run, and the file of one of its versions. Raises CommonweightError."""
        run = self._now()
        digest = export.resolve_version(run, which)
        file = version_files.find(self._remote, run.id, digest)
        export.check_on_disk(file, run, digest)
        return candidates.of_version(run, digest), file


def _round(closed: run_state.Round) -> Round:
    return Round(
        number=closed.round,
        metrics=dict(closed.metrics),
        peers=closed.contributors,
        digest=closed.digest,
        num_examples=closed.num_examples,
        seconds=closed.seconds,
        bytes_up=closed.bytes_up,
        bytes_down=closed.bytes_down,
    )
