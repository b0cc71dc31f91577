"""A task of a user's own in ten lines: a real fleet checks, trains, measures and uses it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.fleet_harness import ALLOW, ROOT, Fleet, fleet

pytestmark = pytest.mark.long

DIGITS = ROOT / "docs/examples/digits.py"
#: The same data behind a loader with workers, and a model that can train with noise.
LOADED = """
from torch import nn, tensor
from torch.utils.data import DataLoader, TensorDataset
from digits import Digits

class Loaded(Digits):
    def data(self, source, settings):
        return tuple(
            DataLoader(TensorDataset(tensor(x), tensor(y)), batch_size=20, num_workers=2)
            for x, y in super().data(source, settings)
        )

    def model(self, settings):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
"""
#: The same digits for an estimator of scikit-learn.
LINEAR = """
import numpy as np
from sklearn.linear_model import SGDClassifier

import commonweight as cw

class Linear(cw.SklearnTask):
    classes = tuple(range(10))

    def model(self, settings):
        return SGDClassifier(loss="log_loss", random_state=0)

    def data(self, source, settings):
        found = np.load(source.path)
        x, y = found["x"].reshape(-1, 64), found["y"]
        return (x[100:], y[100:]), (x[:100], y[:100])
"""
TASKS = {"digits.py": "Digits", "loaded.py": "Loaded", "linear.py": "Linear"}


def digits(folder: Path, names: list[str]) -> dict[str, Path]:
    """Real handwritten digits of 8 × 8 pixels, a part for each."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    x = (found.images[:, None] / 16).astype(np.float32)
    paths = {}
    for name, rows in zip(names, np.array_split(np.arange(len(x)), len(names)), strict=True):
        paths[name] = folder / f"{name}.npz"
        np.savez(paths[name], x=x[rows], y=found.target[rows])
    return paths


def trained(site: Fleet, task: str, *options: str) -> dict[str, float]:
    run = site.ended_run(site.start_run(task, "--quorum", "3", *options))
    assert run["state"] == "finished", run["ended_because"]
    metrics: dict[str, float] = run["history"][-1]["metrics"]
    return metrics


def test_ten_lines_are_a_task(tmp_path: Path) -> None:
    assert len([line for line in DIGITS.read_text().splitlines() if line]) == 10
    (tmp_path / "digits.py").write_bytes(DIGITS.read_bytes())
    (tmp_path / "loaded.py").write_text(LOADED)
    (tmp_path / "linear.py").write_text(LINEAR)
    files = ",".join(f"{file}:{name}={tmp_path}/{file}:{name}" for file, name in TASKS.items())
    with fleet(tmp_path, COMMONWEIGHT_AGENT_TASK_FILES=files) as site:
        site.up()
        parts = digits(tmp_path, ["ann", "bob", "cyd"])
        for name, path in parts.items():
            words = ("join", "-", "--name", name, "--data", str(path), *ALLOW)
            done = site.ask_agent(name, *words, given=site.ticket())
            assert done.returncode == 0, done.stderr
        _check_task(site, "digits.py:Digits", steps=5 * 50)
        _check_task(site, "loaded.py:Loaded", steps=5 * 25)
        site.start(*parts)
        _check_settings(site)
        slow = ("digits.py:Digits", "--set", "lr=0.05")
        assert trained(site, *slow, "--rounds", "3", "--strategy", "scaffold")["accuracy"] > 0.5
        keeping = ("--strategy", "diloco", "--set", "optimiser=adamw")
        trained(site, "digits.py:Digits", "--rounds", "2", *keeping)
        rarely = ("--strategy", "diloco", "--codec", "sign", "--set", "optimiser=muon")
        trained(site, "digits.py:Digits", "--rounds", "2", *rarely)
        found = trained(site, *slow, "--rounds", "6", "--set", "epochs=2")
        assert found["accuracy"] > 0.85
        _check_predictions(site, tmp_path, parts["ann"])
        assert trained(site, "linear.py:Linear", "--rounds", "3")["accuracy"] > 0.85
        noisy = ("--dp", "8", "--delta", "1e-5", "--set", "batch_size=100", "--set", "epochs=2")
        assert "accuracy" not in trained(site, "loaded.py:Loaded", "--rounds", "2", *noisy)
        ledger = site.ask_agent("ann", "budget", "--json")
        assert "loaded-py-Loaded" in ledger.stdout, ledger.stdout + ledger.stderr


def _check_task(site: Fleet, name: str, steps: int) -> None:
    """The owner's sandbox lets the task train, with the workers of a loader too."""
    done = site.ask_agent("ann", "task", "check", name, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)["data"]
    assert ("1.num_batches_tracked" in report["schema"]["tensors"]) == (name == "digits.py:Digits")
    assert report["train"]["steps"] == steps


def _check_settings(site: Fleet) -> None:
    """Agents tell the settings of a task, and the next run with a wrong one is refused."""
    listed = site.ask("run", "check", "linear.py:Linear", "--settings")
    assert listed.returncode == 0, listed.stdout + listed.stderr
    assert "epochs=5" in listed.stdout
    assert "passes over this peer's examples" in listed.stdout
    refused = site.ask("run", "start", "linear.py:Linear", "--set", "epochs=0")
    assert refused.returncode != 0
    assert "the setting epochs cannot be 0" in refused.stderr
    assert "at least 1, such as epochs=5" in refused.stderr


def _check_predictions(site: Fleet, folder: Path, part: Path) -> None:
    found, rows = np.load(part), folder / "rows.npy"
    np.save(rows, found["x"][:100])
    out = folder / "answers.csv"
    words = ("predict", str(rows), "--model", "latest", "--out", str(out))
    done = site.ask_agent("ann", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = list(csv.DictReader(out.read_text().splitlines()))
    right = [int(answer["class"]) == y for answer, y in zip(answers, found["y"], strict=False)]
    assert len(answers) == 100
    assert sum(right) > 80
