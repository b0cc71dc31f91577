"""The settings of the built-in tasks, with their types, bounds and help. Pure.

Agents read a run's settings by them. The coordinator, which runs no task, checks `--set` by them
before a run. A task has the settings of the loop, with other defaults where its class has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from msgspec import Meta

from protocols.model.setting_hints import specs_of, with_defaults
from protocols.model.setting_specs import SettingSpec


@dataclass
class LoopSettings:
    """The settings of the training loop."""

    epochs: Annotated[int, Meta(ge=1, description="passes over this peer's examples")] = 5
    batch_size: Annotated[
        int, Meta(ge=0, description="examples in a step; 0 or all: all of them")
    ] = 10
    max_steps: Annotated[int, Meta(ge=0, description="stop after these steps; 0: no limit")] = 0
    optimiser: Annotated[
        Literal["sgd", "adamw", "muon"],
        Meta(
            description="plain SGD, or AdamW with its usual betas; muon: Muon for matrices, AdamW "
            "for the rest"
        ),
    ] = "sgd"
    lr: Annotated[float, Meta(ge=0, description="learning rate")] = 0.1
    lr_schedule: Annotated[
        Literal["constant", "linear", "cosine"],
        Meta(description="the learning rate over rounds; not constant: to 0 over lr_rounds"),
    ] = "constant"
    lr_rounds: Annotated[int, Meta(ge=0, description="the rounds of lr_schedule")] = 0
    lr_decay: Annotated[
        float, Meta(gt=0, le=1, description="factor of the learning rate from round to round")
    ] = 1.0
    warmup_rounds: Annotated[
        int, Meta(ge=0, description="rounds until the full learning rate is reached")
    ] = 0
    momentum: Annotated[float, Meta(ge=0, lt=1, description="of sgd")] = 0.0
    weight_decay: Annotated[
        float,
        Meta(
            ge=0,
            description="sgd: added to the gradient, times the weights; adamw and muon: decoupled",
        ),
    ] = 0.0
    clip_norm: Annotated[
        float, Meta(ge=0, description="the largest norm of a step's gradient; 0: no limit")
    ] = 0.0
    proximal_mu: Annotated[
        float, Meta(ge=0, description="strength of the pull to the first weights (FedProx)")
    ] = 0.0
    precision: Annotated[
        Literal["auto", "fp32", "tf32", "bf16", "fp16"],
        Meta(description="auto: bf16 on a graphics card, or fp16 without bf16; else fp32"),
    ] = "auto"


@dataclass
class ImageSettings:
    """Of images. By default norm does not mix the statistics of peers whose pictures differ (Hsieh
    et al. 2020, arXiv 1910.00189)."""

    classes: Annotated[
        str, Meta(description="names of the folders, by label; empty: those of all peers")
    ] = ""
    model: Annotated[
        str, Meta(description="cnn, resnet18, or layers such as 'conv 16 3, pool, dense 64'")
    ] = "cnn"
    size: Annotated[int, Meta(ge=8, le=1024, description="pixels a side of scaled pictures")] = 64
    channels: Annotated[int, Meta(ge=1, le=3, description="3 for color, 1 for gray")] = 3
    flip: Annotated[bool, Meta(description="mirror a random half of the pictures")] = True
    norm: Annotated[
        Literal["group", "batch"], Meta(description="of resnet18; batch as published")
    ] = "group"
    epochs: int = 1
    batch_size: int = 32
    lr: float = 0.01
    momentum: float = 0.9


@dataclass
class LoraSettings:
    """Of lora (Hu et al. 2021, arXiv 2106.09685)."""

    model: Annotated[
        str, Meta(description="the folder of the base model, in every peer's folder of models")
    ] = ""
    kind: Annotated[
        Literal["causal", "chat", "classification"],
        Meta(description="next tokens of text files, answers of conversations, or classes"),
    ] = "causal"
    classes: Annotated[
        str, Meta(description="of a classification: names of the folders, by label")
    ] = ""
    rank: Annotated[
        int,
        Meta(ge=0, le=1024, description="of the adapters; 0 or auto: by the device's memory"),
    ] = 8
    alpha: Annotated[float, Meta(gt=0, description="adapters are scaled by alpha / rank")] = 16.0
    dropout: Annotated[float, Meta(ge=0, lt=1, description="before the adapters")] = 0.0
    targets: Annotated[
        str, Meta(description="layers with adapters: q_proj,v_proj or all-linear; empty: by PEFT")
    ] = ""
    aggregation: Annotated[
        Literal["ffa", "stack", "svd", "average"],
        Meta(
            description="of adapters B A: ffa fixes A; stack and svd multiply; average is inexact"
        ),
    ] = "ffa"
    context: Annotated[int, Meta(ge=2, description="tokens of an example")] = 128
    micro_batch: Annotated[
        int, Meta(ge=0, description="examples at a time in a step, for less memory; 0: all")
    ] = 0
    checkpointing: Annotated[
        bool, Meta(description="compute activations again for the gradients, for less memory")
    ] = False
    packing: Annotated[
        bool, Meta(description="of chat: several conversations in an example, if they fit")
    ] = True
    exact_match: Annotated[
        int,
        Meta(ge=0, le=256, description="of chat: held-out answers that an evaluation generates"),
    ] = 0
    digest: Annotated[
        str, Meta(description="the SHA-256 that the base model must have; empty: any, but one")
    ] = ""
    quantized: Annotated[
        Literal["no", "int8", "nf4"],
        Meta(description="hold the base model in 8 or 4 bits, on a graphics card"),
    ] = "no"
    epochs: int = 1
    batch_size: int = 8
    optimiser: str = "adamw"
    lr: float = 1e-3


@dataclass
class MnistSettings:
    """Of mnist."""

    model: Annotated[
        Literal["2nn", "cnn", "edges"],
        Meta(description="edges: a linear layer over the directions of edges"),
    ] = "2nn"
    pixels: Annotated[
        Literal["unit", "standard"],
        Meta(description="from 0 to 1, or with the mean 0 and the deviation 1 of MNIST"),
    ] = "unit"


@dataclass
class MotionSettings:
    """Of motion."""

    filters: Annotated[
        int, Meta(ge=1, le=1024, description="of the first of two convolutions over time")
    ] = 32
    epochs: int = 3
    batch_size: int = 16
    lr: float = 0.02
    momentum: float = 0.9


@dataclass
class PingSettings:
    """Of ping, which has no training loop."""

    kilobytes: Annotated[int, Meta(ge=1, description="the size of the weights")] = 10


@dataclass
class TabularSettings:
    """Of tabular. Tables have numbers with more digits than bf16."""

    target: Annotated[str, Meta(description="the column to predict")] = ""
    kind: Annotated[
        Literal["auto", "classification", "regression"],
        Meta(description="auto: by the values of the target"),
    ] = "auto"
    features: Annotated[
        str, Meta(description="columns to predict from; empty: those of half of the peers or more")
    ] = ""
    categorical: Annotated[
        str, Meta(description="columns of numbers that are categories: years, codes, keys")
    ] = ""
    scaling: Annotated[
        Literal["standard", "minmax"],
        Meta(description="mean 0 and variance 1; or 0 to 1, where owners allow it"),
    ] = "standard"
    hashed: Annotated[bool, Meta(description="peers send hashes of categories")] = False
    split_by: Annotated[
        str, Meta(description="hold out the latest rows by this column; empty: random ones")
    ] = ""
    class_weights: Annotated[
        Literal["none", "balanced"],
        Meta(description="balanced: all classes count alike, however rare they are in the fleet"),
    ] = "none"
    model: Annotated[
        Literal["auto", "linear", "mlp", "trees"],
        Meta(
            description="linear: logistic for classes; trees: gradient boosting; auto: the best by "
            "a cross-validation inside the peers, which run start takes unless it names a model"
        ),
    ] = "linear"
    hidden: Annotated[
        str, Meta(description="sizes of the layers of mlp: at most 8, with 16 million weights")
    ] = "64,32"
    trees: Annotated[int, Meta(ge=1, le=5000, description="how many trees, at most")] = 300
    depth: Annotated[int, Meta(ge=1, le=10, description="levels of a tree: a round each")] = 6
    bins: Annotated[
        int, Meta(ge=4, le=63, description="of trees: cells of a column, one for missing values")
    ] = 32
    eta: Annotated[float, Meta(gt=0, le=1, description="of trees: shrinks each tree")] = 0.1
    l2: Annotated[float, Meta(ge=0, le=1e6, description="of trees: lambda of XGBoost")] = 1.0
    min_weight: Annotated[
        float, Meta(ge=0, le=1e9, description="of trees: least sum of hessians of a node")
    ] = 1.0
    min_gain: Annotated[
        float, Meta(ge=0, le=1e9, description="of trees: least gain of a split")
    ] = 0.0
    objective: Annotated[
        Literal["auto", "logistic", "multiclass", "squared", "poisson"],
        Meta(description="of trees; auto: by the target"),
    ] = "auto"
    epochs: int = 1
    batch_size: int = 32
    optimiser: str = "adamw"
    lr: float = 0.01
    precision: str = "fp32"


@dataclass
class TextSettings:
    """Of text-lm."""

    tokens: Annotated[
        str, Meta(description="bytes, or the SHA-256 of the tokenizer.json of every peer")
    ] = "bytes"
    vocabulary: Annotated[
        int, Meta(ge=2, description="the number of tokens; with a tokenizer, its entries plus one")
    ] = 257
    layers: Annotated[int, Meta(ge=1, description="blocks of attention and MLP")] = 4
    heads: Annotated[int, Meta(ge=1, description="of attention")] = 4
    width: Annotated[int, Meta(ge=1, description="numbers of a token's embedding")] = 128
    context: Annotated[int, Meta(ge=2, description="the tokens that a prediction depends on")] = 128
    dropout: Annotated[float, Meta(ge=0, lt=1, description="in each block")] = 0.0
    epochs: int = 1
    batch_size: int = 16
    optimiser: str = "adamw"
    lr: float = 1e-3


LOOP: Mapping[str, SettingSpec] = specs_of(LoopSettings)
_OWN = {
    "images": ImageSettings,
    "lora": LoraSettings,
    "mnist": MnistSettings,
    "motion": MotionSettings,
    "tabular": TabularSettings,
    "text-lm": TextSettings,
}
#: The settings of each built-in task.
BY_TASK: Mapping[str, Mapping[str, SettingSpec]] = {
    "ping": specs_of(PingSettings),
    **{name: with_defaults(LOOP, specs_of(kind)) for name, kind in _OWN.items()},
}
