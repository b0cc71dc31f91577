"""What an owner can set about the data, and about what may leave of them."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from agent.data.settings import SPLIT, Format, MappedValues
from agent.policy.rules import PolicySettings
from protocols.messages.envelope import Name


class DataSchema(PolicySettings, frozen=True, kw_only=True):
    """The settings about the data, which `AgentSettings` extends."""

    part: Annotated[int, Meta(ge=0, description="your part of a shared data set, from 0")] = 0
    parts: Annotated[int, Meta(ge=1, description="number of parts of the shared data set")] = 1
    split: Annotated[
        str,
        Meta(
            pattern=SPLIT,
            description="how to split it: iid, at random; shards, few labels in each part; "
            "dirichlet:0.3, the fewer the smaller the number is",
        ),
    ] = "iid"
    data_seed: Annotated[int, Meta(description="seed of that split; the same on all peers")] = 0
    data: Annotated[
        str, Meta(description="your own data: a file, a folder, or a table of a database")
    ] = ""
    data_reader: Annotated[
        str,
        Meta(
            pattern=r"^(arrow|dask(:.+)?|spark(:.+)?)\Z",
            description="reader for tables: arrow, dask, spark; or your cluster: dask:ADDRESS, "
            "spark:URL",
        ),
    ] = "arrow"
    data_columns: Annotated[
        tuple[str, ...], Meta(description="columns that runs may use; * matches any text")
    ] = ("*",)
    data_values: Annotated[
        MappedValues, Meta(description="by column: values that are read as others (data map)")
    ] = msgspec.field(default_factory=dict)
    data_formats: Annotated[
        dict[str, Format],
        Meta(description="by column: how its numbers or dates are written (data format)"),
    ] = msgspec.field(default_factory=dict)
    data_min_rows: Annotated[int, Meta(ge=0, description="minimum rows or pictures in a run")] = 20
    data_min_count: Annotated[
        int,
        Meta(
            ge=1,
            description="minimum rows that share a value, or pictures of a class, before it leaves",
        ),
    ] = 5
    min_batch: Annotated[
        int,
        Meta(
            ge=1,
            description="minimum rows of a training step, whatever a run asks for; a smaller last "
            "batch joins the one before",
        ),
    ] = 8
    min_examples: Annotated[
        int, Meta(ge=1, description="minimum rows that an update has seen before it may leave")
    ] = 16
    min_cohort: Annotated[
        int,
        Meta(
            ge=1,
            description="minimum peers in a round, as the coordinator says; 1: also this one alone",
        ),
    ] = 1
    max_lr: Annotated[
        float, Meta(ge=0, description="maximum learning rate of a run; 0: no limit")
    ] = 1.0
    witnesses: Annotated[
        tuple[str, ...],
        Meta(
            description="ids of peers you trust to say which versions they see "
            "(commonweight-agent status id, there)"
        ),
    ] = ()
    min_witnesses: Annotated[
        int,
        Meta(
            ge=0,
            description="work only while so many of the witnesses show that they see the same "
            "versions; 0: without them",
        ),
    ] = 0
    trust: Annotated[
        dict[str, Name],
        Meta(
            description="ids of peers whose owners you know, and your names for them: "
            "commonweight-agent trust add; only these count in a secure sum"
        ),
    ] = msgspec.field(default_factory=dict)
    secure_min: Annotated[
        int,
        Meta(
            ge=0,
            description="train, evaluate and answer questions only in secure sums, which have so "
            "many peers that you trust, with this one; 0: also in others; a sum then needs 3",
        ),
    ] = 0
    told_folder: Annotated[
        str,
        Meta(
            description="folder with the record of what was told about your rows; agents in "
            "several fleets that use the same rows share one; empty: in this agent's home"
        ),
    ] = ""
    data_extremes: Annotated[bool, Meta(description="column minima and maxima may leave")] = False
    analyze: Annotated[
        Literal["off", "ask", "on"],
        Meta(
            description="answer questions about your data: off; ask, after your approval "
            "(commonweight-agent policy questions); on, all within the limits"
        ),
    ] = "off"
    analyze_operations: Annotated[
        tuple[str, ...], Meta(description="allowed operations: count, mean and so on; * is all")
    ] = ("*",)
    analyze_epsilon: Annotated[
        float,
        Meta(
            ge=0,
            description="privacy budget ε of all answers, which then all have noise; 0: no answer "
            "has noise",
        ),
    ] = 0.0
    analyze_epsilon_per_question: Annotated[
        float, Meta(ge=0, description="maximum ε of one question, within analyze_epsilon")
    ] = 1.0
    privacy_max_epsilon: Annotated[
        float,
        Meta(
            ge=0,
            description="privacy budget ε of all answers, over all runs and questions; answers "
            "without noise then stay here; 0: no limit (commonweight-agent budget)",
        ),
    ] = 0.0
    privacy_delta: Annotated[
        float,
        Meta(gt=0, le=1e-2, description="δ of that budget; well below 1 / your rows"),
    ] = 1e-5
    privacy_shared: Annotated[
        Literal["off", "on"],
        Meta(
            description="with that budget, take part in runs in which peers that you trust share "
            "the noise: on, the budget then relies on their noise; off, only on that of this "
            "machine"
        ),
    ] = "off"
