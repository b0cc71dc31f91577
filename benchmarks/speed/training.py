"""Examples per second of local training, compared with a plain PyTorch loop.

    python -m benchmarks.speed.training

Ours takes the complete path of a round: a request to the trainer's child process, the base read
from its file, progress and journal, the update written and synced. The plain loop uses `nn.Module`
and `torch.optim.SGD` over tensors in memory; only the loop is timed. Both train the same number of
steps on the same digits with the same number of threads, alternating.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from agent.data.settings import DataSettings
from agent.tasks.work import Init, Train
from agent.trainer.process import TrainerProcess, trainer_program

THREADS = 1
PASSES = 3
WARM_UP_STEPS = 20


class Course(NamedTuple):
    """A training course: a number of steps with `batch` examples of the 4,000 digits."""

    model: str
    batch: int
    steps: int


FULL = (Course("2nn", 10, 12_000), Course("2nn", 100, 4_000), Course("cnn", 10, 400))
QUICK = (Course("2nn", 10, 6_000), Course("cnn", 10, 150))
TINY = (Course("2nn", 10, 200), Course("cnn", 10, 5))


class Spent(NamedTuple):
    """Wall and CPU seconds of one pass."""

    wall_s: float
    cpu_s: float


def measure(
    courses: tuple[Course, ...], folder: Path, passes: int = PASSES
) -> list[dict[str, Any]]:
    """One row per course: medians of alternating passes of ours and of the plain loop."""
    trainer = TrainerProcess(trainer_program(folder / "trainer", threads=THREADS), DataSettings())
    rows = []
    try:
        for course in courses:
            _ours(trainer, course._replace(steps=WARM_UP_STEPS), folder)
            pairs = [(_ours(trainer, course, folder), _bare(course)) for _ in range(passes)]
            own, bare = zip(*pairs, strict=True)
            examples = course.batch * course.steps
            rate = {
                name: {
                    "wall": examples / statistics.median(spent.wall_s for spent in spents),
                    "cpu": examples / statistics.median(spent.cpu_s for spent in spents),
                }
                for name, spents in (("ours", own), ("bare", bare))
            }
            rows.append(
                {
                    **course._asdict(),
                    "threads": THREADS,
                    "ours_examples_per_s": rate["ours"]["wall"],
                    "bare_examples_per_s": rate["bare"]["wall"],
                    "ratio": rate["ours"]["wall"] / rate["bare"]["wall"],
                    "ours_examples_per_cpu_s": rate["ours"]["cpu"],
                    "bare_examples_per_cpu_s": rate["bare"]["cpu"],
                    "ratio_cpu": rate["ours"]["cpu"] / rate["bare"]["cpu"],
                }
            )
    finally:
        trainer.stop()
    return rows


def _ours(trainer: TrainerProcess, course: Course, folder: Path) -> Spent:
    settings: dict[str, str | int | float | bool] = {
        "model": course.model,
        "batch_size": course.batch,
        "max_steps": course.steps,
        "epochs": course.steps,
    }
    base = folder / f"{course.model}.safetensors"
    if not base.exists():
        trainer.run(Init(task="mnist", settings=settings, seed=1, out=str(base)))
    trainer.delete_checkpoint()
    before, began = _cpu_s(trainer), time.perf_counter()
    trainer.run(
        Train(
            task="mnist", settings=settings, base=str(base), out=str(folder / "update.safetensors")
        )
    )
    return Spent(time.perf_counter() - began, _cpu_s(trainer) - before)


def _cpu_s(trainer: TrainerProcess) -> float:
    times = psutil.Process(trainer.pid).cpu_times() if trainer.pid else None
    return times.user + times.system if times else 0.0


def _bare(course: Course) -> Spent:
    command = [sys.executable, "-m", "benchmarks.speed.training", "--bare", *map(str, course)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return Spent(**json.loads(done.stdout))


def bare(course: Course) -> Spent:
    """The plain loop, in a process of its own."""
    import torch
    from torch import nn

    from agent.tasks.demo.mnist import TRAINED_ON, Mnist

    torch.set_num_threads(THREADS)
    task = Mnist()
    task.load(DataSettings(device="cpu"))
    x, y = next(task._source({}, 0).batches(torch.arange(TRAINED_ON), TRAINED_ON))
    model = nn.Sequential(
        *(
            [
                nn.Unflatten(1, (1, 28, 28)),
                nn.Conv2d(1, 32, 5, padding=2),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(32, 64, 5, padding=2),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(7 * 7 * 64, 512),
                nn.ReLU(),
                nn.Linear(512, 10),
            ]
            if course.model == "cnn"
            else [
                nn.Linear(784, 200),
                nn.ReLU(),
                nn.Linear(200, 200),
                nn.ReLU(),
                nn.Linear(200, 10),
            ]
        )
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of = nn.CrossEntropyLoss()

    def train(steps: int) -> None:
        done = 0
        while done < steps:
            order = torch.randperm(len(y))
            for mine in order.split(course.batch):
                optimizer.zero_grad()
                loss_of(model(x[mine]), y[mine]).backward()
                optimizer.step()
                done += 1
                if done == steps:
                    return

    train(WARM_UP_STEPS)
    wall, cpu = time.perf_counter(), time.process_time()
    train(course.steps)
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.training", description=__doc__
    )
    parser.add_argument("--bare", nargs=3, metavar=("MODEL", "BATCH", "STEPS"))
    asked = parser.parse_args()
    if asked.bare:
        model, batch, steps = asked.bare
        print(json.dumps(bare(Course(model, int(batch), int(steps)))._asdict()))
        return
    with tempfile.TemporaryDirectory(prefix="commonweight-bench-") as folder:
        print(json.dumps(measure(FULL, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
