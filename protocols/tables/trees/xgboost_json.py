"""Writes trees as a model of XGBoost (JSON), which `xgboost.Booster.load_model` reads. Pure.

Inputs are the columns by the names of the features: numbers as in the table, NaN where missing, and
a category as its place in the vocabulary, or the size of the vocabulary for an unseen one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from protocols.tables.preprocessing import Feature
from protocols.tables.trees.histograms import bins_of, edge_of, slots_of
from protocols.tables.trees.layout import SLOTS, Arrays, Shape
from protocols.tables.trees.objectives import Objective

_OBJECTIVES = {
    "logistic": ("binary:logistic", "reg_loss_param", {"scale_pos_weight": "1"}),
    "multiclass": ("multi:softprob", "softmax_multiclass_param", {}),
    "squared": ("reg:squarederror", "reg_loss_param", {"scale_pos_weight": "1"}),
    "poisson": ("count:poisson", "poisson_regression_param", {"max_delta_step": "0.7"}),
}
#: The index of a category in the inputs of a model begins after missing and unseen.
_FIRST = 2
_NO_NODE = 2**31 - 1


def to_json(
    version: Arrays, shape: Shape, features: Sequence[Feature], objective: Objective
) -> bytes:
    """The model. `features`: numbers first, then categories. Trees that have not begun are left
    out."""
    count = min(int(version["at"][0]) + (int(version["at"][1]) > 0), shape.trees)
    name, param, values = _OBJECTIVES[objective.name]
    trees = [
        _tree(version, number, shape, features, objective)
        for number in range(count * shape.outputs)
    ]
    classes = shape.outputs if objective.name == "multiclass" else 0
    base = {"logistic": 0.5, "multiclass": 0.5}.get(objective.name, objective.mean)
    values = dict(values) | ({"num_class": str(classes)} if classes else {})
    model = {
        "learner": {
            "attributes": {},
            "feature_names": [feature.name for feature in features],
            "feature_types": ["c" if feature.categories else "float" for feature in features],
            "gradient_booster": {
                "model": {
                    "gbtree_model_param": {
                        "num_parallel_tree": "1",
                        "num_trees": str(len(trees)),
                    },
                    "iteration_indptr": [i * shape.outputs for i in range(count + 1)],
                    "tree_info": [i % shape.outputs for i in range(len(trees))],
                    "trees": trees,
                },
                "name": "gbtree",
            },
            "learner_model_param": {
                "base_score": repr(float(base)),
                "boost_from_average": "0",
                "num_class": str(classes),
                "num_feature": str(len(features)),
                "num_target": "1",
            },
            "objective": {"name": name, param: values},
        },
        "version": [2, 1, 0],
    }
    return json.dumps(model).encode()


def _tree(
    version: Arrays, number: int, shape: Shape, features: Sequence[Feature], objective: Objective
) -> dict[str, Any]:
    place_of = divmod(number, shape.outputs)
    feature, left = version["feature"][place_of], version["left"][place_of]
    leaf = version["leaf"][place_of].astype(np.float64)
    if objective.name == "squared":
        leaf = leaf * objective.scale
    nodes, columns = [0], _Columns()
    for heap in nodes:  # breadth first; `nodes` grows
        place = len(columns.left_children)
        is_split = heap < len(feature) and feature[heap] >= 0
        if not is_split:
            columns.add_leaf(float(np.float32(leaf[heap])))
            continue
        of, mask = int(feature[heap]), int(left[heap])
        children = [2 * heap + 1, 2 * heap + 2]
        if features[of].categories:
            right, default_left = _category_split(mask, version["cuts"][of], features[of], children)
            columns.add_split(place, of, default_left, len(nodes), categories=right)
        else:
            going_left, threshold = _number_split(mask, version["cuts"][of], features[of])
            columns.add_split(place, of, going_left, len(nodes), threshold=threshold)
        nodes += children
    return columns.as_json(number, len(features))


def _category_split(
    mask: int, cuts: Any, feature: Feature, children: list[int]
) -> tuple[list[int], bool]:
    """The categories that go right, and whether missing values go left.

    XGBoost sends unseen categories to the left. Where they go right here, the children are
    exchanged in place."""
    missing_left, unseen_left = bool(mask & 1), bool(mask >> 1 & 1)
    slots = np.arange(len(feature.categories), dtype=np.int16) + _FIRST
    bins = bins_of(slots[:, None], cuts[None], np.ones(1, np.uint8))[:, 0]
    left = [bool(mask >> int(b) & 1) for b in bins]
    if not unseen_left:
        children.reverse()
    # XGBoost requires a category in the list: one that no row has.
    right = [i for i, one in enumerate(left) if one is not unseen_left] or [len(left) + 1]
    return right, missing_left is unseen_left


def _number_split(mask: int, cuts: Any, feature: Feature) -> tuple[bool, float]:
    """Whether missing values go left, and the number below which values do."""
    inside = mask >> 1
    last = inside.bit_length() - 1
    threshold = float(np.finfo(np.float32).max)
    if last < len(cuts) and cuts[last] < SLOTS:
        threshold = feature.mean + feature.scale * edge_of(int(cuts[last]))
    if feature.missing:
        return bool(mask & 1), float(np.float32(threshold))
    # Without missing values in training, one counts as the mean.
    at_mean = bins_of(slots_of(np.zeros((1, 1), np.float32)), cuts[None], np.zeros(1, np.uint8))
    return bool(mask >> int(at_mean[0, 0]) & 1), float(np.float32(threshold))


class _Columns:
    """The nodes of a tree as XGBoost stores them: a list for each field."""

    def __init__(self) -> None:
        self.left_children: list[int] = []
        self.right_children: list[int] = []
        self.parents: list[int] = [_NO_NODE]
        self.conditions: list[float] = []
        self.indices: list[int] = []
        self.types: list[int] = []
        self.default_left: list[int] = []
        self.categories: list[int] = []
        self.category_nodes: list[int] = []
        self.segments: list[int] = []
        self.sizes: list[int] = []

    def add_leaf(self, value: float) -> None:
        self._add(0, value, 0, 0, -1, -1)

    def add_split(
        self,
        place: int,
        feature: int,
        default_left: bool,
        first_child: int,
        *,
        threshold: float = 0.0,
        categories: list[int] | None = None,
    ) -> None:
        if categories is not None:
            self.category_nodes.append(place)
            self.segments.append(len(self.categories))
            self.sizes.append(len(categories))
            self.categories += categories
        kind = int(categories is not None)
        self._add(feature, threshold, kind, int(default_left), first_child, first_child + 1)
        self.parents += [place, place]

    def _add(
        self, feature: int, value: float, kind: int, default_left: int, left: int, right: int
    ) -> None:
        self.indices.append(feature)
        self.conditions.append(value)
        self.types.append(kind)
        self.default_left.append(default_left)
        self.left_children.append(left)
        self.right_children.append(right)

    def as_json(self, number: int, features: int) -> dict[str, Any]:
        count = len(self.indices)
        return {
            "base_weights": [0.0] * count,
            "categories": self.categories,
            "categories_nodes": self.category_nodes,
            "categories_segments": self.segments,
            "categories_sizes": self.sizes,
            "default_left": self.default_left,
            "id": number,
            "left_children": self.left_children,
            "loss_changes": [0.0] * count,
            "parents": self.parents,
            "right_children": self.right_children,
            "split_conditions": self.conditions,
            "split_indices": self.indices,
            "split_type": self.types,
            "sum_hessian": [0.0] * count,
            "tree_param": {
                "num_deleted": "0",
                "num_feature": str(features),
                "num_nodes": str(count),
                "size_leaf_vector": "1",
            },
        }
