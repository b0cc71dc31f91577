"""Selects the device for training: a GPU if torch can use one, else the CPU."""

from __future__ import annotations

import torch

from protocols.errors import UsageError


def select_device(name: str) -> torch.device:
    """The device of this name; "auto" is cuda, else mps, else cpu. Raises UsageError."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, usable in there.items() if usable)
    if not there.get(name, False):
        raise UsageError(
            f"torch cannot use {name} on this machine", "commonweight-agent policy set device auto"
        )
    return torch.device(name)
