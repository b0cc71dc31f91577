"""A run's settings, as the ledger stores them. Pure."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from protocols.codecs import registry
from protocols.messages.envelope import Count, Integer, Settings
from protocols.privacy.private_training import PrivateTraining
from protocols.privacy.secagg.messages import masked_codec
from protocols.privacy.user_level import PrivateVersions

Setting = str | int | float | bool
#: Without a pattern: ledgers of older versions have any text.
_ShortText = Annotated[str, Meta(max_length=400)]


class RunSpec(Struct, frozen=True, kw_only=True):
    """The settings of a run. They are set at its start and never change.

    `deadline_s`: counts from the start of a round's training, and again from that of its
    evaluation. If it passes without the quorum, all peers that could help are asked again, and it
    starts again. Time with a full disk does not count. With `deadline` "auto" it is derived from
    earlier rounds and `deadline_s` is its maximum (`decisions.phase_deadline_s`).
    `select`: how many peers are asked, as a multiple of the quorum (1.2: a fifth more than needed);
    the round then continues as soon as it has its quorum. 0: all are asked and awaited.
    `late`: what happens to an update whose round has closed (`coordinator.runs.late_updates`).
    `keep_versions`: how many of the newest versions stay on disk, in addition to the best one.
    `codec`: how updates are compressed, one of `protocols.codecs.registry`.
    `evaluate_every`: the first version, then one of this many, and the last are evaluated.
    `weighting`: updates count by their examples, or all the same.
    `clip_norm`: the maximum Euclidean norm of an update's change (0: none).
    `outlier_limit`: how many times as far as the median peer one may pull a version
    (`strategies.outliers`; 0: no limit, as in old ledgers).
    `handshake`: before round 1, peers compare schema and preprocessing. Old ledgers lack it.
    `best_metric`: the metric that decides which version is best (empty: accuracy, else loss);
    `best_direction`: whether higher is better (empty: decided by the metric's name). The run ends
    early when the metric reaches `target`, or has not improved for `patience` rounds (0: never).
    `ties`: which accuracies count as equal, so that the loss decides between versions, if there is
    no `best_metric`: "standard error" those that the held-out rows cannot tell apart.
    `mode` "buffered" (FedBuff, arXiv 2106.06639): peers do not wait for each other. Each has an
    assignment of its own, `concurrency` of them at a time (0: all), and `buffer` updates make a
    version. An update that is up to `max_staleness` versions behind counts 1/√(1 + staleness),
    times `server_lr`.
    `min_examples`: a peer that trains on fewer examples gets no work from this run.
    `dp_epsilon`, `dp_delta`: each peer adds noise of its own, so that all rounds together cost at
    most that for one of its rows (0: no noise). `dp_clip`: the maximum norm of a row's gradient.
    `dp_shared`: the number of honest peers of a secure sum that add the noise together (0 or 1:
    each peer adds all of it).
    `dp_user_epsilon`: the coordinator adds noise to each version, so that all versions together
    cost at most that, with `dp_delta`, for one peer (0: no noise).
    `secure`: the coordinator sees no single update, only their sum (`coordinator.runs.secure`).
    `overlap`: rounds by which training is late, so that peers train while they send updates and
    await versions (`agent.clientapp.training_ahead`; 0: each round begins with its version).
    `fragments`: the model is exchanged in this many fragments, one in each round
    (`protocols.model.fragments`).
    `only`: the single part that a parent fleet requests from this one (empty: all parts), in the
    parent's round `first_round`. `check`: a run of only the part `describe` that keeps what
    each peer described, for `commonweight run check`.
    `personal`: how each peer makes a model of its own (`coordinator.strategies.personal`; empty: by
    fine-tuning after the run, if its owner wants a comparison).
    `app`: the digest of the code of a Flower app, whose ServerApp then decides; `task` is
    "flower:" and its name, `settings` are changes of its run config (empty: no app).
    """

    task: _ShortText
    rounds: Count
    first_round: Count = 1
    only: Literal["", "describe", "init", "train", "evaluate"] = ""
    strategy: _ShortText = "fedavg"
    strategy_args: Settings = {}
    settings: Settings = {}
    codec: _ShortText = "fp32"
    evaluate_every: Count = 1
    seed: Integer = 0
    quorum: Integer = 1
    deadline_s: float = 600.0
    deadline: Literal["fixed", "auto"] = "fixed"
    select: float = 0.0
    late: Literal["drop", "fold"] = "drop"
    keep_versions: Integer = 2
    weighting: Literal["examples", "equal"] = "examples"
    max_weight_share: float = 1.0
    max_examples: Integer = 10_000_000
    min_examples: Integer = 1
    clip_norm: float = 0.0
    outlier_limit: float = 0.0
    handshake: bool = False
    best_metric: _ShortText = ""
    best_direction: Literal["", "max", "min"] = ""
    ties: Literal["exact", "standard error"] = "exact"
    patience: Integer = 0
    target: float | None = None
    mode: Literal["synchronous", "buffered"] = "synchronous"
    buffer: Integer = 0
    max_staleness: Integer = 10
    concurrency: Integer = 0
    server_lr: float = 1.0
    check: bool = False
    dp_epsilon: float = 0.0
    dp_delta: float = 1e-5
    dp_clip: float = 1.0
    dp_shared: Integer = 0
    dp_user_epsilon: float = 0.0
    secure: bool = False
    overlap: Integer = 0
    fragments: Integer = 1
    personal: _ShortText = ""
    app: _ShortText = ""

    @property
    def private(self) -> PrivateTraining | None:
        """The noise that the run's peers add; None without noise."""
        if not self.dp_epsilon:
            return None
        shared = max(1, self.dp_shared)
        return PrivateTraining(self.dp_epsilon, self.dp_delta, self.dp_clip, self.rounds, shared)

    @property
    def private_versions(self) -> PrivateVersions | None:
        """The privacy cost of the run's versions for each peer; None without noise in them."""
        if not self.dp_user_epsilon:
            return None
        rounds = self.rounds - self.first_round + 1
        return PrivateVersions(self.dp_user_epsilon, self.dp_delta, rounds)

    @property
    def measures(self) -> bool:
        """False for a run with noise, in which no metric may show what noise hides."""
        return self.private is None and self.private_versions is None

    @property
    def work_codec(self) -> str:
        """The codec that work names. Raises UsageError if a secure run cannot use it."""
        if self.secure:
            return masked_codec(self.codec)
        return registry.name_in_work(self.codec, self.fragments)
