"""The chance of this process: the generators of Python, numpy and torch that a task may draw from.

Seeded alike for alike work, and kept in the journal, so that training that was cut off draws on as
if nothing had happened. torch is looked at only where a task has imported it.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = dict[str, npt.NDArray[Any]]


def seed(*words: object) -> None:
    """Let all generators begin anew; where depends on every word."""
    text = " ".join(map(str, words)).encode()
    number = int.from_bytes(hashlib.sha256(text).digest()[:4], "big")
    random.seed(number)
    np.random.seed(number)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(number)  # those of the graphics cards too


def state() -> Arrays:
    """Where all generators stand."""
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
    """Let all generators go on from where `state` saw them. Raises KeyError, ValueError."""
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
