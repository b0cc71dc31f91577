"""How a peer takes in a version that comes a round late. Pure.

A peer has sent its weights x for the version v, and has come from x to y when v is here. The
version differs from what the peer sent by v - x, and y has moved on from x. It continues from

    y + PULL (v - x)

With 1, y would keep its own progress on top of the version. But where a peer converges within a
round, y does not depend on x any more, and each round would add the last deviation with its sign
turned: the peers' deviations would never shrink. With 0 the peers would never meet. With a half,
deviations halve each round either way.

Streaming DiLoCo (arXiv 2501.18512) mixes y and v themselves, for a delay of a few steps. Over a
whole round that would take back half of the progress from x to y.
"""

from __future__ import annotations

import numpy as np

from protocols.model.bfloat16 import as_float64, float32_to_bf16
from protocols.model.weights import DTYPES, FLOAT_DTYPES, Array, Part, WeightReader

PULL = 0.5


class LateMerge:
    """`trained` (y), pulled by the difference of `version` (v) from what was `sent` for it (x).

    All three have one schema. Integer and boolean tensors are those of `version`.
    """

    def __init__(self, trained: WeightReader, sent: WeightReader, version: WeightReader) -> None:
        self.schema = version.schema
        self._sources = trained, sent, version

    def read(self, part: Part) -> Array:
        """The elements of a part, flat, in the tensor's dtype."""
        dtype = self.schema[part.name].dtype
        trained, sent, version = (source.read(part) for source in self._sources)
        if dtype not in FLOAT_DTYPES:
            return version
        y, x, v = (as_float64(array, dtype) for array in (trained, sent, version))
        merged = y + PULL * (v - x)
        if dtype == "BF16":
            return float32_to_bf16(merged.astype(np.float32))
        return merged.astype(DTYPES[dtype])
