"""Tables with a rare class: --set class_weights=balanced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("pyarrow", reason="tables are read by the extra tabular")

from agent.data.settings import DataSettings
from agent.tasks.tabular import Tabular
from protocols.model.weights import Weights
from protocols.tables import evaluation_counts, preprocessing
from tests.support.callbacks import ignore_step
from tests.support.tables import write_csv

LINEAR: dict[str, Any] = {
    "target": "ill",
    "class_weights": "balanced",
    "epochs": 8,
    "batch_size": 128,
    "lr": 0.05,
}


def patients(path: Path, seed: int, rate: float, rows: int = 1000) -> Path:
    """Few are ill, those with a high marker more often."""
    rng = np.random.default_rng(seed)
    ill = rng.random(rows) < rate
    marker = rng.normal(size=rows) + 1.5 * ill
    return write_csv(
        path,
        [
            {"marker": f"{m:.4f}", "ill": "yes" if i else "no"}
            for m, i in zip(marker, ill, strict=True)
        ],
    )


def fleet(
    folder: Path, settings: dict[str, Any], min_count: int = 3
) -> tuple[list[Tabular], dict[str, Any]]:
    """Two clinics, of which one has most of the ill, with the preprocessing of both."""
    tasks = []
    for number, rate in enumerate((0.01, 0.08)):
        tasks.append(Tabular())
        path = patients(folder / f"{number}.csv", number, rate)
        data = DataSettings(path=str(path), index=number, device="cpu", min_count=min_count)
        tasks[-1].load(data)
    tables = {str(n): task.survey(settings) for n, task in enumerate(tasks)}
    made = preprocessing.derive(tables, settings).preprocessing
    return tasks, {**settings, "preprocessing": preprocessing.encode(made)}


def evaluated(tasks: list[Tabular], version: Weights, settings: dict[str, Any]) -> dict[str, float]:
    told = [task.evaluate(version, settings, ignore_step) for task in tasks]
    tallies = evaluation_counts.merge((one.tallies for one in told), [1.0] * len(told))
    return evaluation_counts.compute_metrics(tallies)


@pytest.mark.parametrize("model", ["linear", "mlp"])
def test_a_rare_class_is_found_with_weights_of_the_whole_fleet(tmp_path: Path, model: str) -> None:
    torch.set_num_threads(1)
    found = {}
    for kind in ("none", "balanced"):
        tasks, settings = fleet(tmp_path, {**LINEAR, "model": model, "class_weights": kind})
        version = tasks[0].init(0, settings)
        for number in range(2):
            trained = [t.train(version, {**settings, "round": number}, ignore_step) for t in tasks]
            version = Weights(
                {n: np.mean([one.weights[n] for one in trained], 0) for n in trained[0].weights}
            )
        found[kind] = evaluated(tasks, version, settings)
    assert found["none"]["balanced_accuracy"] < 0.6
    assert found["balanced"]["balanced_accuracy"] > 0.7
    for metrics in found.values():
        assert metrics["auc"] > 0.8
        assert 0.1 < metrics["average_precision"] < 1


def test_the_loss_and_its_gradient_are_those_of_all_rows_together(tmp_path: Path) -> None:
    """The mean over peers by rows is the weighted loss of the union, as the divisor is the rows."""
    tasks, settings = fleet(tmp_path, {**LINEAR, "model": "linear"}, min_count=1)
    rng = np.random.default_rng(5)
    version = Weights(
        {
            n: rng.normal(size=s.shape).astype(np.float32)
            for n, s in tasks[0].schema(settings).items()
        }
    )
    target = preprocessing.decode(settings["preprocessing"]).target
    weights = torch.tensor(target.weights)
    assert weights[1] / weights[0] > 10
    sets = [[task._sets(settings)[part] for task in tasks] for part in (0, 1)]
    x, y = (np.concatenate([getattr(rows, name) for rows in sets[0]]) for name in "xy")
    w = {name: torch.tensor(np.array(version[name]), requires_grad=True) for name in version}
    logits = torch.tensor(x) @ w["output.weight"].T + w["output.bias"]
    loss = F.cross_entropy(logits, torch.tensor(y), reduction="none") * weights[torch.tensor(y)]
    loss.mean().backward()
    parts = [task.gradient(version, settings) for task in tasks]
    shares = [len(rows.y) / len(y) for rows in sets[0]]
    for name, tensor in w.items():
        mean = sum(np.asarray(p[name]) * share for p, share in zip(parts, shares, strict=True))
        assert tensor.grad is not None
        np.testing.assert_allclose(mean, tensor.grad.numpy(), rtol=1e-4, atol=1e-5)
    x, y = (torch.tensor(np.concatenate([getattr(r, n) for r in sets[1]])) for n in "xy")
    with torch.no_grad():
        logits = x @ w["output.weight"].T + w["output.bias"]
        expected = (F.cross_entropy(logits, y, reduction="none") * weights[y]).mean()
    told = [task.evaluate(version, settings, ignore_step) for task in tasks]
    total = sum(one.num_examples for one in told)
    mean_loss = sum(one.metrics["loss"] * one.num_examples for one in told) / total
    assert mean_loss == pytest.approx(float(expected), rel=1e-5)
