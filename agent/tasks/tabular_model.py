"""The model of the task "tabular": linear, or a perceptron with a few layers."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from agent.data import features
from agent.tasks import Setting
from agent.tasks.training.loop_state import Tensors
from agent.tasks.training.torch_task import layer_schema
from protocols.errors import UsageError
from protocols.model.weights import Schema, TensorSpec
from protocols.tables.preprocessing import Preprocessing


class TableModel(NamedTuple):
    """The model's shape: inputs, a table for each category column, hidden layers, outputs."""

    numbers: int
    embeddings: tuple[tuple[int, int], ...]
    hidden: tuple[int, ...]
    outputs: int

    @classmethod
    def of(cls, made: Preprocessing, hidden: Setting | None) -> Self:
        """The model for tables of this preprocessing. `hidden`: sizes of the layers, such as
        "64,32"; None for a linear model. Raises UsageError for other sizes.
        """
        numbers, _ = features.input_width(made)
        outputs = len(made.target.classes) or 1
        sizes = [len(feature.categories) + 2 for feature in made.categorical]
        if hidden is None:
            return cls(numbers, tuple((size, outputs) for size in sizes), (), outputs)
        try:
            layers = tuple(int(size) for size in str(hidden).split(","))
        except ValueError:
            layers = ()
        if not layers or min(layers) < 1:
            raise UsageError(f"hidden cannot be {hidden!r}", "such as hidden=64,32")
        # Half of the categories: Guo and Berkhahn, Entity Embeddings of Categorical Variables, 2016
        dims = tuple((size, min(32, -(-size // 2))) for size in sizes)
        return cls(numbers, dims, layers, outputs)

    @property
    def linear(self) -> bool:
        return not self.hidden

    def schema(self) -> Schema:
        sizes = {
            f"embedding{place}.weight": TensorSpec("F32", shape)
            for place, shape in enumerate(self.embeddings)
        }
        # In a linear model an embedding is a bias for each category, straight to the outputs.
        before = self.numbers + (0 if self.linear else sum(dim for _, dim in self.embeddings))
        layers = {}
        for place, after in enumerate(self.hidden, 1):
            layers[f"hidden{place}"] = (after, before)
            before = after
        return sizes | layer_schema({**layers, "output": (self.outputs, before)})

    def forward(self, w: Tensors, x: Tensor) -> Tensor:
        """float32[n, numbers + categories] -> float32[n, outputs]."""
        numbers, indices = x[:, : self.numbers], x[:, self.numbers :].long()
        found = [
            F.embedding(indices[:, place], w[f"embedding{place}.weight"])
            for place in range(len(self.embeddings))
        ]
        if self.linear:
            out = F.linear(numbers, w["output.weight"], w["output.bias"])
            return sum(found, out)
        hidden = torch.cat([numbers, *found], 1)
        for place in range(1, len(self.hidden) + 1):
            hidden = F.relu(F.linear(hidden, w[f"hidden{place}.weight"], w[f"hidden{place}.bias"]))
        return F.linear(hidden, w["output.weight"], w["output.bias"])
