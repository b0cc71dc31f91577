"""Directions of the edges in digits: fixed features, so that little is left to learn under noise.

Histograms of oriented gradients (Dalal and Triggs 2005), as in Tramèr and Boneh 2021 (arXiv
2011.11660): with noise for single rows, a linear model on such features learns more than a network
on pixels. They depend on no data.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 28
_DIRECTIONS, _CELL = 8, 4
#: Cells in a row of the blocks, of which each has four cells: with both neighbours.
_BLOCKS = SIDE // _CELL - 1
FEATURES = 4 * _DIRECTIONS * _BLOCKS**2
#: Added to the lengths of blocks and digits, so that empty ones stay near 0.
_LEAST_BLOCK, _LEAST = 0.05, 1e-6


def edges_of(x: Tensor) -> Tensor:
    """Pixels float32[n, 784] from 0 to 1 -> features float32[n, 1152], each row of length 1."""
    pictures = x.reshape(-1, 1, SIDE, SIDE)
    dx = F.pad(pictures[..., 2:] - pictures[..., :-2], (1, 1, 0, 0))
    dy = F.pad(pictures[..., 2:, :] - pictures[..., :-2, :], (0, 0, 1, 1))
    squares = dx.square() + dy.square()
    # cos 2(θ - θᵢ): an edge has an orientation, but no sign.
    angles = torch.arange(_DIRECTIONS, device=x.device) * (2 * math.pi / _DIRECTIONS)
    cosines = (dx.square() - dy.square()) * torch.cos(angles)[:, None, None]
    cosines = cosines + 2 * dx * dy * torch.sin(angles)[:, None, None]
    share = (cosines / (squares + 1e-12)).clamp(min=0) ** 3
    cells = F.avg_pool2d(squares.sqrt() * share, _CELL)
    blocks = torch.cat(
        [cells[..., i : i + _BLOCKS, j : j + _BLOCKS] for i in (0, 1) for j in (0, 1)], 1
    )
    blocks = blocks / (blocks.square().sum(1, keepdim=True).sqrt() + _LEAST_BLOCK)
    flat = blocks.flatten(1)
    return flat / (flat.square().sum(1, keepdim=True).sqrt() + _LEAST)
