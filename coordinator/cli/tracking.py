"""A run's metrics, round by round, for other programs: JSON lines, TensorBoard, MLflow.

TensorBoard and MLflow need `pip install 'commonweight[tracking]'`; they are imported on use.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec

from coordinator.runs.state import Round, Run
from protocols.errors import CommonweightError
from protocols.extras import needs_extra

#: The fields of a round in its JSON line, beside "run" and "peers".
_LINE_FIELDS = (
    *("round", "digest", "metrics", "spread", "worst", "tallies"),
    *("refused", "seconds", "bytes_up", "bytes_down"),
)


class Sink(Protocol):
    """Takes closed rounds in order."""

    def put(self, run: Run, closed: Round) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """Prints a line of JSON for each round."""

    def put(self, run: Run, closed: Round) -> None:
        sys.stdout.write(line(run, closed) + "\n")
        sys.stdout.flush()

    def close(self) -> None: ...


def scalars(closed: Round) -> Iterator[tuple[str, float]]:
    """The finite numbers of a round, by name."""
    for name, value in closed.metrics.items():
        if value is not None and math.isfinite(value):
            yield name, value
    for name, (least, median, most) in closed.spread.items():
        yield from ((f"least/{name}", least), (f"median/{name}", median), (f"most/{name}", most))
    yield "round/seconds", closed.seconds
    yield "round/peers", float(len(closed.contributors))
    yield "round/bytes_up", float(closed.bytes_up)
    yield "round/bytes_down", float(closed.bytes_down)


def line(run: Run, closed: Round) -> str:
    """A round as one line of JSON."""
    data = {"run": run.id} | {name: getattr(closed, name) for name in _LINE_FIELDS}
    return msgspec.json.encode(data | {"peers": len(closed.contributors)}).decode()


class TensorBoard:
    """Writes event files to a folder. Raises CommonweightError if the package is missing."""

    def __init__(self, folder: Path) -> None:
        with needs_extra("tracking", "--tensorboard"):
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        self._event, self._summary = Event, Summary
        self._writer: Any = EventFileWriter(str(folder))

    def put(self, run: Run, closed: Round) -> None:
        values = [self._summary.Value(tag=n, simple_value=v) for n, v in scalars(closed)]
        event = self._event(step=closed.round, summary=self._summary(value=values))
        self._writer.add_event(event)

    def close(self) -> None:
        self._writer.close()


class MLflow:
    """Logs to a new MLflow run. Raises CommonweightError if MLflow is missing or refuses."""

    def __init__(self, address: str, run: Run) -> None:
        with needs_extra("tracking", "--mlflow"):
            from mlflow import MlflowClient
            from mlflow.entities import Metric, Param
        self._client: Any = MlflowClient(tracking_uri=address)
        self._metric = Metric
        try:
            name = run.spec.task
            known = self._client.get_experiment_by_name(name)
            found = known.experiment_id if known else self._client.create_experiment(name)
            self._id = self._client.create_run(found, run_name=run.id).info.run_id
            spec = run.ordered or run.spec
            settings = {**spec.settings, "strategy": spec.strategy, "codec": spec.codec}
            settings.pop("preprocessing", "")  # longer than a parameter may be
            params = [Param(key, str(value)) for key, value in settings.items()]
            self._client.log_batch(self._id, params=params)
        except Exception as err:  # the client raises errors of many libraries
            raise CommonweightError(f"cannot log to MLflow at {address}: {err}") from err

    def put(self, run: Run, closed: Round) -> None:
        metrics = [self._metric(n, v, 0, closed.round) for n, v in scalars(closed)]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)
