"""Metrics as the real TensorBoard and MLflow read them back."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.cli import tracking
from tests.coordinator.cli.test_tracking import RUN, closed


def test_tensorboard_reads_its_event_files(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = tracking.TensorBoard(tmp_path)
    for number in (1, 2):
        sink.put(RUN, closed(number))
    sink.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    found = [(event.step, round(event.value, 6)) for event in events.Scalars("accuracy")]
    assert found == [(1, 0.6), (2, 0.7)]


def test_mlflow_keeps_metrics_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    address = (tmp_path / "runs").as_uri()
    sink = tracking.MLflow(address, RUN)
    for number in (1, 2):
        sink.put(RUN, closed(number))
    sink.close()
    client = mlflow.MlflowClient(tracking_uri=address)
    kept = client.search_runs([client.get_experiment_by_name("mnist").experiment_id])[0]
    assert kept.data.params == {"lr": "0.1", "strategy": "fedavg", "codec": "fp32"}
    history = client.get_metric_history(kept.info.run_id, "accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.6), (2, 0.7)]
