"""Runs a program on a machine whose default encoding is not UTF-8, as on many with Windows."""

from __future__ import annotations

import os
import subprocess
import sys
from textwrap import dedent


def in_ascii(program: str) -> None:
    """Run a Python program where the default encoding of files is ASCII; it must exit with 0."""
    speaks = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", dedent(program)], env=os.environ | speaks, check=True
    )
