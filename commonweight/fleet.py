"""A fleet for Python programs: its peers, its runs, and new runs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from commonweight import jobs
from commonweight.html import table
from commonweight.jobs import Analysis, Measurement
from commonweight.own_tasks import place_task
from commonweight.prediction import Rows
from commonweight.run import Run
from coordinator.cli import run_forecast
from coordinator.remote import access, run_options
from coordinator.remote.stopped_home import open_remote
from protocols.local import cli_entry, homes

log = logging.getLogger("commonweight")


@dataclass(frozen=True)
class Peer:
    """A machine that has joined, as the monitor shows it.

    `state`: such as "training"; `reason`: why it is in this state. `standing`: "enrolled",
    "awaiting" or "removed".
    """

    id: str
    name: str
    state: str
    reason: str
    standing: str
    labels: Mapping[str, str]


class Fleet:
    """A fleet whose coordinator runs on this machine, or to which this machine has access.

    Methods raise an error of `cw.errors` with its `message` and `hint`. They block, use no event
    loop, and may be called from several threads.
    """

    def __init__(self, home: Path, timeout_s: float = 15.0) -> None:
        self._remote = open_remote(home, timeout_s)

    @property
    def role(self) -> str:
        """What this access may do: "operator" or "observer"."""
        return self._remote.role

    def peers(self) -> list[Peer]:
        """All machines that have joined."""
        return [
            Peer(
                row["peer"],
                row["name"],
                row["state"],
                row["reason"],
                row["standing"],
                dict(row["labels"]),
            )
            for row in self._remote.peers()
        ]

    def runs(self) -> list[Run]:
        """All runs, oldest first."""
        return [Run(self._remote, run.id) for run in self._remote.runs()]

    def run(self, name: str) -> Run:
        """A run by its id, the beginning of it, or its task: then its newest run."""
        return Run(self._remote, self._remote.run(name).id)

    def train(self, task: str | type, **options: Any) -> Run:
        """Start a run and return at once.

        `task`: a name, "my_task.py:MyTask", or a class in a file, which the owners of the machines
        have registered under that name. The options are those of `commonweight run start`, with the
        same checks: `clip_norm=1.0` is `--clip-norm 1.0`. `set` and `strategy_arg` take a mapping,
        `features` a list; `from_` is `--from`. What the command prints before a run with noise or a
        secure run is logged.
        """
        name, _ = place_task(task)
        order = run_options.build_order(run_options.from_keywords({"task": name, **options}))
        for line in run_forecast.lines(self._remote, order.spec):
            log.warning("%s", cli_entry.printable(line))
        return Run(self._remote, self._remote.start_run(order))

    def measure(
        self, *models: str, task: str = "", min_group: int = 10, deadline: str = "10m"
    ) -> Measurement:
        """Measure models on each peer's own rows, as `commonweight infer --private`; wait for it.

        `models`: such as "best", "latest", a run, RUN:latest or a digest; by default "best".
        `min_group`: no metric over fewer rows leaves a peer. `deadline`: when to continue without
        the missing peers.
        """
        return jobs.measure(self._remote, models or ("best",), task, min_group, deadline)

    def scatter(
        self, rows: Rows, out: str | Path, *, model: str = "best", task: str = "", quorum: int = 1
    ) -> int:
        """Let peers predict rows of yours, as `commonweight infer --scatter`; wait for it.

        **These rows leave your machine: the peers that answer see them.** The answers are written
        to `out`, a new file (.csv, .jsonl or .parquet), in the order of the rows. Returns their
        number. It works on the coordinator's machine. Called again with the same rows after an
        interruption, it continues. `rows`: as for `Run.predict`. `quorum`: how many peers must give
        the same answer.
        """
        return jobs.scatter(self._remote, rows, Path(out), model, task, quorum)

    def analyze(
        self,
        question: str,
        where: str = "",
        *,
        epsilon: float = 0.0,
        bounds: Mapping[str, tuple[float, float]] = {},
        deadline: str = "10m",
        secure: bool = False,
    ) -> Analysis:
        """Ask all peers about their tables, as `commonweight analyze`; wait for it.

        `question`: such as "count, mean(age) by sex", or a method such as "ttest(age by sex)"; the
        answer's `frame()` is a DataFrame. `where`: which rows count. `epsilon`: add noise with this
        privacy cost, for which `bounds` gives the least and greatest value by column. `secure`: the
        coordinator gets the sums over all peers alone.
        """
        return jobs.analyze(self._remote, question, where, epsilon, bounds, deadline, secure)

    def close(self) -> None:
        """Close the connections."""
        self._remote.close()

    def __repr__(self) -> str:
        return f"<Fleet at {self._remote.address}, as {self.role}>"

    def _repr_html_(self) -> str:
        rows = [(p.name, p.state or p.standing, p.reason) for p in self.peers()]
        return f"<p>Fleet at {self._remote.address}</p>" + table(("peer", "state", "reason"), rows)


def connect(home: str | Path | None = None, *, timeout_s: float = 15.0) -> Fleet:
    """The fleet of the coordinator on this machine, or else the one that was joined.

    If the coordinator is not running, its runs and peers can be read, such as those of a
    simulation. `home`: another home than `COMMONWEIGHT_HOME` says. `timeout_s`: of each step of a
    request. Raises NotRunning, HomeError.
    """
    return Fleet(access.open_home(Path(home) if home is not None else None), timeout_s)


def join(ticket: str, *, name: str = "") -> Fleet:
    """Join a fleet with the ticket of an operator or observer, and connect to it.

    `ticket`: the text, or "file:PATH"; `commonweight ticket create --role operator` makes one. A
    ticket is used up: later programs call `connect()`. `name`: under which the coordinator lists
    this access; by default this host's. Raises TicketMalformed, Unreachable, Refused.
    """
    access.join(cli_entry.read_ticket(ticket), name)
    return Fleet(homes.open_home("operator"))
