"""Jobs of a fleet for Python programs: measurements, spread rows, questions to tables."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from commonweight import prediction
from coordinator.jobs import output
from coordinator.jobs.methods.requests import parse_method
from coordinator.jobs.methods.results import Statistics
from coordinator.remote import analysis, inference
from coordinator.remote.api_client import Remote
from protocols.analytics import parser
from protocols.errors import CommonweightError, UnknownName, UsageError
from protocols.extras import needs_extra
from protocols.local.durations import parse_seconds

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Score:
    """A metric of a model on the rows of a peer; None if it has too few rows for it."""

    peer: str
    model: str
    metric: str
    value: float | None
    num_examples: int


@dataclass(frozen=True)
class Measurement:
    """Models on the peers' own rows.

    `weighted`: by metric and model, the mean over the peers' rows. `excused`: why a peer gave no
    answer. Peers have their names, and models the names that they were asked by.
    """

    scores: tuple[Score, ...]
    weighted: Mapping[str, Mapping[str, float | None]]
    excused: Mapping[str, str]

    def frame(self) -> pd.DataFrame:
        """The scores as a pandas DataFrame, a row for each."""
        return _frame([vars(score) for score in self.scores])


@dataclass(frozen=True)
class Analysis:
    """The answer to a question to the peers' tables.

    `rows`: a dict for each group, with its values, its number of rows and each figure; or for each
    row of a method's first table. `label`: how many peers and rows it covers. `left_out`: why a
    peer is not in it. `tables`: the further tables of a method by title. `notes`: what it says of
    them.
    """

    rows: tuple[Mapping[str, Any], ...]
    label: str
    left_out: Mapping[str, str]
    tables: Mapping[str, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def frame(self, table: str = "") -> pd.DataFrame:
        """The rows as a pandas DataFrame, or those of another table of a method."""
        if table and table not in self.tables:
            raise UnknownName(f"there is no table {table!r}", f"known: {', '.join(self.tables)}")
        return _frame(list(self.tables[table] if table else self.rows))


def scatter(remote: Remote, rows: Any, out: Path, model: str, task: str, quorum: int) -> int:
    """See `Fleet.scatter`."""
    output.check_target(out)
    store = inference.open_store(remote)
    spec = inference.make_spec(remote, "scatter", [model], task, quorum=quorum)
    with tempfile.TemporaryDirectory(prefix="commonweight-") as folder:
        source = Path(prediction.source_of(rows, Path(folder)))
        spec = inference.with_rows(spec, source, store)
    job_id = inference.start_or_continue(remote, spec, store)
    return inference.collect(remote, inference.wait(remote, job_id), store, out)


def measure(
    remote: Remote, models: Sequence[str], task: str, min_group: int, deadline: str
) -> Measurement:
    """See `Fleet.measure`."""
    spec = inference.make_spec(
        remote, "private", models, task, min_group=min_group, deadline=deadline
    )
    job = inference.wait(remote, remote.start_job(spec))
    found = output.scores_of(job)
    peers = remote.peer_names()
    if not found:
        reasons = "; ".join(f"{peers.get(p, p)}: {why}" for p, why in job.excused.items())
        raise CommonweightError(
            f"job {job.id} {job.state}: {job.ended_because or reasons}",
            f"commonweight infer show {job.id}",
        )
    names = dict(zip((m.digest for m in spec.models), spec.names, strict=True))
    return Measurement(
        scores=tuple(
            Score(peers.get(peer, peer), names[digest], metric, value, score.num_examples)
            for peer, by_model in found.items()
            for digest, score in by_model.items()
            for metric, value in score.metrics.items()
        ),
        weighted={
            matrix.metric: {names[digest]: mean for digest, mean in matrix.weighted.items()}
            for matrix in output.matrices(found)
        },
        excused={peers.get(peer, peer): why for peer, why in job.excused.items()},
    )


def analyze(
    remote: Remote,
    question: str,
    where: str,
    epsilon: float,
    bounds: Mapping[str, tuple[float, float]],
    deadline: str,
    secure: bool,
) -> Analysis:
    """See `Fleet.analyze`."""
    if method := parse_method(question, where):
        if epsilon or bounds:
            raise UsageError(f"{method.name} has no answer with noise", "leave epsilon out")
        within_s = parse_seconds(deadline)
        return _analysis_of(remote, analysis.ask_method(remote, method, within_s, secure=secure))
    query = parser.parse_query(question, where, epsilon=epsilon, bounds=dict(bounds))
    result = analysis.ask(remote, query, parse_seconds(deadline), secure=secure)
    peers = remote.peer_names()
    rows = (
        {
            **dict(zip(result.by, group.group, strict=True)),
            "rows": group.rows,
            **dict(zip(result.figures, msgspec.to_builtins(group.figures), strict=True)),
        }
        for group in result.groups
    )
    left_out = {peers.get(peer, peer): why for peer, why in result.left_out.items()}
    return Analysis(tuple(rows), result.label, left_out)


def _analysis_of(remote: Remote, found: Statistics) -> Analysis:
    peers = remote.peer_names()
    first, *others = (
        tuple(dict(zip(table.columns, row, strict=True)) for row in table.rows)
        for table in found.tables
    )
    titles = [table.title for table in found.tables[1:]]
    return Analysis(
        first,
        found.label,
        {peers.get(peer, peer): why for peer, why in found.left_out.items()},
        dict(zip(titles, others, strict=True)),
        found.notes,
    )


def _frame(rows: list[Any]) -> pd.DataFrame:
    with needs_extra("notebook", "a data frame"):
        import pandas as pd
    return pd.DataFrame(rows)
