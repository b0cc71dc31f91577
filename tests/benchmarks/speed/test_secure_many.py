"""A whole secure run on a ring of neighbors, as for hundreds of peers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.fleet_harness import ROOT


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_run_on_a_ring_of_neighbors_bears_peers_that_are_lost() -> None:
    """Three of 70 peers go before their masked update, three after it."""
    words = ["-m", "benchmarks.speed.secure_many", "--peers", "70", "--lost", "6"]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "'contributors': 67" in done.stdout
    assert "all 1 rounds are done" in done.stdout
