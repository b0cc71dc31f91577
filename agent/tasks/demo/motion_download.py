"""Converts the movements of the package seglearn to safetensors in a separate process.

    python -m agent.tasks.demo.motion_download OUT

The package's file is a pickled array, which may run any code when it is read. So only a process
without keys and other duties reads it, once.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from protocols.errors import MissingPackage
from protocols.local.programs import run_program
from protocols.model.weights import Array, Weights, save

_WITHIN_S = 120.0


def convert(out: Path) -> None:
    """Convert the file in a child process. Raises MissingPackage, CommonweightError."""
    if find_spec("seglearn") is None:
        raise MissingPackage("the task motion", "seglearn", "pip install 'commonweight[demo]'")
    run_program(
        [sys.executable, "-P", "-m", __name__, str(out)],
        "the movements of seglearn cannot be read",
        within_s=_WITHIN_S,
        hint="pip install -U seglearn",
        env={"PATH": os.defpath, "PYTHONPATH": os.environ.get("PYTHONPATH", "")},
    )


def main(out: Path) -> None:
    package = find_spec("seglearn")
    assert package is not None
    assert package.submodule_search_locations is not None
    file = Path(package.submodule_search_locations[0]) / "data" / "watch_dataset.npy"
    told = np.load(file, allow_pickle=True).item()
    lengths = [len(recording) for recording in told["X"]]
    made: dict[str, Array] = {
        "signal": np.concatenate(told["X"]).astype(np.float32),
        "starts": np.cumsum([0, *lengths], dtype=np.int64),
        "exercise": np.asarray(told["y"], np.int64),
        "person": np.asarray(told["subject"], np.int64),
    }
    save(Weights(made), out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
