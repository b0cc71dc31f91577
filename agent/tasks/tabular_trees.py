"""The model "trees" of the task "tabular": what a peer computes for `protocols.tables.trees`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from agent.data import rare_values
from agent.data.features import EncodedRows
from agent.tasks import Setting
from protocols.errors import BadWeights, UsageError
from protocols.model.weights import Schema, TensorSpec, Weights, check_schema
from protocols.tables.preprocessing import Feature, Preprocessing
from protocols.tables.trees import growth, layout, objectives, xgboost_json
from protocols.tables.trees.histograms import (
    MISSING,
    GrowingRows,
    Slots,
    add_trees,
    bins_of,
    slots_of,
)
from protocols.tables.trees.layout import Numbers, Position, Shape
from protocols.tables.trees.objectives import Floats, Objective

#: Rows whose slots are computed at once.
_BLOCK = 1 << 16


class TreeModel(NamedTuple):
    """The sizes and numbers of a run's trees, its objective, its features (numbers first), and the
    weights of the classes."""

    shape: Shape
    numbers: Numbers
    objective: Objective
    features: tuple[Feature, ...]
    gaps: tuple[bool, ...]
    weights: tuple[float, ...] = ()

    @classmethod
    def of(cls, made: Preprocessing, chosen: Mapping[str, Setting]) -> Self:
        """Raises UsageError."""
        target = made.target
        classes = len(target.classes)
        if classes > layout.MAX_OUTPUTS:
            raise UsageError(
                f"the target {target.name} has {classes} classes, and trees have at most "
                f"{layout.MAX_OUTPUTS}",
                "--set model=linear",
            )
        name = str(chosen["objective"])
        objective = objectives.choose(name, classes, target.mean, target.scale)
        columns = (*made.numeric, *made.categorical)
        trees, depth, bins = (int(chosen[name]) for name in ("trees", "depth", "bins"))
        shape = Shape(trees, objective.outputs, depth, len(columns), bins)
        eta, l2, weight, gain = (
            float(chosen[name]) for name in ("eta", "l2", "min_weight", "min_gain")
        )
        heaviest = max(target.weights, default=0.0)
        bound = objective.bound * (heaviest or 1.0)
        numbers = Numbers(
            *(eta, l2, weight, gain),
            *(objective.constant, bound, objective.max_step, heaviest, target.weight_sum),
        )
        gaps = tuple(f.missing for f in made.numeric)
        return cls(shape, numbers, objective, columns, gaps, target.weights)

    def schema(self) -> Schema:
        """Raises BadWeights for sizes beyond the limits."""
        return {name: TensorSpec(*spec) for name, spec in self.shape.tensors().items()}

    @property
    def _kinds(self) -> npt.NDArray[np.bool_]:
        return np.array([bool(feature.categories) for feature in self.features])

    def first(self) -> Weights:
        """The version before the cuts."""
        return Weights(layout.first(self.shape, self.numbers, self._kinds))

    def read(self, version: Weights) -> tuple[Position, Numbers]:
        """Where a version stands, and its numbers. Raises BadWeights for those of another run: the
        peer that made the first version may have lied."""
        at, numbers = layout.read(version, self.shape)
        if numbers != self.numbers or not np.array_equal(version["kinds"], self._kinds):
            raise BadWeights("the trees of the version are of other settings than the run has")
        return at, numbers

    def sums_schema(self, version: Weights) -> Schema:
        """The schema of the update that this version asks for. Raises BadWeights."""
        at, _ = self.read(version)
        return {layout.SUMS: TensorSpec("I32", (int(np.prod(at.sums)),))}

    def slots(self, x: npt.NDArray[np.float32]) -> Slots:
        """The slots int16[n, F] of inputs float32[n, d] of `agent.data.features`, which may lie on
        disk."""
        blocks = [self._slots(x[at : at + _BLOCK]) for at in range(0, len(x), _BLOCK)]
        return np.concatenate(blocks) if blocks else np.zeros((0, len(self.features)), np.int16)

    def _slots(self, x: npt.NDArray[np.float32]) -> Slots:
        count = len(self.gaps)
        numbers = np.array(x[:, :count])
        gap = count
        for place, has_gaps in enumerate(self.gaps):
            if has_gaps:
                numbers[x[:, gap] == 1, place] = np.nan
                gap += 1
        categories = x[:, gap:].astype(np.int16)
        categories = np.where(categories == rare_values.MISSING, MISSING, categories)
        return np.concatenate([slots_of(numbers), categories.astype(np.int16)], 1)

    def rows(self, rows: EncodedRows, min_count: int) -> GrowingRows:
        """A peer's rows for training."""
        weights = np.array(self.weights)[rows.y] if self.weights else None
        return GrowingRows(self.slots(rows.x), rows.y, self.objective, min_count, weights)

    def of_size(self, version: Mapping[str, npt.NDArray[Any]]) -> Self:
        """The same with as many trees as this version has room for."""
        return self._replace(shape=self.shape._replace(trees=len(version["feature"])))

    def check_tensors(self, version: Weights) -> None:
        """Raise BadWeights for tensors other than those of such trees, of any number."""
        found = version.schema
        count = next(iter(found["feature"].shape), 0) if "feature" in found else 0
        check_schema(found, self._replace(shape=self.shape._replace(trees=count)).schema())

    def continued(self, version: Weights, more: int) -> Weights:
        """The trees of a version, and room for more. Raises BadWeights."""
        at, numbers = self.read(version)
        if at.is_cutting:
            return version
        done = min(at.tree + (at.level > 0), self.shape.trees)
        room = self.shape._replace(trees=min(done + more, layout.MAX_TREES))
        made = layout.first(room, numbers, self._kinds)
        made["cuts"][:] = version["cuts"]
        for name in ("feature", "left", "leaf"):
            made[name][:done] = version[name][:done]
        made["at"][:] = done, 0, at.bits
        made["asked"][:, 0] = 0 if done < room.trees else -1
        return Weights(made)

    def grow_alone(self, version: Weights, growing: GrowingRows, rows: int) -> Weights:
        """The version after one more tree of this peer's `rows` alone, with their hessians."""
        at, numbers = self.read(version)
        first, arrays, state = at.tree, dict(version), dict[str, npt.NDArray[Any]]()
        while at.tree == first < self.shape.trees:
            sums = growing.sums(arrays, at, numbers, masked=True)
            arrays, state = growth.grow(arrays, (at, numbers), state, sums, rows, bytes(32))
            at, _ = layout.read(arrays, self.shape)
        return Weights(arrays)

    def forward(self, version: Weights) -> Callable[[Tensor], Tensor]:
        """Inputs float32[n, d] -> float32[n, classes] logits, or [n, 1] scaled numbers."""

        def outputs_of(x: Tensor) -> Tensor:
            margins = self.margins(version, self.slots(x.cpu().numpy()))
            found: npt.NDArray[Any] = self.objective.outputs_of(margins).astype(np.float32)
            return torch.from_numpy(found).to(x.device)

        return outputs_of

    def margins(self, version: Mapping[str, npt.NDArray[Any]], slots: Slots) -> Floats:
        """The margins float64[n, outputs], also of a tree that grows. Raises BadWeights."""
        at, _ = layout.read(version, self.shape)
        grown = range(min(at.tree + (at.level > 0), self.shape.trees))
        bins = bins_of(slots, version["cuts"], version["kinds"])
        margins = np.full((len(bins), self.objective.outputs), self.objective.start)
        add_trees(margins, version, grown, self.shape.depth, bins)
        return margins

    def to_json(self, version: Weights) -> bytes:
        """The trees as a model of XGBoost. Raises BadWeights."""
        layout.read(version, self.shape)
        return xgboost_json.to_json(version, self.shape, self.features, self.objective)
