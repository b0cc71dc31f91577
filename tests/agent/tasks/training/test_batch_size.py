"""Out of memory: the batch size that would fit is found, told, and does fit."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.tasks.training.batch_size import run_or_suggest_batch_size
from protocols.errors import OutOfMemory, TrainerFailed
from protocols.messages.refusals import refusal_of

ROOT = Path(__file__).resolve().parents[4]

#: A model that takes 4 MB an example, in a process that may take 300 MB more than it has.
HUNGRY = """
import resource, sys
from pathlib import Path
import numpy as np, torch
from agent.tasks.training.torch_loop import Examples, TrainingLoop, autograd_step
from agent.tasks.training.hyperparameters import read_hyperparameters
from protocols.errors import OutOfMemory

torch.set_num_threads(1)

def loss_of(w, x, y):
    return (torch.ones(len(x), 1 << 20) * w["w"]).mean()

def train(batch):
    plan = read_hyperparameters({"batch_size": batch, "epochs": 1, "max_steps": 2})
    examples = Examples(torch.zeros(512, 1), torch.zeros(512))
    weights = {"w": np.ones(1, np.float32)}
    return TrainingLoop().train(weights, plan, examples, autograd_step(loss_of), lambda *a: None)

train(1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (300 << 20),) * 2)
try:
    train(512)
except OutOfMemory as err:
    print(err.message, "|", err.hint)
    train(err.max_batch_size)
    print("fitted")
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux bounds a process's memory so")
def test_the_batch_size_that_is_told_does_fit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", HUNGRY], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told, fitted = done.stdout.splitlines()
    match = re.fullmatch(
        r"512 examples a step do not fit into memory; (\d+) would fit \| .*batch_size=\1", told
    )
    assert match is not None, told
    assert 8 <= int(match[1]) <= 64
    assert fitted == "fitted"


@given(st.integers(1, 3000), st.integers(0, 3000))
def test_the_largest_half_of_a_half_that_goes(batch: int, room: int) -> None:
    def step(size: int) -> float:
        if size > room:
            raise MemoryError
        return float(size)

    if batch <= room:
        assert run_or_suggest_batch_size(step, batch) == batch
        return
    with pytest.raises(OutOfMemory) as caught:
        run_or_suggest_batch_size(step, batch)
    halves = [batch >> k for k in range(1, batch.bit_length())]
    assert caught.value.max_batch_size == next((half for half in halves if half <= room), 0)


def test_other_faults_are_their_own() -> None:
    def step(size: int) -> float:
        raise ValueError("a shape is odd")

    with pytest.raises(ValueError, match="a shape is odd"):
        run_or_suggest_batch_size(step, 8)


def test_the_operator_is_told_what_would_fit() -> None:
    err = OutOfMemory(512, 64)
    told = refusal_of(TrainerFailed(err.code, err.message, err.hint)).encode()
    assert told == "out of memory: 512 examples a step do not fit into memory; 64 would fit"
