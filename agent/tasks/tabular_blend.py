"""A blend of models of tables: their weighted mean, in one file of weights.

The mean is that of the probabilities of classes, or of the numbers. The weights come from held-out
rows (`blend_weights`). A blend is made on one machine, for its owner, and never leaves it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agent.tasks import Setting, Settings, blend_weights
from agent.tasks.blend_weights import Floats
from agent.tasks.capabilities import Member
from agent.tasks.training.seeds import random_state
from protocols.errors import BadWeights
from protocols.model.weights import Array, Weights
from protocols.tables.model_scores import MODELS

#: The tensor with the weights of the members.
_SHARES = "blend"
MAX_MEMBERS = 8
#: Held-out rows times members and outputs: more would need much memory.
_MAX_NUMBERS = 1 << 25
_FOLDS = 5
_LEAST = 1e-12


class Blend(NamedTuple):
    """Models, and how much each one counts, float64[k]."""

    members: tuple[Member, ...]
    shares: Floats

    @classmethod
    def read(cls, weights: Mapping[str, Array]) -> Self | None:
        """The blend in a file of weights; None for a single model. Raises BadWeights."""
        if _SHARES not in weights:
            return None
        shares = np.asarray(weights[_SHARES], np.float64)
        parts: dict[int, dict[str, dict[str, Array]]] = {}
        for name in weights:
            if name != _SHARES:
                place, _, rest = name.partition(".")
                kind, _, inner = rest.partition(".")
                if kind not in MODELS or not place.isdecimal() or len(place) > 1:
                    raise BadWeights(f"the blend has a tensor {name!r} of no model")
                parts.setdefault(int(place), {}).setdefault(kind, {})[inner] = weights[name]
        members = tuple(
            Member(kind, Weights(tensors))
            for place in sorted(parts)
            for kind, tensors in parts[place].items()
        )
        whole = shares.shape == (len(members),) and 0 < len(members) <= MAX_MEMBERS
        if not (whole and (shares >= 0).all() and abs(shares.sum() - 1) < 1e-6):
            raise BadWeights("the weights of the blend's models are not positive with the sum 1")
        return cls(members, shares)

    def to_weights(self) -> Weights:
        """One file of all models."""
        tensors: dict[str, Array] = {_SHARES: self.shares}
        for place, (kind, weights) in enumerate(self.members):
            tensors |= {f"{place}.{kind}.{name}": weights[name] for name in weights}
        return Weights(tensors)


def with_kind(settings: Settings, member: Member) -> dict[str, Setting]:
    """The settings of a run, for this model of it."""
    return {**settings, "model": member.kind}


def mix(outputs: Sequence[Tensor], shares: Sequence[float], *, is_class: bool) -> Tensor:
    """The weighted mean: of logits float32[n, classes], as logits; of numbers float32[n, 1]."""
    if not is_class:
        return torch.stack([share * one for share, one in zip(shares, outputs, strict=True)]).sum(0)
    found = [share * one.softmax(1) for share, one in zip(shares, outputs, strict=True)]
    return torch.stack(found).sum(0).clamp_min(_LEAST).log()


def fits(rows: int, outputs: int, members: int) -> bool:
    """True if the outputs of all members on the held-out rows may be in memory."""
    return 1 < members <= MAX_MEMBERS and rows * outputs * members <= _MAX_NUMBERS


def weigh(
    outputs: Sequence[Tensor], truth: npt.NDArray[np.generic], counted: Floats | None = None
) -> tuple[Floats, Tensor]:
    """The weights of the members, from their outputs on the held-out rows; and the outputs of the
    blend there, in which no row has a part in the weights that its own output is made with.

    `truth`: classes int64[n], or numbers float32[n, 1]. `counted`: how much each row counts.
    """
    is_class = truth.dtype.kind == "i"
    rows = len(truth)
    if is_class:
        at = torch.from_numpy(truth.astype(np.int64))[:, None]
        chances = [one.double().softmax(1).gather(1, at)[:, 0].numpy() for one in outputs]
        known = np.stack(chances)
    else:
        known = np.stack([one.double()[:, 0].numpy() for one in outputs])

    def of(some: npt.NDArray[np.bool_]) -> Floats:
        if is_class:
            return blend_weights.of_classes(
                known[:, some], None if counted is None else counted[some]
            )
        return blend_weights.of_numbers(known[:, some], truth[some].reshape(-1).astype(np.float64))

    shares = of(np.ones(rows, np.bool_))
    fold = random_state("blend", rows).permutation(rows) % min(_FOLDS, rows)
    found = torch.empty_like(outputs[0])
    for number in range(fold.max() + 1):
        out = fold == number
        weights = of(~out) if not out.all() else np.full(len(outputs), 1 / len(outputs))
        some = [one[torch.from_numpy(out)] for one in outputs]
        found[torch.from_numpy(out)] = mix(some, weights.tolist(), is_class=is_class)
    return shares, found
