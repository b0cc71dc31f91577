"""An idle agent loads no module that only a server or a trainer needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import agent

ROOT = Path(agent.__file__).parents[1]

#: Each costs an idle agent megabytes, and some other package would gladly bring it along.
HEAVY = ["torch", "fastapi", "pydantic", "requests", "uvicorn", "textual", "pandas", "pyarrow"]


def test_an_agent_imports_nothing_heavy() -> None:
    code = (
        "import sys, agent.cli, agent.daemon.agent\n"
        f"print(*(name for name in {HEAVY!r} if name in sys.modules))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
