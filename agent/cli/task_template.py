"""`commonweight-agent task new`: writes a task to start from, with rows to try it on."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Annotated

import typer

from agent.cli.common import print_line
from agent.tasks import registry
from protocols.errors import UsageError
from protocols.local.os_errors import os_errors_as

_TEMPLATE = '''"""A task of your own: a model, and how this machine's data are read.

Try it here:                 commonweight-agent task check ./FILE:CLASS --data DATA
With simulated peers:        commonweight simulate ./FILE:CLASS --owner data=DATA
Each owner registers it:     commonweight-agent task add ./FILE:CLASS
The operator starts a run:   commonweight run start FILE:CLASS --set width=64
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from msgspec import Meta
from torch import nn

import commonweight as cw

FEATURES, CLASSES = 4, 3


class CLASS(cw.TorchTask):
    version = "1"  # peers with another version get an error before round 1

    @dataclass
    class Settings:
        """What a run may change with --set: settings of your own, and other defaults for those of
        the training, such as epochs, batch_size, lr and optimiser (docs/training.md)."""

        width: Annotated[int, Meta(ge=1, le=1024, description="units of the hidden layer")] = 32
        lr: float = 0.05

    def model(self, settings):
        """Any nn.Module. Its parameters and buffers are what the peers share."""
        layers = nn.Linear(FEATURES, settings.width), nn.ReLU()
        return nn.Sequential(*layers, nn.Linear(settings.width, CLASSES))

    def data(self, source, settings):
        """What is trained on, and what is held out. source.path is what the owner gave as --data.

        Each is a Dataset, a DataLoader (its workers are used), or tensors (x, y). Nothing of it
        leaves this machine. Here: a CSV file of FEATURES numbers and the class, below a header.
        """
        table = np.loadtxt(source.path, np.float32, delimiter=",", skiprows=1, ndmin=2)
        x, y = torch.tensor(table[:, :FEATURES]), torch.tensor(table[:, FEATURES]).long()
        held_out = len(x) // 5
        return (x[held_out:], y[held_out:]), (x[:held_out], y[:held_out])

    # The rest is optional. These are the defaults for classes:
    #
    # def loss(self, output, target):            # the mean of a batch
    #     return nn.functional.cross_entropy(output, target)
    #
    # def metrics(self, output, target):         # means of a batch, beside the loss
    #     return {"accuracy": (output.argmax(1) == target).float().mean()}
    #
    # def optimizer(self, model, settings):      # by default what the settings name
    #     return torch.optim.SGD(model.parameters(), lr=settings.lr)
    #
    # def inputs(self, path, settings):          # what predict reads: a tensor, or batches
    #     return torch.tensor(np.load(path))     # without it: .npy, or a CSV file like the data
'''
_ROWS = 60


def new(
    path: Annotated[Path, typer.Argument(help="The file to write: my_task.py.")],
) -> None:
    """Write a task to start from, and made-up rows to try it on."""
    data = path.with_suffix(".csv")
    attribute = "".join(word.capitalize() for word in re.split(r"[\W_]+", path.stem))
    if path.suffix != ".py" or not attribute.isidentifier():
        raise UsageError(
            f"a task is written to a Python file, and {path.name} is no name of one",
            "commonweight-agent task new my_task.py",
        )
    registry.name_of_source(f"{path}:{attribute}")  # raises UsageError
    for file in (path, data):
        if file.exists():
            raise UsageError(f"{file} is there already", "choose another name")
    words = {"CLASS": attribute, "FILE": path.name, "DATA": data.name}
    text = _TEMPLATE
    for placeholder, word in words.items():
        text = re.sub(rf"\b{placeholder}\b", word, text)
    with os_errors_as(UsageError, f"cannot write {path}", "name a file in a folder of yours"):
        path.write_text(text, encoding="utf-8")
        data.write_text(_made_up_rows(), encoding="utf-8")
    print_line(f"wrote {path} and {data}, which has made-up rows")
    print_line(f"try it: commonweight-agent task check {path}:{attribute} --data {data}")
    print_line(f"or with many peers: {_simulate(path, attribute, data)}")


def _simulate(path: Path, attribute: str, data: Path) -> str:
    return f"commonweight simulate {path}:{attribute} --peers 5 --rounds 3 --owner data={data}"


def _made_up_rows() -> str:
    """A CSV table; the class is that of the largest of three numbers."""
    chance, lines = random.Random(0), ["a,b,c,d,class"]
    for _ in range(_ROWS):
        numbers = [chance.gauss(0, 1) for _ in range(4)]
        lines.append(",".join(f"{n:.3f}" for n in numbers) + f",{numbers.index(max(numbers[:3]))}")
    return "\n".join(lines) + "\n"
