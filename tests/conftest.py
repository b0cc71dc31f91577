"""What every test shares: hypothesis without a clock, for two busy cores."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "default", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")

# Hundreds of programs are started here; each would compile the same sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A developer's own COMMONWEIGHT_… variables must not steer a test."""
    for name in list(os.environ):
        if name.startswith("COMMONWEIGHT_"):
            monkeypatch.delenv(name)
