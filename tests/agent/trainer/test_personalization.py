"""What a peer keeps for itself between two updates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from agent.trainer.personalization import Personalization
from protocols.model.weights import Array, Weights


class Remembering:
    """A task whose optimizer's state is one array."""

    def __init__(self) -> None:
        self.recalled: Mapping[str, Array] = {}

    def load_optimizer_state(self, state: Mapping[str, Array]) -> None:
        self.recalled = state

    def optimizer_state(self) -> Mapping[str, Array]:
        return {"momentum_buffer:body": np.ones(2, np.float32)}


def test_bfloat16_layers_and_the_optimizer_are_kept_together(tmp_path: Path) -> None:
    first = Weights(
        {"body": np.zeros(2, np.uint16), "head": np.zeros(2, np.uint16)}, ["body", "head"]
    )
    trained = Weights({"body": np.ones(2, np.uint16), "head": np.full(2, 7, np.uint16)}, first)
    scheme, kept = {"at_home": "head", "keep_optimiser": True}, tmp_path / "kept"
    version = Weights({"body": np.zeros(2, np.uint16)}, ["body"])
    task: Any = Remembering()

    def personal() -> Personalization:
        return Personalization(first.schema, scheme, lambda: first, kept)

    mine = personal()
    update = mine.after_train(mine.before_train(task, {}, version), trained, kept)
    assert list(update) == ["body"]
    training = personal().before_train(task, {}, update)
    assert training.model["head"].tolist() == [7, 7]
    assert training.model.schema == first.schema
    assert task.recalled["momentum_buffer:body"].tolist() == [1, 1]
