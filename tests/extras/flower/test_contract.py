"""The newest Flower that is supported keeps the contract of its private names."""

from __future__ import annotations

import subprocess
import sys

import flwr
import pytest

from tests.support.environments import ROOT

CONTRACT = ("tests/coordinator/transport/test_flower.py", "tests/coordinator/runs/test_app_runs.py")


@pytest.mark.parametrize("file", CONTRACT)
def test_the_newest_flower_keeps_the_contract(file: str) -> None:
    assert flwr.__version__.startswith("1.42.")
    words = [sys.executable, "-m", "pytest", "-n", "0", "-m", "not long", file]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
