"""The compose file, by the schema of the Compose Specification."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

COMPOSE = Path(__file__).parents[3] / "deploy" / "compose.yaml"


@pytest.mark.parametrize(("was", "becomes", "is_valid"), [("", "", True), ("ports", "port", False)])
def test_compose_takes_the_file(tmp_path: Path, was: str, becomes: str, is_valid: bool) -> None:
    file = tmp_path / "compose.yaml"
    file.write_text(COMPOSE.read_text().replace(f"{was}:", f"{becomes}:", 1 if was else 0))
    words = ["check-jsonschema", "--builtin-schema", "vendor.compose-spec", str(file)]
    program = Path(sys.executable).parent / words[0]
    done = subprocess.run([program, *words[1:]], capture_output=True, text=True)
    assert (done.returncode == 0) is is_valid, done.stdout
