"""Fixtures of the tests of runs."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def tmp_path(memory_path: Path) -> Path:
    """In memory, because a run commits each step to the ledger."""
    return memory_path
