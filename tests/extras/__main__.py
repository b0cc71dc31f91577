"""Tests of the extras, each in an environment of its own: `make test-extras EXTRAS="dask spark"`.

An environment lies in .venv-extras/NAME on top of .venv and holds only what the extra adds. What
cannot be installed, or lacks Java or a browser, is printed as *not run* and is no failure; a test
that fails is.
"""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import time
import tomllib
from pathlib import Path

from tests.support.environments import ROOT, NotRun, environment

HERE = Path(__file__).parent
TESTED_WITHIN_S = 600
#: Environments with the tests of another one.
SAME_TESTS = {"flower_1_41": "flower"}
#: What an extra needs beside packages: a command that fails with the reason in its last line.
CHECKS = {
    "spark": ("-c", "from agent.data.spark_reader import check_java; check_java()"),
    "browser": ("-m", "tests.extras.browser.chromium"),
}


def main(names: list[str]) -> int:
    """Exit status 1 if a test failed."""
    told = {name: outcome(name) for name in names or tested()}
    for name, words in told.items():
        print(f"{name:12} {words}")
    return int(any(words.startswith("FAILED") for words in told.values()))


def tested() -> list[str]:
    """Every extra that has tests."""
    return sorted({path.parent.name for path in HERE.glob("*/test_*.py")} | set(SAME_TESTS))


def outcome(name: str) -> str:
    """Install and test one extra; what came of it."""
    began = time.monotonic()
    try:
        python = python_with(name)
    except NotRun as why:
        return f"not run: {why}"
    words = [str(python), "-m", "pytest", "-n", "1", str(HERE / SAME_TESTS.get(name, name))]
    try:
        done = subprocess.run(words, cwd=ROOT, timeout=TESTED_WITHIN_S, check=False)
    except subprocess.TimeoutExpired:
        return f"FAILED: no end after {TESTED_WITHIN_S} s"
    took = f"in {time.monotonic() - began:.0f} s"
    return f"passed {took}" if done.returncode == 0 else f"FAILED {took}"


def python_with(name: str) -> Path:
    """The interpreter of an environment with this extra. Raises NotRun."""
    standard = sysconfig.get_path("stdlib")
    # What is installed in .venv is there too, after the extra's own.
    shared = [path for path in sys.path if Path(path).is_dir() and not path.startswith(standard)]
    shared += [path for path in sys.path if path.startswith(f"{standard}/site-packages")]
    python = environment(name, requirements(name), dict.fromkeys([*shared, str(ROOT)]))
    for part, check in CHECKS.items():
        if part in name:
            said = subprocess.run([str(python), *check], capture_output=True, text=True, cwd=ROOT)
            if said.returncode:
                raise NotRun(said.stderr.strip().splitlines()[-1])
    return python


def requirements(name: str, *, of_group: bool = True) -> list[str]:
    """What the extra adds, with that of the extras that it names; ONE_and_OTHER is both.

    `of_group`: a dependency group of this name comes first. It may name the extra.
    """
    if "_and_" in name:
        return [words for part in name.split("_and_") for words in requirements(part)]
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = settings["project"]["optional-dependencies"]
    extras |= settings["dependency-groups"] if of_group else {}
    found: list[str] = []
    for requirement in extras[name]:
        if isinstance(requirement, dict):  # as PEP 735 has it
            found += requirements(requirement["include-group"])
        elif ours := re.fullmatch(r"commonweight\[(\w+)\]", requirement):
            found += requirements(ours[1], of_group=False)
        else:
            found.append(requirement)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
