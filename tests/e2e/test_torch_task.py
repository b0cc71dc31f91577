"""A task of a user's own in ten lines: a real fleet checks, trains, measures and uses it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.fleet_harness import ALLOW, ROOT, Fleet, fleet

pytestmark = pytest.mark.long

DIGITS = ROOT / "docs/examples/digits.py"
TASK = {"COMMONWEIGHT_AGENT_TASK_FILES": f"digits.py:Digits={DIGITS}:Digits"}
#: The same data behind a loader with workers, in the owner's sandbox.
WORKERS = """
from torch import tensor
from torch.utils.data import DataLoader, TensorDataset
from digits import Digits

class Loaded(Digits):
    def data(self, source, settings):
        return tuple(
            DataLoader(TensorDataset(tensor(x), tensor(y)), batch_size=20, num_workers=2)
            for x, y in super().data(source, settings)
        )
"""


def digits(folder: Path, names: list[str]) -> dict[str, Path]:
    """Real handwritten digits of 8 × 8 pixels, a part for each."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    x = (found.images[:, None] / 16).astype(np.float32)
    paths = {}
    for name, rows in zip(names, np.array_split(np.arange(len(x)), len(names)), strict=True):
        paths[name] = folder / f"{name}.npz"
        np.savez(paths[name], x=x[rows], y=found.target[rows])
    return paths


def trained(site: Fleet, *options: str) -> float:
    words = ("digits.py:Digits", "--quorum", "3", "--set", "lr=0.05", *options)
    run = site.ended_run(site.start_run(*words))
    assert run["state"] == "finished", run["ended_because"]
    return float(run["history"][-1]["metrics"]["accuracy"])


def test_ten_lines_are_a_task(tmp_path: Path) -> None:
    assert len([line for line in DIGITS.read_text().splitlines() if line]) == 10
    with fleet(tmp_path, **TASK) as site:
        site.up()
        parts = digits(tmp_path, ["ann", "bob", "cyd"])
        for name, path in parts.items():
            words = ("join", "-", "--name", name, "--data", str(path), *ALLOW)
            done = site.ask_agent(name, *words, given=site.ticket())
            assert done.returncode == 0, done.stderr
        _check_task(site, tmp_path)
        site.start(*parts)
        assert trained(site, "--rounds", "6", "--set", "epochs=2") > 0.85
        assert trained(site, "--rounds", "3", "--strategy", "scaffold") > 0.5
        assert (
            trained(site, "--rounds", "2", "--strategy", "diloco", "--set", "optimiser=adamw") > 0
        )
        _check_predictions(site, tmp_path, parts["ann"])


def _check_task(site: Fleet, folder: Path) -> None:
    (folder / "digits.py").write_bytes(DIGITS.read_bytes())
    (folder / "loaded.py").write_text(WORKERS)
    for source in (f"{folder}/digits.py:Digits", f"{folder}/loaded.py:Loaded"):
        done = site.ask_agent("ann", "task", "check", source, "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        report = json.loads(done.stdout)
        assert report["schema"]["tensors"]["1.num_batches_tracked"] == ["I64", []]
        assert report["train"]["steps"] == (5 * 50 if source.endswith("Digits") else 5 * 25)


def _check_predictions(site: Fleet, folder: Path, part: Path) -> None:
    found, rows = np.load(part), folder / "rows.npy"
    np.save(rows, found["x"][:100])
    out = folder / "answers.json"
    words = ("predict", str(rows), "--model", "latest", "--out", str(out))
    done = site.ask_agent("ann", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(answers) == 100
    assert all(0 <= answer["probability"] <= 1 for answer in answers)
