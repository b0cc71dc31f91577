"""A machine whose own encoding is not UTF-8, as that of many with Windows."""

from __future__ import annotations

import os
import subprocess
import sys
from textwrap import dedent


def in_ascii(program: str) -> None:
    """Run a Python program where files are ASCII by default; it must end well."""
    speaks = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "utf-8"}
    subprocess.run(
        [sys.executable, "-X", "utf8=0", "-c", dedent(program)], env=os.environ | speaks, check=True
    )
