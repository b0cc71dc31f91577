"""What every test shares: hypothesis without a clock, for two busy cores."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")

_NUMBERS = itertools.count()

# Hundreds of programs are started here; each would compile the same sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A developer's own COMMONWEIGHT_… variables must not steer a test, nor one touch his home."""
    for name in list(os.environ):
        if name.startswith("COMMONWEIGHT_"):
            monkeypatch.delenv(name)
    data = tmp_path_factory.getbasetemp() / f"data{next(_NUMBERS)}"
    monkeypatch.setenv("XDG_DATA_HOME", str(data))


@pytest.fixture
def coordinator_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the coordinator's commands and settings have their home; it is not made yet."""
    home = tmp_path / "home"
    monkeypatch.setenv("COMMONWEIGHT_HOME", str(home))
    return home
