"""The change of one training on top of another version. Pure.

The coordinator adds late updates so to its newest version, and an agent that trained ahead its own
progress to the version that came meanwhile.
"""

from __future__ import annotations

import numpy as np

from protocols.model.bfloat16 import as_float64, float32_to_bf16
from protocols.model.weights import DTYPES, FLOAT_DTYPES, Array, Part, WeightReader


class RebasedUpdate:
    """The change from `base` to `weights`, applied to `head`.

    All three have one schema. Integer and boolean tensors are those of `head`.
    """

    def __init__(self, weights: WeightReader, base: WeightReader, head: WeightReader) -> None:
        self.schema = head.schema
        self._weights, self._base, self._head = weights, base, head

    def read(self, part: Part) -> Array:
        """The elements of a part, flat, in the tensor's dtype."""
        dtype, to = self.schema[part.name].dtype, self._head.read(part)
        if dtype not in FLOAT_DTYPES:
            return to
        new, old, to = (
            as_float64(array, dtype)
            for array in (self._weights.read(part), self._base.read(part), to)
        )
        moved = to + (new - old)
        if dtype == "BF16":
            return float32_to_bf16(moved.astype(np.float32))
        return moved.astype(DTYPES[dtype])
