"""The newest Flower that is supported keeps the contract of its private names."""

from __future__ import annotations

import subprocess
import sys

import flwr
import pytest

from tests.support.environments import ROOT

#: Files of tests, and which of them. The last one kills an agent in training.
CONTRACT = (
    ("tests/coordinator/transport/test_flower.py", "not long"),
    ("tests/coordinator/runs/test_app_runs.py", "not long"),
    ("tests/e2e/test_flower_apps.py", "long"),
)


@pytest.mark.skipif(flwr.__version__.startswith("1.41."), reason="make test runs them on 1.41")
@pytest.mark.parametrize(("file", "which"), CONTRACT)
def test_the_newest_flower_keeps_the_contract(file: str, which: str) -> None:
    assert flwr.__version__.startswith("1.42.")
    words = [sys.executable, "-m", "pytest", "-n", "0", "-m", which, file]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
