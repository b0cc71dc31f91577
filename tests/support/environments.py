"""Environments with packages that .venv does not have, each in .venv-extras/NAME."""

from __future__ import annotations

import subprocess
import sys
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALL_WITHIN_S = 300


class NotRun(Exception):
    """Something from outside is missing."""


def environment(name: str, packages: Sequence[str], paths: Iterable[str] = ()) -> Path:
    """The interpreter of the environment of that name, after pip has installed the packages.

    `packages`: arguments of `pip install`. `paths`: what is importable there too, after the
    packages of its own. Raises NotRun.
    """
    folder = ROOT / ".venv-extras" / name
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        venv.create(folder, with_pip=True)
    site = next(folder.glob("**/site-packages"))
    (site / "shared.pth").write_text("".join(f"{path}\n" for path in paths))
    words = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            [*words, *packages], timeout=INSTALL_WITHIN_S, capture_output=True, text=True
        )
    except subprocess.TimeoutExpired:
        raise NotRun(f"not installed within {INSTALL_WITHIN_S} s") from None
    if done.returncode:
        raise NotRun(f"cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return python
