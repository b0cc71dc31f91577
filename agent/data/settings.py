"""Which data a peer has, and which part of it may be used."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from agent.data import sources

Framework = Literal["auto", "torch", "keras"]
#: How a shared data set is divided.
SPLIT = r"^(iid|shards|dirichlet:[0-9]{1,4}([.][0-9]{1,4})?)\Z"
#: By column, then by the value as it is in the table: the value that is used.
MappedValues = Annotated[
    dict[str, Annotated[dict[str, str], Meta(max_length=1000)]], Meta(max_length=1000)
]

#: How numbers or dates of a column are written, by an example: see `value_formats`.
Format = Literal["1.234,5", "1,234.5", "31.12.2024", "12/31/2024"]


def uses_network(path: str, reader: str) -> bool:
    """True if reading the table needs connections: to a cluster, to Spark's own Java, or to a
    database."""
    return reader.startswith(("dask:", "spark")) or sources.parse(path).is_remote


def is_spooled(path: str, reader: str) -> bool:
    """True if another process reads the table for a trainer in the sandbox (`table_spool`)."""
    return uses_network(path, reader) or sources.parse(path).kind != "files"


class Floors(Struct, frozen=True, kw_only=True):
    """What no setting of a run can go below; the defaults allow everything.

    `min_batch`: rows of a training step. `min_examples`: rows that an update has seen.
    `min_cohort`: peers whose updates a version has. `max_lr`: the learning rate, 0 for any.
    `min_count`: rows behind a number of an evaluation.
    """

    min_batch: int = 1
    min_examples: int = 1
    min_cohort: int = 1
    max_lr: float = 0.0
    min_count: int = 1


class DataSettings(Struct, frozen=True, kw_only=True):
    """Which data a peer has: its own (`path`), or part `index` of `parts` of a shared data set.

    `split`: how a shared data set is divided: "iid" at random, "shards" with few labels per part,
    "dirichlet:0.3" with shares of the labels that differ, the more the smaller the number is.
    `is_shared`: what a task of a user's own reads is the data set of all peers, so it takes its
    part.
    `models`: the owner's folder of base models, each in its own folder.
    `reader`: what reads tables (see `agent.data`). Only `columns` (patterns) are used, and no table
    with fewer than `min_rows` rows. Values of fewer than `min_count` rows never leave the machine,
    and minimum and maximum of a column only with `extremes`.
    `values`, `formats`: by column, the values that are read as others (`value_map`), and how its
    numbers or dates are written (`value_formats`).
    `memory`: the owner's file that remembers which rows answers told about (`table_memory`); empty:
    none is kept. Rows come and go in groups of at least `min_count`.
    `cache`: a folder for files that a task makes from the data; empty: none.
    `device`: where training runs (see `devices`). With `compile`, torch may compile the model.
    `framework`: which one to use if a task supports more than one.
    `floors`: what no setting of a run can go below.
    `has_budget`: the owner limits what all answers cost in privacy, so all have noise.
    `adds_noise`: the work adds noise for single rows.
    """

    index: int = 0
    parts: int = 1
    split: Annotated[str, Meta(pattern=SPLIT)] = "iid"
    is_shared: bool = False
    seed: int = 0
    path: str = ""
    reader: str = "arrow"
    columns: tuple[str, ...] = ("*",)
    values: MappedValues = {}
    formats: Annotated[dict[str, Format], Meta(max_length=1000)] = {}
    min_rows: int = 0
    min_count: int = 5
    extremes: bool = False
    cache: str = ""
    memory: str = ""
    models: str = ""
    device: str = "auto"
    compile: bool = False
    framework: Framework = "auto"
    floors: Floors = Floors()
    has_budget: bool = False
    adds_noise: bool = False

    @property
    def is_set(self) -> bool:
        """True if the owner has set data or a folder of base models, which `Task.load` reads."""
        return bool(self.path or self.models)

    @property
    def min_alike(self) -> int:
        """Training replaces values that fewer rows have, and leaves out classes of fewer.

        Which these are depends on all rows, so one row changes how others count, which no noise for
        single rows covers. Noise within the owner's budget makes it superfluous.
        """
        return 1 if self.has_budget and self.adds_noise else self.min_count
