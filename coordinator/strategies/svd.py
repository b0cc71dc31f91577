"""Adapters of different ranks: the mean of the products BA, as factors of the run's rank.

FlexLoRA: Bai et al. 2024, arXiv 2402.11505. A run of lora has this strategy with
`--set aggregation=svd`, and no other run has it. One layer at a time: its stacked factors, with K
the sum of all ranks, take 8 K (out + in) bytes and a small multiple; the product itself is never
made. Of M = B' A' the reduced QR decompositions B' = Q S and A'ᵀ = P T give M = Q (S Tᵀ) Pᵀ, and
the singular values of M are those of S Tᵀ.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from coordinator.storage.run_spec import RunSpec
from coordinator.strategies import averaging
from coordinator.strategies.adapter import StrategyAdapter
from protocols.codecs import factors
from protocols.codecs.factors import A, B, Matrix
from protocols.codecs.registry import FactoredUpdate
from protocols.errors import UsageError
from protocols.model.weights import FLOAT_DTYPES, Array, Part, WeightReader, split_into_pieces

NAME = "svd"


class Svd(StrategyAdapter):
    """The adapter. Flower's FedAvg samples the peers, and none of its means is used."""

    feed = "factors"

    def check(self, spec: RunSpec) -> None:
        """Raise UsageError unless the run is one of adapters."""
        if spec.task != "lora" or spec.settings.get("aggregation") != NAME:
            raise UsageError("the strategy svd is for adapters", "--set aggregation=svd")
        super().check(spec)


class Truncated(NamedTuple):
    """Factors float32[R, in] and float32[out, R]; `error`: the Frobenius norm of what they leave
    out, relative to that of the product."""

    a: Matrix
    b: Matrix
    error: float


def truncate(stacked_a: npt.ArrayLike, stacked_b: npt.ArrayLike, rank: int) -> Truncated:
    """The best factors of this rank for B' A', float64[out, K] times float64[K, in].

    Both get the roots of the singular values. Signs follow from the largest entry of each column,
    so that equal inputs give equal bytes.
    """
    q, s = np.linalg.qr(np.asarray(stacked_b, np.float64))
    p, t = np.linalg.qr(np.asarray(stacked_a, np.float64).T)
    u, sizes, v = np.linalg.svd(s @ t.T)
    kept = min(rank, len(sizes))
    root = np.sqrt(sizes[:kept])
    left, right = q @ u[:, :kept], p @ v[:kept].T
    largest = np.abs(left).argmax(0)
    signs = np.where(left[largest, np.arange(kept)] < 0, -1.0, 1.0) * root
    a = np.zeros((rank, len(p)), np.float32)
    b = np.zeros((len(q), rank), np.float32)
    a[:kept], b[:, :kept] = (right * signs).T, left * signs
    whole = float(np.linalg.norm(sizes))
    return Truncated(a, b, float(np.linalg.norm(sizes[kept:])) / whole if whole else 0.0)


def stack(
    layer: str, sources: Sequence[tuple[WeightReader, float]]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """A' float64[K, in] and B' float64[out, K], whose product is the weighted sum of products."""
    found = [(*factors.read_factors(file, layer), weight) for file, weight in sources]
    return (
        np.concatenate([a.astype(np.float64) for a, _, _ in found]),
        np.concatenate([b * np.float64(weight) for _, b, weight in found], axis=1),
    )


def aggregate(
    updates: Sequence[FactoredUpdate],
    share: Sequence[float],
    scale: Sequence[float],
    base: WeightReader,
) -> Iterator[dict[Part, Array]]:
    """The version after `base`, piece by piece in file order. Arguments as `averaging.average`."""
    weights = [part * by for part, by in zip(share, scale, strict=True)]
    base_weight = sum(part * (1.0 - by) for part, by in zip(share, scale, strict=True))
    sources = [(one.products.file, weight) for one, weight in zip(updates, weights, strict=True)]
    sources += [(base, base_weight)] if base_weight else []
    last: tuple[str, dict[str, Matrix]] = ("", {})
    for piece in split_into_pieces(base.schema):
        made: dict[Part, Array] = {}
        for part in piece:
            if part.name.endswith((A, B)):
                layer = part.name[: -len(A)]
                if last[0] != layer:
                    rank = base.schema[layer + A].shape[0]
                    found = truncate(*stack(layer, sources), rank)
                    last = layer, {layer + A: found.a, layer + B: found.b}
                made[part] = last[1][part.name].reshape(-1)[part.start : part.stop]
            elif base.schema[part.name].dtype in FLOAT_DTYPES:
                mean = averaging.mean_of(part, list(updates), weights, base, base_weight)
                made[part] = averaging.as_stored(mean, base.schema[part.name].dtype)
            else:
                made[part] = base.read(part)
        yield made
