"""Saves, seeds and restores the random number generators of Python, numpy and torch.

Equal work gets equal seeds, and checkpoints hold the state, so resumed training gives the same
result. torch is used only if a task has imported it.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from agent.tasks.training.seeds import derive_seed

Arrays = dict[str, npt.NDArray[Any]]


def seed(*words: object) -> None:
    """Seed all generators; the seed depends on every word."""
    number = derive_seed(*words)
    random.seed(number)
    np.random.seed(number)
    if torch := sys.modules.get("torch"):
        accelerator = getattr(torch, "accelerator", None)  # since torch 2.6
        if accelerator is None or accelerator.is_available():
            torch.manual_seed(number)  # also those of the GPUs
        else:  # it would remember the call, with its stack, for GPUs that are never used
            torch.default_generator.manual_seed(number)


def state() -> Arrays:
    """The state of all generators."""
    version, words, gauss = random.getstate()
    legacy: Any = np.random.get_state(legacy=False)
    found: Arrays = {
        "python": np.array([version, *words], np.uint64),
        "python gauss": np.array([] if gauss is None else [gauss], np.float64),
        "numpy": legacy["state"]["key"],
        "numpy place": np.array([legacy["state"]["pos"], legacy["has_gauss"]], np.int64),
        "numpy gauss": np.array([legacy["gauss"]], np.float64),
    }
    if torch := sys.modules.get("torch"):
        found["torch"] = torch.get_rng_state().numpy()
        if torch.cuda.is_initialized():
            for number, one in enumerate(torch.cuda.get_rng_state_all()):
                found[f"cuda {number}"] = one.numpy()
        if torch.backends.mps.is_available():
            found["mps"] = torch.mps.get_rng_state().numpy()
    return found


def restore(kept: Mapping[str, npt.NDArray[Any]]) -> None:
    """Set all generators to a state from `state`. Raises KeyError, ValueError."""
    version, *words = (int(word) for word in kept["python"])
    gauss = kept["python gauss"]
    random.setstate((version, tuple(words), float(gauss[0]) if len(gauss) else None))
    place, has_gauss = (int(number) for number in kept["numpy place"])
    numpy_state: Any = {
        "bit_generator": "MT19937",
        "state": {"key": kept["numpy"], "pos": place},
        "has_gauss": has_gauss,
        "gauss": float(kept["numpy gauss"][0]),
    }
    np.random.set_state(numpy_state)
    if (torch := sys.modules.get("torch")) and "torch" in kept:
        torch.set_rng_state(torch.tensor(kept["torch"]))
        cuda = [torch.tensor(kept[name]) for name in sorted(kept) if name.startswith("cuda ")]
        if cuda and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(cuda)
        if "mps" in kept and torch.backends.mps.is_available():
            torch.mps.set_rng_state(torch.tensor(kept["mps"]))


@contextmanager
def seeded(*words: object) -> Iterator[None]:
    """Seed all generators as `seed` does, and restore them afterwards."""
    kept = state()
    seed(*words)
    try:
        yield
    finally:
        restore(kept)
