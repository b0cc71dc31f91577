"""The public names of `import commonweight`: they stay, and importing them takes little."""

from __future__ import annotations

import subprocess
import sys

import pytest

import commonweight as cw
from protocols import VERSION, errors
from tests.support.fleet_harness import ROOT

NAMES = ["__version__", "errors"]


def run_python(code: str) -> str:
    return subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT, timeout=60)


def test_the_public_names_stay() -> None:
    assert sorted(cw.__all__) == sorted(NAMES)
    assert set(NAMES) <= set(dir(cw))
    assert cw.__version__ == VERSION
    assert cw.errors is errors
    with pytest.raises(AttributeError, match="no attribute 'conect'"):
        _ = cw.conect  # type: ignore[attr-defined]


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules); import commonweight; "
        "print(*sorted(set(sys.modules) - before))"
    )
    loaded = {name.partition(".")[0] for name in run_python(code).split()}
    assert loaded - sys.stdlib_module_names == {"commonweight"}
    assert "asyncio" not in loaded


def test_the_command_is_also_a_module() -> None:
    words = [sys.executable, "-P", "-m", "commonweight", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, VERSION), done.stderr
