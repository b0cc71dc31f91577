"""Which shared models this machine can use."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.cli.models import LocalModel
from protocols.errors import UsageError


def test_a_model_without_the_layers_of_each_peer_is_refused(tmp_path: Path) -> None:
    model = LocalModel(tmp_path / "version", "ping", {"at_home": "*norm*"})
    with pytest.raises(UsageError, match=r"the layers \*norm\* of this run stay on each peer"):
        model.check_whole()
