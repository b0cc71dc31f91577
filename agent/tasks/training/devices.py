"""Selects the device for training: a GPU if torch can use one, else the CPU."""

from __future__ import annotations

import torch

from protocols.errors import UsageError

#: Of the free memory of a card, what examples may take.
_MAX_SHARE = 0.25
_AUTO = "commonweight-agent policy set device auto"


def select_device(name: str) -> torch.device:
    """The device of this name; "auto" is cuda, else mps, else cpu. Raises UsageError.

    A card such as "cuda:1" becomes torch's current one.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind, usable in there.items() if usable)
    kind, _, number = name.partition(":")
    if not there.get(kind, False):
        raise UsageError(f"torch cannot use {kind} on this machine", _AUTO)
    if number:
        if int(number) >= (count := torch.cuda.device_count()):
            raise UsageError(
                f"this machine has no {name}", f"from cuda:0 to cuda:{count - 1}, or: {_AUTO}"
            )
        torch.cuda.set_device(int(number))
    return torch.device(name)


def has_room(device: torch.device, nbytes: int) -> bool:
    """True if examples of that size may lie on the device; else batches are brought there."""
    return device.type != "cuda" or nbytes <= _MAX_SHARE * torch.cuda.mem_get_info(device)[0]
