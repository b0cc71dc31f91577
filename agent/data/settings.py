"""Which data a peer holds, and what may be read of them."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Framework = Literal["auto", "torch", "keras"]


class DataSettings(Struct, frozen=True, kw_only=True):
    """Which data a peer holds: its own (`path`), or part `index` of `parts` of a shared set.

    `split` says how a shared set is cut: "iid" at random, "shards" so that a part sees few labels.
    `models` is the owner's folder of models that a task may build on, each in a folder of its own.
    `reader` reads tables (see `agent.data`), of which only `columns` (patterns) may be used, and
    none with fewer than `min_rows` rows. No value is told that fewer than `min_count` rows have,
    and the least and most of a column only with `extremes`.
    `cache` is a folder in which a task may keep what it made of the data; empty: nowhere.
    `device` is where the data lie and are trained on (see `devices`), and with `compile` the task
    may let torch compile its model. `framework` chooses where a task is there for more than one.
    """

    index: int = 0
    parts: int = 1
    split: Literal["iid", "shards"] = "iid"
    seed: int = 0
    path: str = ""
    reader: str = "arrow"
    columns: tuple[str, ...] = ("*",)
    min_rows: int = 0
    min_count: int = 5
    extremes: bool = False
    cache: str = ""
    models: str = ""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    compile: bool = False
    framework: Framework = "auto"

    @property
    def is_set(self) -> bool:
        """True if the owner has set data or a folder of base models, which `Task.load` reads."""
        return bool(self.path or self.models)
