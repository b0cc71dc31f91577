"""The model of the task "tabular": linear, or a perceptron with a few layers."""

from __future__ import annotations

from operator import mul

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent.data import features
from agent.tasks.training.built_in import Embedding, Linear
from protocols.errors import UsageError
from protocols.tables.preprocessing import Preprocessing

#: Layers and weights of a perceptron, at most: a run names the layers, and an agent makes them.
MAX_LAYERS, MAX_WEIGHTS = 8, 1 << 24


class TableModel(nn.Module):
    """A model for tables of a preprocessing: float32[n, numbers + categories] -> [n, outputs].

    `hidden`: sizes of the layers, such as "64,32"; None for a linear model, in which an embedding
    is a bias for each category, straight to the outputs. `class_weights`: float32[classes], or
    None. Raises UsageError for other sizes.
    """

    class_weights: Tensor | None

    def __init__(self, made: Preprocessing, hidden: str | None) -> None:
        super().__init__()
        self._numbers, _ = features.input_width(made)
        outputs, sizes = len(made.target.classes) or 1, [] if hidden is None else _sizes(hidden)
        before = self._numbers
        self._embeddings, self._hidden = list[Embedding](), list[Linear]()
        for place, feature in enumerate(made.categorical):
            count = len(feature.categories) + 2
            # Half of the categories: Guo and Berkhahn, Entity Embeddings of Categorical Variables,
            # 2016
            embedding = Embedding(count, min(32, -(-count // 2)) if sizes else outputs)
            self.add_module(f"embedding{place}", embedding)
            self._embeddings.append(embedding)
            before += embedding.embedding_dim if sizes else 0
        if sum(map(mul, [before, *sizes], [*sizes, outputs])) > MAX_WEIGHTS and sizes:
            raise UsageError(
                f"hidden={hidden} gives more than {MAX_WEIGHTS:,} weights with {before} inputs",
                "fewer or smaller layers, such as hidden=64,32",
            )
        for place, after in enumerate(sizes, 1):
            self._hidden.append(Linear(before, after))
            self.add_module(f"hidden{place}", self._hidden[-1])
            before = after
        self.output = Linear(before, outputs)
        weights = torch.tensor(made.target.weights) if made.target.weights else None
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        numbers, indices = x[:, : self._numbers], x[:, self._numbers :].long()
        found = [embed(indices[:, place]) for place, embed in enumerate(self._embeddings)]
        if not self._hidden:
            return sum(found, start=self.output(numbers))  # type: ignore[no-any-return]
        x = torch.cat([numbers, *found], 1)
        for layer in self._hidden:
            x = F.relu(layer(x))
        output: Tensor = self.output(x)
        return output


def _sizes(hidden: str) -> list[int]:
    try:
        sizes = [int(size) for size in hidden.split(",", MAX_LAYERS - 1)]
    except ValueError:  # also of more layers
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UsageError(
            f"hidden cannot be {hidden[:64]!r}",
            f"sizes of 1 to {MAX_LAYERS} layers, such as hidden=64,32",
        )
    return sizes
