"""Builds wheels of this source tree, and environments with only one of them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from importlib.util import find_spec
from pathlib import Path

from tests.support.fleet_harness import ROOT

SCRIPTS = "Scripts" if sys.platform == "win32" else "bin"
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def python_in(home: Path) -> Path:
    return home / SCRIPTS / ("python.exe" if sys.platform == "win32" else "python")


def source_as(version: str, folder: Path) -> Path:
    """Copy the source tree and set its version."""
    tree = folder / f"source-{version}"
    tree.mkdir()
    for name in ("agent", "commonweight", "coordinator", "protocols"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree / name)
    text = (ROOT / "pyproject.toml").read_text()
    head, _, tail = text.partition('\nversion = "')
    (tree / "pyproject.toml").write_text(
        f'{head}\nversion = "{version}"{tail.partition(chr(34))[2]}'
    )
    return tree


def wheel(tree: Path, folder: Path) -> Path:
    """Build the wheel of a source tree in `folder`."""
    # If hatchling is not installed, pip downloads it.
    isolated = [] if find_spec("hatchling") is None else ["--no-build-isolation"]
    folder.mkdir(exist_ok=True)
    build = [*_PIP, "wheel", "--quiet", "--no-deps", *isolated, "-w", str(folder), str(tree)]
    subprocess.run(build, check=True, cwd=folder)
    (made,) = folder.glob("commonweight-*.whl")
    return made


def installed(made: Path, home: Path) -> Path:
    """An environment with the wheel; its dependencies come from this environment."""
    venv.create(home, with_pip=False, symlinks=sys.platform != "win32")
    into = [*_PIP, "--python", str(python_in(home)), "install", "--quiet", "--no-deps", str(made)]
    subprocess.run(into, check=True, cwd=home)
    inside = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = subprocess.check_output([python_in(home), "-c", inside], text=True).strip()
    # Plain paths, so the editable install of the source tree there is not used.
    borrowed = [place for place in sys.path if any(Path(place).glob("*.dist-info"))]
    Path(packages, "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    return home
