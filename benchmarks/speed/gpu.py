"""Examples per second on a graphics card, and their ratio to a plain PyTorch loop.

    python -m benchmarks.speed.gpu [--device cuda:1] [--steps 200]

Ours fetches each batch from memory of the CPU, reports steps, and can be resumed. The plain loop
has all its examples on the card and never waits for a loss. Both have the same model, optimizer,
precision and number of steps, and alternate. Nothing is written: the ratios are those of this
machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.tasks.images import networks
from agent.tasks.language.gpt import TextLM
from agent.tasks.training import precision
from agent.tasks.training.devices import select_device
from agent.tasks.training.examples import Batch, FetchedExamples
from agent.tasks.training.hyperparameters import read_hyperparameters
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.module_state import load_tensors, schema_of, tensors_of
from agent.tasks.training.seeds import random_state
from agent.tasks.training.torch_loop import TrainingLoop, autograd_step
from agent.trainer.progress import StepCallback, WorkControl
from protocols.model.weights import Weights

PASSES, WARM_UP_STEPS = 3, 3
CLASSES = 10


class Course(NamedTuple):
    """A model, its first weights, its loss, and examples on the CPU."""

    name: str
    model: nn.Module
    weights: Weights
    loss: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor
    batch: int


def pictures(side: int, batch: int) -> Course:
    """ResNet-18 on random pictures."""
    model = networks.ResNet(3, CLASSES, "group")
    first = networks.first_resnet(schema_of(tensors_of(model)), random_state("bench"))
    x = torch.randint(256, (8 * batch, 3, side, side), dtype=torch.uint8)
    y = torch.randint(CLASSES, (8 * batch,))
    return Course(f"ResNet-18, {batch} × {side}²", model, first, F.cross_entropy, x, y, batch)


def texts(layers: int, width: int, context: int, batch: int) -> Course:
    """A GPT on random bytes."""
    settings = {"layers": layers, "width": width, "context": context}
    task, tokens = TextLM(), torch.randint(256, (8 * batch, context + 1))
    model, first = task._build(settings), task.init(0, settings)
    name = f"GPT {layers} × {width}, {batch} × {context}"
    return Course(name, model, first, task.loss, tokens[:, :-1], tokens[:, 1:], batch)


def ours(course: Course, kind: str, device: torch.device, steps: int) -> float:
    """Seconds of `steps` steps."""
    model = _on(device, course)

    def read(numbers: Tensor) -> Batch:
        return course.x[numbers], course.y[numbers]

    def loss_of(w: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return course.loss(model(x), y)

    examples = FetchedExamples(read, len(course.y), device)
    settings = {"batch_size": course.batch, "max_steps": steps, "epochs": steps, "precision": kind}
    plan, step = read_hyperparameters(settings), autograd_step(loss_of)
    on_step = StepCallback(0, "train", WorkControl(), lambda answer: None)
    began = time.perf_counter()
    TrainingLoop().train(tensors_of(model), plan, examples, step, on_step)
    return time.perf_counter() - began


def plain(course: Course, kind: str, device: torch.device, steps: int) -> float:
    """Seconds of `steps` steps."""
    x, y = course.x.to(device), course.y.to(device)
    began = time.perf_counter()
    model = _on(device, course)
    optimizer, autocast = torch.optim.SGD(model.parameters(), lr=0.1), precision.use(kind, device)
    scaler = precision.make_scaler(kind, device, {torch.float32})
    for rows in _orders(len(y), course.batch, steps):
        optimizer.zero_grad()
        chosen = rows.to(device)
        with autocast:
            loss = course.loss(model(x[chosen]), y[chosen])
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    for tensor in model.parameters():
        tensor.detach().cpu()
    return time.perf_counter() - began


def _on(device: torch.device, course: Course) -> nn.Module:
    """The model on the device, with its first weights."""
    load_tensors(tensors_of(course.model.to(device).train()), course.weights)
    return course.model


def _orders(count: int, batch: int, steps: int) -> Iterator[Tensor]:
    epochs = (torch.split(torch.randperm(count), batch) for _ in range(steps))
    return islice(chain.from_iterable(epochs), steps)


def compare(course: Course, kind: str, device: torch.device, steps: int) -> tuple[float, float]:
    """Examples per second of ours and of the plain loop: medians of alternating passes."""
    ways: tuple[Callable[..., float], ...] = (ours, plain)
    for way in ways:
        way(course, kind, device, WARM_UP_STEPS)
    spent = [[way(course, kind, device, steps) for way in ways] for _ in range(PASSES)]
    own, bare = (statistics.median(column) for column in zip(*spent, strict=True))
    return course.batch * steps / own, course.batch * steps / bare


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.gpu", description=__doc__)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, or a card: cuda:1")
    parser.add_argument("--steps", type=int, default=0, help="of a pass")
    asked = parser.parse_args(words)
    device = select_device(asked.device)
    on_card = device.type == "cuda"
    steps = asked.steps or (200 if on_card else 3)
    if on_card:
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}")
        courses = (pictures(96, 64), pictures(224, 64), texts(6, 384, 256, 32))
    else:
        print(f"{device.type}, torch {torch.__version__}. These ratios say nothing about a card.")
        courses = (pictures(32, 4), texts(1, 64, 32, 4))
    print(f"{'':28}{'precision':>10}{'ours, 1/s':>12}{'plain, 1/s':>12}{'ratio':>8}")
    for course in courses:
        for kind in dict.fromkeys(["fp32", precision.resolve("auto", device)]):
            own, bare = compare(course, kind, device, steps)
            print(f"{course.name:28}{kind:>10}{own:12.1f}{bare:12.1f}{own / bare:8.2f}", flush=True)


if __name__ == "__main__":
    main()
